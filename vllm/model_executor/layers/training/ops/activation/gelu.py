# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""GELU: torch's own kernels as ops that torch.compile leaves alone.

The compiled engine and the eager trainer then run the same kernel.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F

from vllm.model_executor.op_library import (
    KERNEL_DTYPES,
    define_op,
    refuse_second_derivative_of,
)

# On CPU torch computes elements that do not fill two vector registers by other
# instructions, with other bits: those at the end of each thread's part of a tensor.
# 64 elements are two of AVX-512's registers in 16-bit dtypes.
_WHOLE_VECTORS = 64
# Of more elements than this each thread gets a part in torch's forward.
_MOST_FOR_ONE_THREAD = 16384
# at::internal::GRAIN_SIZE: in torch's backward a thread gets at least as many.
_GRAIN_SIZE = 32768


def gelu(x: torch.Tensor, tanh: bool) -> torch.Tensor:
    """x * P(N <= x) for a standard normal N (arXiv:1606.08415).

    An element's bits do not depend on its place nor on other elements.

    Args:
        x: of any shape; float32, bfloat16 or float16. float64 and meta tensors take
            plain torch.
        tanh: the approximation with tanh instead of the definition with erf.

    Returns:
        shape and dtype of x.

    Raises:
        ValueError: the dtype is not a floating-point one.
    """
    if not x.is_floating_point():
        raise ValueError(
            f"gelu got an input of dtype {x.dtype}; it takes a floating-point one."
        )
    if x.dtype not in KERNEL_DTYPES or x.is_meta:
        return F.gelu(x, approximate=_name(tanh))
    return _gelu(x, tanh)


def _name(tanh: bool) -> str:
    return "tanh" if tanh else "none"


def _in_whole_vectors(x: torch.Tensor, parts: int) -> torch.Tensor:
    """All elements in a row, with zeros behind that make the parts whole vectors."""
    return F.pad(x.reshape(-1), (0, -x.numel() % (parts * _WHOLE_VECTORS)))


def _cpu(x: torch.Tensor, tanh: bool) -> torch.Tensor:
    size = x.numel()
    parts = torch.get_num_threads() if size > _MOST_FOR_ONE_THREAD else 1
    output = F.gelu(_in_whole_vectors(x, parts), approximate=_name(tanh))
    return output[:size].view(x.shape)


def _cpu_backward(grad: torch.Tensor, x: torch.Tensor, tanh: bool) -> torch.Tensor:
    size = x.numel()
    parts = max(1, min(torch.get_num_threads(), math.ceil(size / _GRAIN_SIZE)))
    grad_x = torch.ops.aten.gelu_backward(
        _in_whole_vectors(grad, parts),
        _in_whole_vectors(x, parts),
        approximate=_name(tanh),
    )
    return grad_x[:size].view(x.shape)


def _cuda(x: torch.Tensor, tanh: bool) -> torch.Tensor:
    return F.gelu(x.contiguous(), approximate=_name(tanh))


def _cuda_backward(grad: torch.Tensor, x: torch.Tensor, tanh: bool) -> torch.Tensor:
    return torch.ops.aten.gelu_backward(
        grad.contiguous(), x.contiguous(), approximate=_name(tanh)
    )


def _fake(x: torch.Tensor, tanh: bool) -> torch.Tensor:
    return x.new_empty(x.shape)


def _fake_backward(grad: torch.Tensor, x: torch.Tensor, tanh: bool) -> torch.Tensor:
    return x.new_empty(x.shape)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
    x, ctx.tanh = inputs
    ctx.save_for_backward(x)


def _grads(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None]:
    (x,) = ctx.saved_tensors
    return _gelu_backward(grad, x, ctx.tanh), None


_gelu_backward = define_op(
    "gelu_backward(Tensor grad, Tensor x, bool tanh) -> Tensor",
    fake=_fake_backward,
    cpu=_cpu_backward,
    cuda=_cuda_backward,
    backward=refuse_second_derivative_of("gelu"),
)
_gelu = define_op(
    "gelu(Tensor x, bool tanh) -> Tensor",
    fake=_fake,
    cpu=_cpu,
    cuda=_cuda,
    setup_context=_setup_context,
    backward=_grads,
)
