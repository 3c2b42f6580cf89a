# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""Gated activations: ops, backward and public functions."""

from __future__ import annotations

from typing import Any

import torch

from vllm.model_executor.layers.training.ops.activation import triton_kernels
from vllm.model_executor.layers.training.ops.activation.reference import (
    gelu_and_mul_reference,
    silu_and_mul_reference,
)
from vllm.model_executor.op_library import (
    define_op,
    from_rows,
    has_kernel,
    refuse_second_derivative_of,
    rows_of,
)


def silu_and_mul(x: torch.Tensor) -> torch.Tensor:
    """silu(gate) * up of gate and up side by side (SwiGLU, arXiv:2002.05202).

    Computed in fp32 and rounded once.

    Args:
        x: shape = [..., 2 * d], gate in the first half; float32, bfloat16 or float16.
            float64 and meta tensors take the specification in plain torch.

    Returns:
        shape = [..., d], dtype of x.

    Raises:
        ValueError: the last dim is odd, or the dtype is not a floating-point one.
    """
    _check("silu_and_mul", x)
    if not has_kernel(x):
        return silu_and_mul_reference(x)
    return from_rows(_silu_and_mul(rows_of(x)), x)


def gelu_and_mul(x: torch.Tensor, tanh: bool) -> torch.Tensor:
    """gelu(gate) * up of gate and up side by side (GeGLU, arXiv:2002.05202).

    Computed in fp32 and rounded once.

    Args:
        x: as in `silu_and_mul`.
        tanh: GELU's approximation with tanh (arXiv:1606.08415) instead of its
            definition with erf.

    Returns:
        shape = [..., d], dtype of x.

    Raises:
        ValueError: as in `silu_and_mul`.
    """
    _check("gelu_and_mul", x)
    if not has_kernel(x):
        return gelu_and_mul_reference(x, tanh)
    return from_rows(_gelu_and_mul(rows_of(x), tanh), x)


def _check(name: str, x: torch.Tensor) -> None:
    if x.ndim < 1 or x.shape[-1] % 2 or not x.is_floating_point():
        raise ValueError(
            f"{name} got an input of shape {tuple(x.shape)} and dtype {x.dtype}; its "
            "last dim must be even, gate and up side by side, and its dtype a "
            "floating-point one."
        )


def _fake(x: torch.Tensor, tanh: bool = False) -> torch.Tensor:
    return x.new_empty(x.shape[0], x.shape[1] // 2)


def _fake_backward(
    grad: torch.Tensor, x: torch.Tensor, tanh: bool = False
) -> torch.Tensor:
    return x.new_empty(x.shape)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
    x, *ctx.options = inputs
    ctx.save_for_backward(x)


def _silu_backward(ctx: Any, grad: torch.Tensor) -> torch.Tensor:
    return _silu_and_mul_backward(rows_of(grad), *ctx.saved_tensors)


def _gelu_backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None]:
    (x,) = ctx.saved_tensors
    return _gelu_and_mul_backward(rows_of(grad), x, *ctx.options), None


_silu_and_mul_backward = define_op(
    "silu_and_mul_backward(Tensor grad, Tensor x) -> Tensor",
    fake=_fake_backward,
    cuda=triton_kernels.silu_and_mul_backward,
    backward=refuse_second_derivative_of("silu_and_mul"),
)
_silu_and_mul = define_op(
    "silu_and_mul(Tensor x) -> Tensor",
    fake=_fake,
    cuda=triton_kernels.silu_and_mul,
    setup_context=_setup_context,
    backward=_silu_backward,
)
_gelu_and_mul_backward = define_op(
    "gelu_and_mul_backward(Tensor grad, Tensor x, bool tanh) -> Tensor",
    fake=_fake_backward,
    cuda=triton_kernels.gelu_and_mul_backward,
    backward=refuse_second_derivative_of("gelu_and_mul"),
)
_gelu_and_mul = define_op(
    "gelu_and_mul(Tensor x, bool tanh) -> Tensor",
    fake=_fake,
    cuda=triton_kernels.gelu_and_mul,
    setup_context=_setup_context,
    backward=_gelu_backward,
)
