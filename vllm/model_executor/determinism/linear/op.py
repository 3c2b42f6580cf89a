# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""Matrix products with weights: op, backward and public function.

With Y = X W^T + b and a loss L, G = dL/dY:

    dL/dX = G W,  dL/dW = G^T X,  dL/db = sum over rows of G

X and W are kept for it. The gradients are plain products: only the forward has to have
the engine's bits.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F

from vllm.model_executor.determinism.linear import cpu, gpu
from vllm.model_executor.determinism.mode import is_batch_invariant
from vllm.model_executor.op_library import (
    KERNEL_DTYPES,
    autocast_dtype,
    define_op,
    described,
    from_rows,
    rows_of,
)


def linear(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None
) -> torch.Tensor:
    """x W^T + b, as `torch.nn.functional.linear`.

    In batch-invariant mode a row's bits depend on the row alone and are those of the
    engine in that mode: every product adds up K in one fixed order. float64 and the
    meta device have no such kernel and run torch's in either mode.

    Args:
        x: shape = [..., in_features], floating point.
        weight: shape = [out_features, in_features], dtype of x.
        bias: shape = [out_features] or None, dtype of x.

    Returns:
        shape = [..., out_features], dtype of x, or autocast's where that is on.

    Raises:
        ValueError: in the mode, shapes, dtypes or devices that do not fit; otherwise
            torch raises.
    """
    if not is_batch_invariant() or x.is_meta:
        return F.linear(x, weight, bias)
    dtype = autocast_dtype(x)
    if dtype is not None and x.dtype != torch.float64:
        x, weight = x.to(dtype), weight.to(dtype)
        bias = None if bias is None else bias.to(dtype)
    if x.dtype not in KERNEL_DTYPES:
        return F.linear(x, weight, bias)
    _check(x, weight, bias)
    return from_rows(_linear(rows_of(x), weight, bias), x)


def sees_rows_at_run_time() -> bool:
    """Whether the mode's GEMM on this machine chooses its kernel when it runs.

    A compiler does not look into the op, so that the number of rows for which a model
    was compiled or captured does not decide about the kernel.
    """
    return torch.cuda.is_available() and torch._C._dispatch_has_kernel_for_dispatch_key(
        _linear.name(), "CUDA"
    )


def _check(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> None:
    if (
        weight.ndim == 2
        and x.shape[-1] == weight.shape[1]
        and (x.dtype, x.device) == (weight.dtype, weight.device)
        and (bias is None or bias.shape == weight.shape[:1])
        and (bias is None or (bias.dtype, bias.device) == (x.dtype, x.device))
    ):
        return
    raise ValueError(
        "A linear layer takes x of shape [..., K], a weight of shape [N, K] and a bias "
        "of shape [N], of one dtype and on one device; got "
        f"{described(x=x, weight=weight, bias=bias)}."
    )


def _fake(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None
) -> torch.Tensor:
    return x.new_empty(x.shape[0], weight.shape[0])


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
    x, weight, _ = inputs
    ctx.save_for_backward(x, weight)


def _backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
    x, weight = ctx.saved_tensors
    needs_x, needs_weight, needs_bias = ctx.needs_input_grad
    return (
        grad @ weight if needs_x else None,
        grad.t() @ x if needs_weight else None,
        grad.sum(0) if needs_bias else None,
    )


_linear = define_op(
    "linear(Tensor x, Tensor weight, Tensor? bias) -> Tensor",
    fake=_fake,
    cpu=cpu.in_order_linear,
    cuda=gpu.in_order_linear,
    setup_context=_setup_context,
    backward=_backward,
)
