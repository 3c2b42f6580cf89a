# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""Batched products that add up K in order, as `linear.op.linear` adds it.

A row's bits depend on that row and on its own element of the batch alone. On CPU each
element is a product of its own; on CUDA it is vLLM's batch-invariant kernel. With
Y = X W^T for each element of the batch, a loss L and G = dL/dY:

    dL/dX = G W,  dL/dW = G^T X
"""

from __future__ import annotations

from typing import Any

import torch

from vllm.model_executor.determinism.linear import cpu
from vllm.model_executor.op_library import define_op


def batched_linear(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """x W^T for each element of a batch.

    Args:
        x: shape = [B, M, K]; fp32, bf16 or fp16.
        weight: shape = [B, N, K] with N above 1, dtype of x.

    Returns:
        shape = [B, M, N], dtype of x.
    """
    return _batched_linear(x, weight)


def _on_cpu(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    output = _fake(x, weight)
    for element, factor, result in zip(x, weight, output):
        result.copy_(cpu.in_order_linear(element, factor, None))
    return output


def _on_cuda(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    from vllm.model_executor import vllm_internals

    if not (x.numel() and weight.numel()):
        return _fake(x, weight).zero_()
    kernels = vllm_internals.batch_invariant_kernels()
    return kernels.bmm_batch_invariant(x, weight.mT)


def _fake(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    return x.new_empty(*x.shape[:2], weight.shape[1])


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
    x, weight = ctx.saved_tensors
    needs_x, needs_weight = ctx.needs_input_grad
    return (
        torch.bmm(grad, weight) if needs_x else None,
        torch.bmm(grad.mT, x) if needs_weight else None,
    )


_batched_linear = define_op(
    "batched_linear(Tensor x, Tensor weight) -> Tensor",
    fake=_fake,
    cpu=_on_cpu,
    cuda=_on_cuda,
    setup_context=_setup_context,
    backward=_backward,
)
