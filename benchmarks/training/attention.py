# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""Attention, forward and backward, against torch's."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from measure import Result, as_graph, forward_backward, medians, name_of
from torch.nn.attention import SDPBackend, sdpa_kernel

from vllm.model_executor.layers.training import TrainableAttention

CPU_CASES = [
    # (batch, seq, heads, kv_heads, head_size)
    (4, 512, 8, 4, 64),
    (1, 4096, 8, 4, 64),
    (4, 512, 8, 2, 128),
    (1, 4096, 8, 2, 128),
]
CUDA_CASES = [
    (4, 4096, 32, 8, 128),
    (16, 1024, 32, 8, 128),
    (1, 16384, 32, 8, 128),
    (4, 4096, 16, 16, 64),
]


def run(device: torch.device) -> Iterator[Result]:
    """Dense batches against SDPA, and a ragged batch against a dense one.

    On CUDA as graphs, which is the GPU's time, and launched from Python.
    """
    cuda = device.type == "cuda"
    cases = CUDA_CASES if cuda else CPU_CASES
    for dtype in (torch.bfloat16,) if cuda else (torch.float32, torch.bfloat16):
        for case in cases:
            yield _dense(device, dtype, *case, graphs=cuda)
        yield _ragged(device, dtype, *cases[0])
    for case in CUDA_CASES if cuda else ():
        yield _dense(device, torch.bfloat16, *case, graphs=False)


def _dense(
    device: torch.device,
    dtype: torch.dtype,
    batch: int,
    seq: int,
    heads: int,
    kv_heads: int,
    head_size: int,
    *,
    graphs: bool,
) -> Result:
    layer = TrainableAttention(heads, head_size, num_kv_heads=kv_heads)
    inputs = _inputs(device, dtype, (batch, seq), heads, kv_heads, head_size)
    # SDPA wants the heads before the tokens; it gets them so, at no cost.
    turned = [_turned(tensor) for tensor in inputs]
    variants = {"ours": forward_backward(layer, *inputs)}
    if device.type == "cuda":
        for name, backend in (
            ("cuDNN SDPA", SDPBackend.CUDNN_ATTENTION),
            ("torch flash SDPA", SDPBackend.FLASH_ATTENTION),
        ):
            variants[name] = _within(backend, forward_backward(_sdpa, *turned))
        target = {"cuDNN SDPA": 1.05, "torch flash SDPA": 1.7}
        target = target if head_size == 128 and graphs else {}
    else:
        variants["torch SDPA"] = forward_backward(_sdpa, *turned)
        target = {"torch SDPA": 1.0}
    if graphs:
        variants = {name: as_graph(function) for name, function in variants.items()}
    times = medians(variants, device)
    ours = times.pop("ours")
    # Two GEMMs forward and five backward, half of each masked.
    flops = 7 * batch * heads * seq * seq * head_size
    launched = " launched from Python" if device.type == "cuda" and not graphs else ""
    return Result(
        f"Causal attention, forward and backward{launched}",
        f"{batch}×{seq} tokens, {heads}/{kv_heads} heads of {head_size}, "
        f"{name_of(dtype)}",
        "ms",
        ours,
        times,
        target,
        f"{flops / ours / 1e9:.3g} TFLOP/s",
    )


def _ragged(
    device: torch.device,
    dtype: torch.dtype,
    batch: int,
    seq: int,
    heads: int,
    kv_heads: int,
    head_size: int,
) -> Result:
    """Packed sequences of many lengths, against the dense batch's rate."""
    generator = torch.Generator().manual_seed(0)
    lengths = torch.randint(seq // 8, 2 * seq, (2 * batch,), generator=generator)
    cu_seqlens = F.pad(lengths.cumsum(0), (1, 0)).to(torch.int32).to(device)
    longest = int(lengths.max())
    layer = TrainableAttention(heads, head_size, num_kv_heads=kv_heads)
    packed = (int(lengths.sum()),)
    inputs = _inputs(device, dtype, packed, heads, kv_heads, head_size)
    dense = _inputs(device, dtype, (batch, seq), heads, kv_heads, head_size)
    variants = {
        "ours": forward_backward(
            lambda q, k, v: layer(q, k, v, cu_seqlens, longest), *inputs
        ),
        "dense rate": forward_backward(layer, *dense),
    }
    times = medians(variants, device)
    work = (lengths.double() ** 2).sum().item() / (batch * seq * seq)
    return Result(
        "Attention of ragged packed sequences",
        f"{2 * batch} sequences of {int(lengths.min())} to {longest} tokens, "
        f"{heads}/{kv_heads} heads of {head_size}, {name_of(dtype)}",
        "ms",
        times["ours"],
        {"as many operations, dense": times["dense rate"] * work},
        {"as many operations, dense": 0.9},
    )


def _inputs(
    device: torch.device,
    dtype: torch.dtype,
    tokens: tuple[int, ...],
    heads: int,
    kv_heads: int,
    head_size: int,
) -> list[torch.Tensor]:
    return [
        torch.randn(*tokens, n, head_size, device=device, dtype=dtype).requires_grad_()
        for n in (heads, kv_heads, kv_heads)
    ]


def _turned(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.detach().transpose(1, 2).requires_grad_()


def _sdpa(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)


def _within(
    backend: SDPBackend, function: Callable[[], object]
) -> Callable[[], object]:
    def run() -> object:
        with sdpa_kernel(backend):
            return function()

    return run
