# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""Gated activations on CUDA.

Inputs are matrices whose last dim is contiguous, in fp32, bf16 or fp16. The kernels
compute in fp32 and round once. A program computes a piece of one row, elements do not
depend on each other, so a row's bits depend on that row alone.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from vllm.triton_utils import tl, triton


@triton.jit
def _activate(gate, form: tl.constexpr):
    """The activation at the gate, and its derivative."""
    if form == "gelu":
        share = 0.5 * (1 + tl.erf(gate * 0.7071067811865476))  # sqrt(1 / 2)
        density = 0.3989422804014327 * tl.exp(-0.5 * gate * gate)  # 1 / sqrt(2 pi)
        derivative = share + gate * density
    else:
        # gelu's tanh form is gate * (1 + tanh(u)) / 2 = gate * sigmoid(2 u) with u =
        # sqrt(2 / pi) * (gate + 0.044715 * gate**3). The constant is 2 * sqrt(2 / pi).
        if form == "gelu_tanh":
            inner = 1.5957691216057308 * gate * (1 + 0.044715 * gate * gate)
            slope = 1.5957691216057308 * (1 + 0.134145 * gate * gate)
        else:
            inner = gate
            slope = 1.0
        # sigmoid(|inner|) and sigmoid(-|inner|): no overflow, no cancellation in 1 -
        # sigmoid.
        decay = tl.exp(-tl.abs(inner))
        large = 1 / (1 + decay)
        small = decay * large
        share = tl.where(inner < 0, small, large)
        derivative = share + gate * (large * small * slope)
    return gate * share, derivative


@triton.jit
def _piece(size, block: tl.constexpr):
    """This program's row, columns and mask. The pieces of a row are adjacent."""
    pieces = tl.cdiv(size, block)
    row = (tl.program_id(0) // pieces).to(tl.int64)
    column = tl.program_id(0) % pieces * block + tl.arange(0, block)
    return row, column, column < size


@triton.jit
def _forward_kernel(
    gate,
    up,
    output,
    gate_stride,
    up_stride,
    size,
    form: tl.constexpr,
    block: tl.constexpr,
):
    row, column, mask = _piece(size, block)
    gate = tl.load(gate + row * gate_stride + column, mask=mask).to(tl.float32)
    up = tl.load(up + row * up_stride + column, mask=mask).to(tl.float32)
    activated, _ = _activate(gate, form)
    tl.store(output + row * size + column, activated * up, mask=mask)


@triton.jit
def _backward_kernel(
    grad,
    gate,
    up,
    grad_gate,
    grad_up,
    grad_stride,
    gate_stride,
    up_stride,
    output_stride,
    size,
    form: tl.constexpr,
    block: tl.constexpr,
):
    row, column, mask = _piece(size, block)
    grad_output = tl.load(grad + row * grad_stride + column, mask=mask).to(tl.float32)
    gate = tl.load(gate + row * gate_stride + column, mask=mask).to(tl.float32)
    up = tl.load(up + row * up_stride + column, mask=mask).to(tl.float32)
    activated, derivative = _activate(gate, form)
    place = row * output_stride + column
    tl.store(grad_gate + place, grad_output * up * derivative, mask=mask)
    tl.store(grad_up + place, grad_output * activated, mask=mask)


class _Tiling(NamedTuple):
    block: int  # columns of a program
    num_warps: int


def _tiling(size: int) -> _Tiling:
    # 16 bytes of bf16 for each thread and load.
    block = min(1024, max(32, triton.next_power_of_2(size)))
    return _Tiling(block, max(1, block // 256))


def activation_and_mul(gate: torch.Tensor, up: torch.Tensor, form: str) -> torch.Tensor:
    """The activation at the gate, times up; all shape = [rows, size].

    Args:
        gate: rows may be apart.
        up: likewise.
        form: "silu", "gelu" or "gelu_tanh".
    """
    rows, size = gate.shape
    output = gate.new_empty(rows, size)
    if output.numel():
        tiling = _tiling(size)
        grid = (rows * triton.cdiv(size, tiling.block),)
        _forward_kernel[grid](
            gate,
            up,
            output,
            gate.stride(0),
            up.stride(0),
            size,
            form=form,
            **tiling._asdict(),
        )
    return output


def activation_and_mul_backward(
    grad: torch.Tensor, gate: torch.Tensor, up: torch.Tensor, form: str
) -> tuple[torch.Tensor, torch.Tensor]:
    """Gradients of gate and up; all shape = [rows, size]."""
    grad_gate, grad_up = gate.new_empty(gate.shape), up.new_empty(up.shape)
    _backward(grad, gate, up, grad_gate, grad_up, form)
    return grad_gate, grad_up


def _backward(
    grad: torch.Tensor,
    gate: torch.Tensor,
    up: torch.Tensor,
    grad_gate: torch.Tensor,
    grad_up: torch.Tensor,
    form: str,
) -> None:
    """Write both gradients, whose rows are equally far apart."""
    rows, size = grad.shape
    if grad.numel():
        tiling = _tiling(size)
        grid = (rows * triton.cdiv(size, tiling.block),)
        _backward_kernel[grid](
            grad,
            gate,
            up,
            grad_gate,
            grad_up,
            grad.stride(0),
            gate.stride(0),
            up.stride(0),
            grad_gate.stride(0),
            size,
            form=form,
            **tiling._asdict(),
        )


def _of_halves(x: torch.Tensor, form: str) -> torch.Tensor:
    gate, up = x.chunk(2, -1)
    return activation_and_mul(gate, up, form)


def _backward_of_halves(grad: torch.Tensor, x: torch.Tensor, form: str) -> torch.Tensor:
    grad_x = x.new_empty(x.shape)
    (gate, up), (grad_gate, grad_up) = x.chunk(2, -1), grad_x.chunk(2, -1)
    _backward(grad, gate, up, grad_gate, grad_up, form)
    return grad_x


def silu_and_mul(x: torch.Tensor) -> torch.Tensor:
    """shape = [rows, 2 * size] -> [rows, size]."""
    return _of_halves(x, "silu")


def silu_and_mul_backward(grad: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """shape = [rows, size], [rows, 2 * size] -> [rows, 2 * size]."""
    return _backward_of_halves(grad, x, "silu")


def gelu_and_mul(x: torch.Tensor, tanh: bool) -> torch.Tensor:
    """shape = [rows, 2 * size] -> [rows, size]; gelu's tanh form or its erf form."""
    return _of_halves(x, "gelu_tanh" if tanh else "gelu")


def gelu_and_mul_backward(
    grad: torch.Tensor, x: torch.Tensor, tanh: bool
) -> torch.Tensor:
    """shape = [rows, size], [rows, 2 * size] -> [rows, 2 * size]."""
    return _backward_of_halves(grad, x, "gelu_tanh" if tanh else "gelu")
