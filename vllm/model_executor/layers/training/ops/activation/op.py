# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""Gated activations: ops, backward and public functions."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from vllm.model_executor.layers.training.ops.activation import triton_kernels
from vllm.model_executor.layers.training.ops.activation.reference import (
    gelu_and_mul_reference,
    silu_and_mul_reference,
)
from vllm.model_executor.op_library import (
    define_op,
    described,
    from_rows,
    has_kernel,
    refuse_second_derivative_of,
    rows_of,
)


def silu_and_mul(x: torch.Tensor, up: torch.Tensor | None = None) -> torch.Tensor:
    """silu(gate) * up (SwiGLU, arXiv:2002.05202).

    Computed in fp32 and rounded once. One tensor and two give the same bits.

    Args:
        x: shape = [..., 2 * d], gate in the first half; float32, bfloat16 or float16.
            float64 and meta tensors take the specification in plain torch. With `up`
            the gate alone, shape = [..., d].
        up: shape and dtype of the gate, where gate and up are two tensors.

    Returns:
        shape = [..., d], dtype of x.

    Raises:
        ValueError: the last dim is odd, gate and up differ, or the dtype is not a
            floating-point one.
    """
    if up is not None:
        return _of_two(x, up, "silu")
    _check("silu_and_mul", x)
    if not has_kernel(x):
        return silu_and_mul_reference(x)
    return from_rows(_silu_and_mul(rows_of(x)), x)


def gelu_and_mul(
    x: torch.Tensor, tanh: bool, up: torch.Tensor | None = None
) -> torch.Tensor:
    """gelu(gate) * up (GeGLU, arXiv:2002.05202).

    Computed in fp32 and rounded once. One tensor and two give the same bits.

    Args:
        x: as in `silu_and_mul`.
        tanh: GELU's approximation with tanh (arXiv:1606.08415) instead of its
            definition with erf.
        up: as in `silu_and_mul`.

    Returns:
        shape = [..., d], dtype of x.

    Raises:
        ValueError: as in `silu_and_mul`.
    """
    if up is not None:
        return _of_two(x, up, "gelu_tanh" if tanh else "gelu")
    _check("gelu_and_mul", x)
    if not has_kernel(x):
        return gelu_and_mul_reference(x, tanh)
    return from_rows(_gelu_and_mul(rows_of(x), tanh), x)


def _of_two(gate: torch.Tensor, up: torch.Tensor, form: str) -> torch.Tensor:
    if not gate.is_floating_point() or (
        (gate.shape, gate.dtype, gate.device) != (up.shape, up.dtype, up.device)
    ):
        raise ValueError(
            f"A gated activation got {described(gate=gate, up=up)}; they must have one "
            "shape, device and floating-point dtype."
        )
    if not has_kernel(gate):
        return _one_tensor(form)[2](torch.cat((gate, up), -1))
    return from_rows(_activation_and_mul(rows_of(gate), rows_of(up), form), gate)


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


def _one_tensor(form: str) -> tuple[Callable[..., Any], ...]:
    """Op, backward op and specification for gate and up in one tensor."""
    if form == "silu":
        return _silu_and_mul, _silu_and_mul_backward, silu_and_mul_reference
    tanh = form == "gelu_tanh"
    return (
        lambda x: _gelu_and_mul(x, tanh),
        lambda grad, x: _gelu_and_mul_backward(grad, x, tanh),
        lambda x: gelu_and_mul_reference(x, tanh),
    )


def _cpu_of_two(gate: torch.Tensor, up: torch.Tensor, form: str) -> torch.Tensor:
    op, _, _ = _one_tensor(form)
    return op(torch.cat((gate, up), -1))


def _cpu_backward_of_two(
    grad: torch.Tensor, gate: torch.Tensor, up: torch.Tensor, form: str
) -> tuple[torch.Tensor, torch.Tensor]:
    _, backward, _ = _one_tensor(form)
    grad_gate, grad_up = backward(grad, torch.cat((gate, up), -1)).chunk(2, -1)
    return grad_gate.contiguous(), grad_up.contiguous()


def _fake_of_two(gate: torch.Tensor, up: torch.Tensor, form: str) -> torch.Tensor:
    return gate.new_empty(gate.shape)


def _fake_backward_of_two(
    grad: torch.Tensor, gate: torch.Tensor, up: torch.Tensor, form: str
) -> tuple[torch.Tensor, torch.Tensor]:
    return gate.new_empty(gate.shape), up.new_empty(up.shape)


def _backward_of_two(
    ctx: Any, grad: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, None]:
    gate, up = ctx.saved_tensors
    grads = _activation_and_mul_backward(rows_of(grad), gate, up, ctx.form)
    return *grads, None


def _setup_context_of_two(
    ctx: Any, inputs: tuple[Any, ...], output: torch.Tensor
) -> None:
    gate, up, ctx.form = inputs
    ctx.save_for_backward(gate, up)


_activation_and_mul_backward = define_op(
    "activation_and_mul_backward(Tensor grad, Tensor gate, Tensor up, str form) -> "
    "(Tensor, Tensor)",
    fake=_fake_backward_of_two,
    cpu=_cpu_backward_of_two,
    cuda=triton_kernels.activation_and_mul_backward,
    backward=refuse_second_derivative_of("activation_and_mul"),
)
_activation_and_mul = define_op(
    "activation_and_mul(Tensor gate, Tensor up, str form) -> Tensor",
    fake=_fake_of_two,
    cpu=_cpu_of_two,
    cuda=triton_kernels.activation_and_mul,
    setup_context=_setup_context_of_two,
    backward=_backward_of_two,
)
