# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""A weighted sum of log-probabilities whose gradients are computed in the forward.

With z = (h W^T + b) / T, y = z - lse(z), p = exp(y) and the loss L = -sum w y[t]:

    dz = w (p - onehot(t))
    dh = dz W / T,  dW = dz^T h / T,  db = sum over tokens dz / T

The weights w are known before the backward, so a block of logits that is there gives
its part of all gradients: three products with W, where `op` takes four, since it
computes the logits again. The backward multiplies by the gradient of L, a number. On
CUDA the gradient of a block's logits overwrites them, and dW is added up in its own
dtype, so a 16-bit one is rounded once a block.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from vllm.model_executor.determinism.linear.op import linear
from vllm.model_executor.determinism.log_softmax import tempered, uses_samplers_kernels
from vllm.model_executor.layers.training.ops.logprobs import triton_kernels
from vllm.model_executor.layers.training.ops.logprobs.blocks import blocks_for, ranges
from vllm.model_executor.layers.training.ops.logprobs.logits_gradient import (
    RowNumbers,
    logits_gradient,
)
from vllm.model_executor.layers.training.ops.logprobs.of_logits import (
    IN_PLAIN_TORCH,
    of_rows,
    score,
)
from vllm.model_executor.layers.training.ops.logprobs.op import (
    add_product,
    gather_vocab,
    new_gradients,
    product_dtype,
)
from vllm.model_executor.op_library import define_op, has_kernel


def _forward(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    targets: torch.Tensor,
    temperature: torch.Tensor | None,
    weights: torch.Tensor,
    vocab_size: int,
    vocab_start: int,
    tp_group: str,
    needs: Sequence[bool],
) -> tuple[torch.Tensor, ...]:
    logprobs = torch.empty_like(weights)
    gradients = new_gradients(hidden, weight, bias, needs)
    grad_hidden, grad_weight, grad_bias = gradients
    # Rows of padding have no logits, and zeros for a gradient.
    count = max(0, min(len(weight), vocab_size - vocab_start))
    dtype = product_dtype(hidden)
    sum_weight = _new_sum(grad_weight, dtype)
    sum_bias = torch.zeros_like(grad_bias, dtype=weights.dtype)
    if count == 0:
        grad_hidden.zero_()
    factors = weight[:count].to(dtype) if needs[0] else weight
    for rows in ranges(
        len(hidden), blocks_for(hidden).tokens_with_gradient(vocab_size)
    ):
        local = linear(hidden[rows], weight, bias)
        divisor = of_rows(temperature, rows)
        logits = gather_vocab(local, tp_group)[:, :vocab_size]
        logprobs[rows], lse = _score(logits, targets[rows], divisor)
        del logits
        if not (any(needs) and count):
            continue
        numbers = RowNumbers.of_gradients(
            [targets[rows] - vocab_start, divisor, None, lse], -weights[rows], None
        )
        dz = _gradient(local[:, :count], numbers, dtype)
        del local
        if needs[0]:
            grad_hidden[rows] = dz @ factors
        if needs[1]:
            add_product(sum_weight[:count], dz.t(), hidden[rows].to(dtype), True)
        if needs[2]:
            sum_bias[:count] += dz.sum(0, dtype=sum_bias.dtype)
        del dz
    if sum_weight is not grad_weight:
        grad_weight.copy_(sum_weight)
    grad_bias.copy_(sum_bias)
    return -(weights * logprobs).sum(), logprobs, *gradients


def _new_sum(result: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Zeros to add up products in: on CUDA the result itself, which is large."""
    if result.device.type == "cuda" and result.dtype == dtype:
        return result.zero_()
    return torch.zeros_like(result, dtype=torch.promote_types(dtype, torch.float32))


def _score(
    logits: torch.Tensor, targets: torch.Tensor, temperature: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Logprobs of the targets, and logarithms of the rows' sums of exponentials."""
    on_cuda = logits.device.type == "cuda" and has_kernel(logits)
    if not on_cuda or uses_samplers_kernels(logits):
        logprobs, _, lse = score(logits, targets, temperature, False, True)
        return logprobs, lse
    divided = tempered(logits, temperature)
    lse = triton_kernels.lse_of_rows(divided)
    chosen = divided.gather(1, targets.unsqueeze(1)).squeeze(1)
    return chosen - lse, lse


def _gradient(
    logits: torch.Tensor, numbers: RowNumbers, dtype: torch.dtype
) -> torch.Tensor:
    """The gradient of logits, in their place where there is a kernel for that."""
    if logits.device.type == "cuda" and has_kernel(logits):
        return triton_kernels.logits_gradient(logits, *numbers, dtype, output=logits)
    return logits_gradient(logits, numbers, dtype)


def _fake_forward(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    targets: torch.Tensor,
    temperature: torch.Tensor | None,
    weights: torch.Tensor,
    *rest: Any,
) -> tuple[torch.Tensor, ...]:
    gradients = new_gradients(hidden, weight, bias, rest[-1])
    return weights.new_empty(()), torch.empty_like(weights), *gradients


def _setup_context(
    ctx: Any, inputs: tuple[Any, ...], output: tuple[torch.Tensor, ...]
) -> None:
    _, logprobs, *gradients = output
    ctx.save_for_backward(*gradients)
    ctx.is_used = False
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(logprobs, *gradients)


def _backward(
    ctx: Any, grad: torch.Tensor | None, *unused: None
) -> tuple[torch.Tensor | None, ...]:
    if torch.is_grad_enabled():
        raise RuntimeError(
            "weighted_nll has no second derivative: its gradients cannot be "
            f"differentiated. To differentiate twice, {IN_PLAIN_TORCH}."
        )
    if ctx.is_used:
        raise RuntimeError(
            "weighted_nll has one backward, which takes its gradients away. For "
            "several backwards of one forward, use token_logprobs."
        )
    ctx.is_used = True
    if grad is None:
        return (None,) * 10
    wanted = [
        gradient.mul_(grad) if need else None
        for gradient, need in zip(ctx.saved_tensors, ctx.needs_input_grad)
    ]
    return (*wanted, *[None] * 7)


weighted_nll_op = define_op(
    "weighted_nll(Tensor hidden, Tensor weight, Tensor? bias, Tensor targets, "
    "Tensor? temperature, Tensor weights, int vocab_size, int vocab_start, "
    "str tp_group, bool[3] needs) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    fake=_fake_forward,
    cpu=_forward,
    cuda=_forward,
    setup_context=_setup_context,
    backward=_backward,
    instead=IN_PLAIN_TORCH,
)
