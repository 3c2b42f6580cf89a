# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""Products of groups of rows, each with a matrix of its own.

Experts multiply the tokens that chose them. Each group is an in-order product of its
own. On CUDA torch's grouped kernel has the same bits in bf16 and is taken instead.

With Y_g = X_g W_g for each group g, a loss L and G = dL/dY:

    dL/dX_g = G_g W_g^T,  dL/dW_g = X_g^T G_g
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any

import torch

from vllm.model_executor.determinism.linear.op import linear
from vllm.model_executor.op_library import define_op


def grouped_matmul(
    x: torch.Tensor, weights: torch.Tensor, ends: torch.Tensor
) -> torch.Tensor:
    """X_g W_g for each group of rows.

    Args:
        x: Rows by group, shape = [num_rows, K]; fp32, bf16 or fp16.
        weights: shape = [groups, K, N], dtype of x.
        ends: Where each group's rows end, torch.int32, shape = [groups].

    Returns:
        shape = [num_rows, N], dtype of x; rows behind the last group are zero.
    """
    return _grouped_matmul(x, weights, ends)


def _groups(ends: torch.Tensor) -> Iterator[tuple[int, slice]]:
    bounds = [0, *ends.tolist()]
    for group, (begin, end) in enumerate(itertools.pairwise(bounds)):
        if end > begin:
            yield group, slice(begin, end)


def _one_by_one(
    x: torch.Tensor, weights: torch.Tensor, ends: torch.Tensor
) -> torch.Tensor:
    output = x.new_zeros(x.shape[0], weights.shape[2])
    for group, rows in _groups(ends):
        output[rows] = linear(x[rows], weights[group].mT)
    return output


def _fake(x: torch.Tensor, weights: torch.Tensor, ends: torch.Tensor) -> torch.Tensor:
    return x.new_empty(x.shape[0], weights.shape[2])


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
    x, weights, ends = ctx.saved_tensors
    needs_x, needs_weights, _ = ctx.needs_input_grad
    grad_x = torch.zeros_like(x) if needs_x else None
    grad_weights = torch.zeros_like(weights) if needs_weights else None
    for group, rows in _groups(ends):
        if grad_x is not None:
            grad_x[rows] = grad[rows] @ weights[group].mT
        if grad_weights is not None:
            grad_weights[group] = x[rows].mT @ grad[rows]
    return grad_x, grad_weights, None


_grouped_matmul = define_op(
    "grouped_matmul(Tensor x, Tensor weights, Tensor ends) -> Tensor",
    fake=_fake,
    cpu=_one_by_one,
    cuda=_one_by_one,
    setup_context=_setup_context,
    backward=_backward,
    instead="leave batch-invariant mode",
)
