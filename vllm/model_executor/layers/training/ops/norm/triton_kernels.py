# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""RMS normalisation on CUDA.

A program holds whole rows in registers, so each tensor is read once and written once.

A row's bits depend on that row alone. The order in which a row is summed is that of
its elements in the threads, and Triton derives this from what it knows at compile time
of shapes, strides and addresses. So it is told the same for every call with a hidden
size: the number of rows and the strides are not specialised, and 16 bytes are read at a
time if and only if the hidden size is a multiple of `_VECTOR`; a tensor whose rows are
not aligned to that is copied first.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from vllm.model_executor.op_library import has_large_shared_memory, rows_of
from vllm.triton_utils import tl, triton

_VECTOR = 8


@triton.jit(do_not_specialize=["rows", "x_stride", "residual_stride"])
def _forward_kernel(
    x,
    residual,
    weight,
    output,
    total,
    rstd,
    rows,
    x_stride,
    residual_stride,
    eps,
    hidden: tl.constexpr,
    vector: tl.constexpr,
    tile_rows: tl.constexpr,
    block: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64) * tile_rows + tl.arange(0, tile_rows)[:, None]
    column = tl.arange(0, block)[None, :]
    mask = (row < rows) & (column < hidden)
    scale = tl.load(weight + column, mask=column < hidden, other=0)
    value = tl.load(x + row * (x_stride * vector) + column, mask=mask, other=0)
    value = value.to(tl.float32)
    if residual is not None:
        residual += row * (residual_stride * vector) + column
        value += tl.load(residual, mask=mask, other=0).to(tl.float32)
        rounded = value.to(total.dtype.element_ty)
        tl.store(total + row * hidden + column, rounded, mask=mask)
        value = rounded.to(tl.float32)
    inverse = tl.rsqrt(tl.sum(value * value, 1, keep_dims=True) / hidden + eps)
    tl.store(rstd + row, inverse, mask=row < rows)
    normal = (value * inverse).to(scale.dtype)
    scaled = (normal.to(tl.float32) * scale.to(tl.float32)).to(scale.dtype)
    tl.store(output + row * hidden + column, scaled, mask=mask)


@triton.jit(do_not_specialize=["rows", "grad_stride", "grad_sum_stride", "x_stride"])
def _backward_kernel(
    grad,
    grad_sum,
    x,
    weight,
    rstd,
    grad_x,
    partial,
    rows,
    grad_stride,
    grad_sum_stride,
    x_stride,
    hidden: tl.constexpr,
    vector: tl.constexpr,
    tile_rows: tl.constexpr,
    block: tl.constexpr,
    stages: tl.constexpr,
):
    program = tl.program_id(0)
    column = tl.arange(0, block)[None, :]
    scale = tl.load(weight + column, mask=column < hidden, other=0).to(tl.float32)
    grad_scale = tl.zeros([tile_rows, block], tl.float32)
    tiles = tl.cdiv(rows, tile_rows)
    for tile in tl.range(program, tiles, tl.num_programs(0), num_stages=stages):
        index = tile * tile_rows + tl.arange(0, tile_rows)
        inverse = tl.load(rstd + index, mask=index < rows, other=0)[:, None]
        row = index.to(tl.int64)[:, None]
        mask = (row < rows) & (column < hidden)
        grad_output = tl.load(
            grad + row * (grad_stride * vector) + column, mask=mask, other=0
        ).to(tl.float32)
        value = tl.load(x + row * (x_stride * vector) + column, mask=mask, other=0)
        normal = value.to(tl.float32) * inverse
        grad_scale += grad_output * normal
        scaled = grad_output * scale
        mean = tl.sum(scaled * normal, 1, keep_dims=True) / hidden
        result = (scaled - normal * mean) * inverse
        if grad_sum is not None:
            result += tl.load(
                grad_sum + row * (grad_sum_stride * vector) + column, mask=mask, other=0
            ).to(tl.float32)
        tl.store(grad_x + row * hidden + column, result, mask=mask)
    partial += program.to(tl.int64) * hidden + column
    tl.store(partial, tl.sum(grad_scale, 0, keep_dims=True), mask=column < hidden)


@triton.jit(do_not_specialize=["rows"])
def _sum_rows_kernel(
    partial, output, rows, hidden, tile_rows: tl.constexpr, block: tl.constexpr
):
    column = tl.program_id(0) * block + tl.arange(0, block)
    total = tl.zeros([tile_rows, block], tl.float32)
    for start in range(0, rows, tile_rows):
        row = start + tl.arange(0, tile_rows)[:, None]
        mask = (row < rows) & (column < hidden)[None, :]
        total += tl.load(partial + row * hidden + column[None, :], mask=mask, other=0)
    tl.store(output + column, tl.sum(total, 0), mask=column < hidden)


class _Tiling(NamedTuple):
    tile_rows: int  # rows a program holds at a time
    block: int  # columns, the hidden size or more
    num_warps: int


