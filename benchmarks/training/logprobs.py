# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""Logprobs of targets under a large vocabulary, forward and backward."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import liger
import torch
import torch.nn.functional as F
from measure import Result, dtypes_of_products, medians, name_of, peak_cuda_memory

from vllm.model_executor.layers.training import token_logprobs, weighted_nll

GROUP = "token_logprobs, forward and backward"


def run(device: torch.device) -> Iterator[Result]:
    """Time, and on CUDA memory, of the mean logprob and its gradients."""
    if device.type == "cuda":
        yield from _case(device, torch.bfloat16, 8192, 152064, 4096)
    else:
        for dtype in dtypes_of_products(device):
            yield from _case(device, dtype, 2048, 16384, 512)


def _case(
    device: torch.device, dtype: torch.dtype, tokens: int, vocab: int, hidden: int
) -> Iterator[Result]:
    head = torch.nn.Linear(hidden, vocab, bias=False, device=device, dtype=dtype)
    with torch.no_grad():
        head.weight.normal_(std=hidden**-0.5)
    states = torch.randn(tokens, hidden, device=device, dtype=dtype).requires_grad_()
    targets = torch.randint(vocab, (tokens,), device=device)
    weights = torch.full((tokens,), 1 / tokens, device=device)
    size = f"{tokens} tokens × {vocab} vocabulary, hidden {hidden}, {name_of(dtype)}"

    def step(loss: Callable[[], torch.Tensor]) -> Callable[[], object]:
        return lambda: torch.autograd.grad(loss(), (states, head.weight))

    losses = {
        "ours": lambda: weighted_nll(states, head, targets, weights)[0],
        "ours, gradients in the backward": lambda: (
            -token_logprobs(states, head, targets).mean()
        ),
        "logits and cross_entropy": lambda: F.cross_entropy(
            head(states).float(), targets
        ),
    }
    target, memory_target = {}, {}
    if device.type == "cuda":
        losses["Liger-Kernel"] = lambda: liger.linear_cross_entropy(
            states, head.weight, targets
        )
        target = {"Liger-Kernel": 1 / 1.1}
        memory_target = {"fp32 logits": 8.0}
    steps = {name: step(loss) for name, loss in losses.items()}
    times = medians(steps, device, least=10)
    yield Result(GROUP, size, "ms", times.pop("ours"), times, target)
    if device.type == "cuda":
        # The gradients are results, not working memory.
        # weighted_nll and Liger-Kernel have them at the end of the forward.
        results = (states.nbytes + head.weight.nbytes) / 2**20
        peaks = {name: peak_cuda_memory(steps[name]) - results for name in losses}
        ours = peaks.pop("ours")
        peaks["fp32 logits"] = 4 * tokens * vocab / 2**20
        yield Result(GROUP, size, "MiB", ours, peaks, memory_target)
