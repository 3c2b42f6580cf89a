# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""Layer normalisation: torch's own kernels as ops that torch.compile leaves alone.

The compiled engine and the eager trainer then run the same kernel.
"""

from __future__ import annotations

from typing import Any

import torch

from vllm.model_executor.layers.training.ops.norm.arguments import check
from vllm.model_executor.layers.training.ops.norm.reference import layer_norm_reference
from vllm.model_executor.op_library import (
    define_op,
    from_rows,
    refuse_second_derivative_of,
    rows_of,
)


def layer_norm(
    x: torch.Tensor,
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    eps: float,
) -> torch.Tensor:
    """(x - mean) / sqrt(variance + eps) * weight + bias (arXiv:1607.06450).

    Mean and variance are over the last dim, in fp32. If the parameters have another
    dtype than x, all is computed in the dtype that they promote to.

    Args:
        x: shape = [..., hidden_size].
        weight: shape = [hidden_size]; None: ones.
        bias: shape = [hidden_size]; None: zeros.
        eps: added to the variance.

    Returns:
        shape and dtype of x.

    Raises:
        ValueError: arguments that do not fit each other.
    """
    check("layer_norm", x, weight=weight, bias=bias)
    dtype = x.dtype
    for parameter in (weight, bias):
        dtype = (
            dtype if parameter is None else torch.promote_types(dtype, parameter.dtype)
        )
    wide = x.to(dtype)
    weight = None if weight is None else weight.to(dtype)
    bias = None if bias is None else bias.to(dtype)
    if dtype == torch.float64 or x.is_meta:
        return layer_norm_reference(wide, weight, bias, eps).to(x.dtype)
    output, _, _ = _layer_norm(rows_of(wide), weight, bias, eps)
    return from_rows(output, x).to(x.dtype)


def _forward(
    x: torch.Tensor,
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    eps: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    return torch.ops.aten.native_layer_norm(x, x.shape[1:], weight, bias, eps)


def _fake(
    x: torch.Tensor,
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    eps: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    # torch keeps the statistics in x's dtype on CPU.
    dtype = x.dtype if x.device.type == "cpu" else torch.float32
    mean, rstd = (x.new_empty(x.shape[0], 1, dtype=dtype) for _ in range(2))
    return x.new_empty(x.shape), mean, rstd


def _backward(
    grad: torch.Tensor,
    x: torch.Tensor,
    mean: torch.Tensor,
    rstd: torch.Tensor,
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    given = [True, weight is not None, bias is not None]
    grads = torch.ops.aten.native_layer_norm_backward(
        grad, x, x.shape[1:], mean, rstd, weight, bias, given
    )
    grad_x, *of_parameters = grads
    grad_weight, grad_bias = (
        x.new_empty(0) if grad is None else grad for grad in of_parameters
    )
    return grad_x, grad_weight, grad_bias


def _fake_backward(
    grad: torch.Tensor,
    x: torch.Tensor,
    mean: torch.Tensor,
    rstd: torch.Tensor,
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    grad_weight, grad_bias = (
        x.new_empty(0) if p is None else p.new_empty(p.shape) for p in (weight, bias)
    )
    return x.new_empty(x.shape), grad_weight, grad_bias


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    x, weight, bias, _ = inputs
    _, mean, rstd = output
    ctx.save_for_backward(x, mean, rstd, weight, bias)
    ctx.mark_non_differentiable(mean, rstd)
    # No zeros for the gradients of mean and rstd.
    ctx.set_materialize_grads(False)


def _grads(
    ctx: Any, grad: torch.Tensor | None, *_: None
) -> tuple[torch.Tensor | None, ...]:
    if grad is None:
        return (None,) * 4
    # Once: reading them twice is an error under activation checkpointing.
    *saved, weight, bias = ctx.saved_tensors
    grad_x, *grads = _layer_norm_backward(rows_of(grad), *saved, weight, bias)
    grads = (None if p is None else grad for p, grad in zip((weight, bias), grads))
    return grad_x, *grads, None


_layer_norm_backward = define_op(
    "layer_norm_backward(Tensor grad, Tensor x, Tensor mean, Tensor rstd, "
    "Tensor? weight, Tensor? bias) -> (Tensor, Tensor, Tensor)",
    fake=_fake_backward,
    cpu=_backward,
    cuda=_backward,
    backward=refuse_second_derivative_of("layer_norm"),
)
_layer_norm = define_op(
    "layer_norm(Tensor x, Tensor? weight, Tensor? bias, float eps) "
    "-> (Tensor, Tensor, Tensor)",
    fake=_fake,
    cpu=_forward,
    cuda=_forward,
    setup_context=_setup_context,
    backward=_grads,
)
