# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""The sum of each row in an order that depends on the row's length alone.

A row is folded in half until one element is left, so the order is that of a binary
tree. Each fold adds two tensors element by element, which is correctly rounded on every
device; torch's own reductions choose their order by the number of rows, by strides and
by the number of threads. The error grows with log2(n), as that of torch's does.

An op of its own: torch.compile would contract the additions with products before them.
With s = sum over i of x_i and a loss L: dL/dx_i = dL/ds.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from vllm.model_executor.op_library import define_op


def fold(x: torch.Tensor, dim: int) -> torch.Tensor:
    """The sum over a dim of at least one element, which overwrites x."""
    length = x.shape[dim]
    while length > 1:
        half = -(-length // 2)
        rest = length - half
        x.narrow(dim, 0, rest).add_(x.narrow(dim, half, rest))
        length = half
    return x.select(dim, 0)


def _sum(x: torch.Tensor) -> torch.Tensor:
    dtype = torch.promote_types(x.dtype, torch.float32)
    length = x.shape[1]
    if not length:
        return x.new_zeros(x.shape[0], dtype=dtype)
    half = -(-length // 2)
    total = x[:, :half].to(dtype, copy=True)
    total[:, : length - half] += x[:, half:]
    return fold(total, 1).contiguous()


def _fake(x: torch.Tensor) -> torch.Tensor:
    dtype = torch.promote_types(x.dtype, torch.float32)
    return x.new_empty(x.shape[0], dtype=dtype)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
    (x,) = inputs
    ctx.shape, ctx.dtype = x.shape, x.dtype


def _backward(ctx: Any, grad: torch.Tensor) -> torch.Tensor:
    return grad.to(ctx.dtype).unsqueeze(1).expand(ctx.shape)


_row_sum = define_op(
    "row_sum(Tensor x) -> Tensor",
    fake=_fake,
    cpu=_sum,
    cuda=_sum,
    setup_context=_setup_context,
    backward=_backward,
    instead="leave batch-invariant mode",
)


def row_sum(x: torch.Tensor, dims: Sequence[int], keepdim: bool) -> torch.Tensor:
    """The sum over some dims.

    Args:
        x: any shape, floating point.
        dims: dims of x, each once; none: all.
        keepdim: whether they stay, with size 1.

    Returns:
        fp32 (fp64 for fp64), the shape of x without the dims.
    """
    reduced = list(range(x.ndim))
    if x.ndim and dims:
        # With torch's IndexError for a dim that is not there.
        reduced = sorted(dim % x.ndim for dim in dims if x.size(dim) >= 0)
    kept = [dim for dim in range(x.ndim) if dim not in reduced]
    rows = x.permute([*kept, *reduced]).unsqueeze(0)
    shape = rows.shape[1 : 1 + len(kept)]
    rows = rows.flatten(0, len(kept))
    rows = rows.flatten(1) if rows.ndim > 1 else rows.unsqueeze(1)
    total = _row_sum(rows).view(shape)
    if keepdim:
        for dim in reduced:
            total = total.unsqueeze(dim)
    return total
