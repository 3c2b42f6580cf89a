# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""Gradient of the logits, log-sum-exps and entropies, on CUDA."""

from __future__ import annotations

import torch

from vllm.triton_utils import tl, triton

# Where the probability is 0 in any dtype; times -inf it would be NaN.
_LOWEST = tl.constexpr(-1000.0)


@triton.jit
def _logits_gradient_kernel(
    logits,
    lse,
    targets,
    grad,
    entropy,
    grad_entropy,
    temperature,
    output,
    logits_stride,
    output_stride,
    size,
    has_entropy: tl.constexpr,
    has_temperature: tl.constexpr,
    block: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * block + tl.arange(0, block)
    mask = column < size
    logit = tl.load(logits + row * logits_stride + column, mask=mask).to(tl.float32)
    if has_temperature:
        logit = logit / tl.load(temperature + row)
    logprob = logit - tl.load(lse + row)
    g = tl.load(grad + row)
    slope = g
    if has_entropy:
        finite = tl.where(logprob < _LOWEST, _LOWEST, logprob)
        slope = g + tl.load(grad_entropy + row) * (finite + tl.load(entropy + row))
    at_target = column == tl.load(targets + row)
    gradient = tl.where(at_target, g, 0.0) - tl.exp(logprob) * slope
    tl.store(output + row * output_stride + column, gradient, mask=mask)


def logits_gradient(
    logits: torch.Tensor,
    lse: torch.Tensor,
    targets: torch.Tensor,
    grad: torch.Tensor,
    entropy: torch.Tensor | None,
    grad_entropy: torch.Tensor | None,
    temperature: torch.Tensor | None,
    dtype: torch.dtype,
    output: torch.Tensor | None = None,
) -> torch.Tensor:
    """shape = [rows, size] -> [rows, size]; arguments as in `logits_gradient`.

    output: where to write, such as logits; None: a new tensor.
    """
    rows, size = logits.shape
    if output is None:
        output = logits.new_empty(rows, size, dtype=dtype)
    block = 4096
    _logits_gradient_kernel[rows, triton.cdiv(size, block)](
        logits,
        lse,
        targets,
        grad,
        entropy,
        grad_entropy,
        temperature,
        output,
        logits.stride(0),
        output.stride(0),
        size,
        has_entropy=grad_entropy is not None,
        has_temperature=temperature is not None,
        block=block,
        num_warps=8,
    )
    return output


@triton.jit
def _entropy_kernel(logprobs, output, size, block: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    total = tl.zeros([block], tl.float32)
    for start in range(0, size, block):
        column = start + tl.arange(0, block)
        mask = column < size
        # Past the end: probability 1 and logarithm 0, which add 0.
        logprob = tl.load(logprobs + row * size + column, mask=mask, other=0.0)
        finite = tl.where(logprob < _LOWEST, _LOWEST, logprob)
        total -= tl.exp(logprob) * finite
    tl.store(output + row, tl.sum(total, 0))


def entropy_of_rows(logprobs: torch.Tensor) -> torch.Tensor:
    """shape = [rows, vocab_size] -> [rows], fp32; rows are contiguous."""
    rows, size = logprobs.shape
    output = logprobs.new_empty(rows)
    _entropy_kernel[rows,](logprobs, output, size, block=4096, num_warps=8)
    return output


@triton.jit
def _lse_kernel(logits, output, logits_stride, size, block: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    # Each lane has its own maximum, so that they are compared once, at the end.
    maximum = tl.full([block], float("-inf"), tl.float32)
    total = tl.zeros([block], tl.float32)
    for start in range(0, size, block):
        column = start + tl.arange(0, block)
        logit = tl.load(
            logits + row * logits_stride + column,
            mask=column < size,
            other=float("-inf"),
        ).to(tl.float32)
        new = tl.maximum(maximum, logit, propagate_nan=tl.PropagateNan.ALL)
        # A lane that has seen -inf alone adds nothing; the difference would be NaN.
        shift = tl.where(new == float("-inf"), 0.0, new)
        total = total * tl.exp(maximum - shift) + tl.exp(logit - shift)
        maximum = new
    largest = tl.max(maximum, 0)
    shift = tl.where(largest == float("-inf"), 0.0, largest)
    lse = shift + tl.log(tl.sum(total * tl.exp(maximum - shift), 0))
    tl.store(output + row, lse)


def lse_of_rows(logits: torch.Tensor) -> torch.Tensor:
    """shape = [rows, size], contiguous last dim -> [rows], fp32; NaN where one is."""
    rows, size = logits.shape
    output = logits.new_empty(rows, dtype=torch.float32)
    _lse_kernel[rows,](logits, output, logits.stride(0), size, block=4096, num_warps=8)
    return output