def _tiling(hidden: int) -> _Tiling:
    # 16 elements for each thread, more in rows that 32 warps cannot hold so.
    block = max(32, triton.next_power_of_2(hidden))
    tile_rows = max(1, 2048 // block)
    return _Tiling(tile_rows, block, min(32, max(4, block // 512)))


class _Schedule(NamedTuple):
    programs: int  # each with its own partial gradient of the weight
    stages: int  # of the pipeline of loads


def _backward_plan(x: torch.Tensor, fused: bool) -> tuple[_Tiling, _Schedule]:
    # The numbers of programs are constants, not the number of multiprocessors: the bits
    # of the weight's gradient are the same on every GPU. They and the 16 KiB of each
    # tensor that a program holds at a time were the fastest on an H200.
    block = max(32, triton.next_power_of_2(x.shape[-1]))
    tile_bytes = max(16384, block * x.element_size())
    tiling = _Tiling(
        tile_bytes // (block * x.element_size()), block, min(32, max(8, block // 512))
    )
    if tile_bytes > 16384 or not has_large_shared_memory(x.device):
        return tiling, _Schedule(132, 1)
    return tiling, _Schedule(264, 2) if fused else _Schedule(132, 3)


def _vector(hidden: int) -> int:
    return 1 if hidden % _VECTOR else _VECTOR


def _aligned(tensor: torch.Tensor, vector: int) -> torch.Tensor:
    """The tensor, or a copy whose rows begin where `vector` elements can be read."""
    if vector == 1 or (tensor.data_ptr() % 16 == 0 and tensor.stride(0) % vector == 0):
        return tensor
    return tensor.clone(memory_format=torch.contiguous_format)


def _forward(
    x: torch.Tensor,
    residual: torch.Tensor | None,
    weight: torch.Tensor,
    eps: float,
    tiling: _Tiling,
) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor]:
    output = x.new_empty(x.shape)
    total = None if residual is None else x.new_empty(x.shape)
    x, residual = rows_of(x), None if residual is None else rows_of(residual)
    rows, hidden = x.shape
    vector = _vector(hidden)
    rstd = x.new_empty(rows, dtype=torch.float32)
    if rows:
        x, weight = _aligned(x, vector), _aligned(weight[None], vector)
        residual = None if residual is None else _aligned(residual, vector)
        _forward_kernel[(triton.cdiv(rows, tiling.tile_rows),)](
            x,
            residual,
            weight,
            output,
            total,
            rstd,
            rows,
            x.stride(0) // vector,
            0 if residual is None else residual.stride(0) // vector,
            eps,
            hidden=hidden,
            vector=vector,
            **tiling._asdict(),
        )
    return output, total, rstd


def _backward(
    grad: torch.Tensor,
    grad_sum: torch.Tensor | None,
    x: torch.Tensor,
    weight: torch.Tensor,
    rstd: torch.Tensor,
    tiling: _Tiling,
    schedule: _Schedule,
) -> tuple[torch.Tensor, torch.Tensor]:
    grad_x = x.new_empty(x.shape)
    grad, x = rows_of(grad), rows_of(x)
    grad_sum = None if grad_sum is None else rows_of(grad_sum)
    rows, hidden = x.shape
    vector = _vector(hidden)
    if not rows:
        return grad_x, torch.zeros_like(weight)
    grad, x = _aligned(grad, vector), _aligned(x, vector)
    grad_sum = None if grad_sum is None else _aligned(grad_sum, vector)
    programs = min(schedule.programs, triton.cdiv(rows, tiling.tile_rows))
    partial = x.new_empty(programs, hidden, dtype=torch.float32)
    _backward_kernel[(programs,)](
        grad,
        grad_sum,
        x,
        _aligned(weight[None], vector),
        rstd,
        grad_x,
        partial,
        rows,
        grad.stride(0) // vector,
        0 if grad_sum is None else grad_sum.stride(0) // vector,
        x.stride(0) // vector,
        hidden=hidden,
        vector=vector,
        stages=schedule.stages,
        **tiling._asdict(),
    )
    grad_weight = weight.new_empty(hidden)
    _sum_rows_kernel[(triton.cdiv(hidden, 16),)](
        partial, grad_weight, programs, hidden, tile_rows=128, block=16, num_warps=8
    )
    return grad_x, grad_weight


def rms_norm(
    x: torch.Tensor, weight: torch.Tensor, eps: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Normalise rows.

    Args:
        x: shape = [..., hidden]; contiguous, or a matrix of contiguous rows.
        weight: shape = [hidden].
        eps: added to the mean of the squares.

    Returns:
        The output, shape and dtype of x, and the factors 1 / sqrt(mean + eps), shape =
        [rows], fp32, for the backward pass.
    """
    output, _, rstd = _forward(x, None, weight, eps, _tiling(x.shape[-1]))
    return output, rstd


def fused_add_rms_norm(
    x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, eps: float
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """As `rms_norm`, of the rounded sum of x and a residual of x's shape.

    Returns:
        The output, the sum, shape and dtype of x, and the factors.
    """
    output, total, rstd = _forward(x, residual, weight, eps, _tiling(x.shape[-1]))
    assert total is not None
    return output, total, rstd


def rms_norm_backward(
    grad_output: torch.Tensor,
    grad_sum: torch.Tensor | None,
    x: torch.Tensor,
    weight: torch.Tensor,
    rstd: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The gradients of `rms_norm`, or of `fused_add_rms_norm`.

    With n = x * rstd and g = grad_output * weight, both in fp32: grad_x = rstd * (g - n
    * mean(g * n)) + grad_sum, and grad_weight is the sum over rows of grad_output * n.
    Each program sums the rows that are its own in their order, and a second kernel sums
    the programs.

    Args:
        grad_output: shape = [..., hidden], laid out as x in `rms_norm`.
        grad_sum: the gradient that arrives at the sum, likewise; or None.
        x: likewise; the sum, where the norm was fused.
        weight: shape = [hidden].
        rstd: shape = [rows], from the forward pass.

    Returns:
        grad_x, shape and dtype of x, which is the residual's gradient too; grad_weight,
        shape and dtype of weight.
    """
    plan = _backward_plan(x, grad_sum is not None)
    return _backward(grad_output, grad_sum, x, weight, rstd, *plan)
