# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""RMS normalisation: ops, backward and public functions.

    s = x + residual    rstd = 1 / sqrt(mean(s²) + eps)    n = s rstd    y = n weight

With g = dy weight the gradients are ds = rstd (g - n mean(g n)), to which that of the
second result, the sum, is added, and dweight = sum over rows of dy n.
"""

from __future__ import annotations

import math
from typing import Any

import torch

from vllm.model_executor.layers.training.ops.norm import triton_kernels
from vllm.model_executor.layers.training.ops.norm.arguments import check
from vllm.model_executor.layers.training.ops.norm.reference import (
    fused_add_rms_norm_reference,
    rms_norm_reference,
)
from vllm.model_executor.op_library import (
    define_op,
    has_kernel,
    refuse_second_derivative_of,
    rows_of,
)


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """x / sqrt(mean(x²) + eps) * weight (arXiv:1910.07467).

    The normalised value is computed in fp32, rounded to the weight's dtype, multiplied
    by the weight, rounded to the weight's dtype and then to x's.

    Args:
        x: shape = [..., hidden_size]; float32, bfloat16 or float16. float64 and meta
            tensors take the specification in plain torch.
        weight: shape = [hidden_size], one of these dtypes.
        eps: added to the mean of the squares.

    Returns:
        shape and dtype of x.

    Raises:
        ValueError: arguments that do not fit each other.
    """
    check("rms_norm", x, weight=weight)
    if not (has_kernel(x) and has_kernel(weight)):
        return rms_norm_reference(x, weight, eps)
    output, _ = _rms_norm(_with_rows(x), weight.contiguous(), eps)
    return output


def fused_add_rms_norm(
    x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, eps: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """`rms_norm` of x + residual, and the sum: the bits of the two one by one.

    So it does not show in the numbers where a model is cut into pipeline stages, or
    whether a definition adds and normalises in two lines.

    Args:
        x: as in `rms_norm`.
        residual: shape of x. If its dtype is another, as under autocast, both are
            first cast to the dtype that they promote to.
        weight: as in `rms_norm`.
        eps: likewise.

    Returns:
        The normalised sum and the sum, both of x's shape and dtype.

    Raises:
        ValueError: arguments that do not fit each other.
    """
    check("fused_add_rms_norm", x, residual, weight=weight)
    dtype = torch.promote_types(x.dtype, residual.dtype)
    wide, residual = x.to(dtype), residual.to(dtype)
    if has_kernel(wide) and has_kernel(weight):
        output, total, _ = _fused_add_rms_norm(
            _with_rows(wide), _with_rows(residual), weight.contiguous(), eps
        )
    else:
        output, total = fused_add_rms_norm_reference(wide, residual, weight, eps)
    return output.to(x.dtype), total.to(x.dtype)


def _with_rows(x: torch.Tensor) -> torch.Tensor:
    """The tensor as the ops take it: contiguous, or a matrix of contiguous rows.

    They take any number of dims, so that no result, of which the backward keeps the
    sum, is a view: see `from_rows`.
    """
    return rows_of(x) if x.ndim == 2 else x.contiguous()


def _rstd_of(x: torch.Tensor) -> torch.Tensor:
    return x.new_empty(math.prod(x.shape[:-1]), dtype=torch.float32)


def _fake_rms_norm(
    x: torch.Tensor, weight: torch.Tensor, eps: float
) -> tuple[torch.Tensor, torch.Tensor]:
    return x.new_empty(x.shape), _rstd_of(x)


def _fake_fused_add_rms_norm(
    x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, eps: float
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    return x.new_empty(x.shape), x.new_empty(x.shape), _rstd_of(x)


def _fake_backward(
    grad_output: torch.Tensor,
    grad_sum: torch.Tensor | None,
    x: torch.Tensor,
    weight: torch.Tensor,
    rstd: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    return x.new_empty(x.shape), weight.new_empty(weight.shape)


def _setup_rms_norm(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    x, weight, _ = inputs
    _, rstd = output
    ctx.save_for_backward(x, weight, rstd)
    ctx.mark_non_differentiable(rstd)
    ctx.set_materialize_grads(False)


def _setup_fused_add_rms_norm(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    _, _, weight, _ = inputs
    _, total, rstd = output
    ctx.save_for_backward(total, weight, rstd)
    ctx.mark_non_differentiable(rstd)
    ctx.set_materialize_grads(False)


def _backward(
    ctx: Any, grad_output: torch.Tensor | None, grad_sum: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor]:
    x, weight, rstd = ctx.saved_tensors
    # None: nothing depends on that result.
    grad_output = torch.zeros_like(x) if grad_output is None else grad_output
    grad_sum = None if grad_sum is None else _with_rows(grad_sum)
    return _rms_norm_backward(_with_rows(grad_output), grad_sum, x, weight, rstd)


def _rms_norm_grads(
    ctx: Any, grad_output: torch.Tensor | None, _: None
) -> tuple[torch.Tensor | None, ...]:
    return *_backward(ctx, grad_output, None), None


def _fused_add_rms_norm_grads(
    ctx: Any,
    grad_output: torch.Tensor | None,
    grad_sum: torch.Tensor | None,
    _: None,
) -> tuple[torch.Tensor | None, ...]:
    grad_x, grad_weight = _backward(ctx, grad_output, grad_sum)
    return grad_x, grad_x, grad_weight, None


_rms_norm_backward = define_op(
    "rms_norm_backward(Tensor grad_output, Tensor? grad_sum, Tensor x, Tensor weight, "
    "Tensor rstd) -> (Tensor, Tensor)",
    fake=_fake_backward,
    cuda=triton_kernels.rms_norm_backward,
    backward=refuse_second_derivative_of("rms_norm"),
)
_rms_norm = define_op(
    "rms_norm(Tensor x, Tensor weight, float eps) -> (Tensor, Tensor)",
    fake=_fake_rms_norm,
    cuda=triton_kernels.rms_norm,
    setup_context=_setup_rms_norm,
    backward=_rms_norm_grads,
)
_fused_add_rms_norm = define_op(
    "fused_add_rms_norm(Tensor x, Tensor residual, Tensor weight, float eps) "
    "-> (Tensor, Tensor, Tensor)",
    fake=_fake_fused_add_rms_norm,
    cuda=triton_kernels.fused_add_rms_norm,
    setup_context=_setup_fused_add_rms_norm,
    backward=_fused_add_rms_norm_grads,
)
