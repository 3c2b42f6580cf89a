# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""The product of a column-parallel layer, whose backward communicates meanwhile.

Y = X W^T + b on each rank, with W and b this rank's output features and X whole. With
G = dL/dY on a rank:

    dL/dX = sum over ranks of G W,  dL/dW = G^T X,  dL/db = sum over rows of G

The sum over ranks runs while dL/dW is computed. With sequence parallelism the ranks
hold slices of X's rows. The forward gathers them; kept for the backward is the rank's
own slice, which is gathered again while G W is computed, and a rank gets its slice of
the sum.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.autograd.function import once_differentiable
from torch.distributed import ProcessGroup

from vllm.model_executor.determinism.linear.op import linear
from vllm.model_executor.layers.training import communication
from vllm.model_executor.layers.training.collectives import ON_ONE_RANK, process_group
from vllm.model_executor.op_library import (
    autocast_dtype,
    refuse_forward_mode,
)
from vllm.model_executor.parallel_context import ParallelContext

# The dim of a layer's input, [num_tokens, n] or [batch, seq, n], that has the tokens.
SEQUENCE_DIM = -2


def column_parallel_linear(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    context: ParallelContext,
    sequence_parallel: bool = False,
) -> torch.Tensor:
    """x W^T + b with this rank's output features.

    Args:
        x: shape = [..., in_features], equal on all ranks; with sequence_parallel this
            rank's slice of dim -2.
        weight: shape = [out_features of this rank, in_features], dtype of x.
        bias: shape = [out_features of this rank] or None, dtype of x.
        context: Names the tensor-parallel group.
        sequence_parallel: See x.

    Returns:
        shape = [..., out_features of this rank], dim -2 whole; dtype of x, or
        autocast's where that is on.
    """
    group = process_group(context)
    if group is None:
        return linear(x, weight, bias)
    refuse_forward_mode(
        "A column-parallel linear", x, weight, bias, instead=ON_ONE_RANK
    )
    dtype = autocast_dtype(x)
    if dtype is not None and x.dtype != torch.float64:
        # Here, so that autograd casts the gradients back.
        x, weight = x.to(dtype), weight.to(dtype)
        bias = None if bias is None else bias.to(dtype)
    return _ColumnLinear.apply(x, weight, bias, group, sequence_parallel)


class _ColumnLinear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        group: ProcessGroup,
        sequence_parallel: bool,
    ) -> torch.Tensor:
        ctx.save_for_backward(x, weight)
        ctx.group, ctx.sequence_parallel = group, sequence_parallel
        if sequence_parallel:
            x = communication.all_gather(x, group, SEQUENCE_DIM)
        return linear(x, weight, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        needs_x, needs_weight, needs_bias = ctx.needs_input_grad[:3]
        gathers = ctx.sequence_parallel and needs_weight
        if gathers:
            gathered = communication.start_all_gather(x, ctx.group, SEQUENCE_DIM)
        if needs_x:
            partial = grad @ weight
            if ctx.sequence_parallel:
                summed = communication.start_reduce_scatter(
                    partial, ctx.group, SEQUENCE_DIM
                )
            else:
                summed = communication.start_all_reduce(partial, ctx.group)
        grad_weight = None
        rows = grad.reshape(-1, grad.shape[-1])
        if needs_weight:
            whole = gathered() if gathers else x
            grad_weight = rows.t() @ whole.reshape(-1, whole.shape[-1])
        grad_bias = rows.sum(0) if needs_bias else None
        return summed() if needs_x else None, grad_weight, grad_bias, None, None
