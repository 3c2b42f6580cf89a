# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""Batched products of which an element's bits depend on its row and column alone.

Any of the sizes but K may be the number of tokens. So the order of a sum does not
depend on them, nor does the kernel:

- On CPU elementwise products are added up as in `row_sum`. oneDNN takes some 0.3 ms
  to prepare each element of the batch, which may be one for each token.
- On CUDA it is vLLM's batch-invariant kernel.

With Y = A B for each element of the batch, a loss L and G = dL/dY:

    dL/dA = G B^T,  dL/dB = A^T G
"""

from __future__ import annotations

from typing import Any

import torch

from vllm.model_executor.determinism.row_sum import fold
from vllm.model_executor.op_library import define_op

# Elementwise products that are held at once; no bit depends on it.
_PRODUCTS = 1 << 20


def batched_matmul(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """A B for each element of a batch.

    Args:
        a: shape = [B, M, K]; fp32, bf16 or fp16.
        b: shape = [B, K, N], dtype of a.

    Returns:
        shape = [B, M, N], dtype of a.
    """
    return _batched_matmul(a, b)


def _on_cpu(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    output = _fake(a, b)
    if not (a.numel() and b.numel()):
        return output.zero_()
    # Products of 16-bit numbers are exact in fp32.
    a, b = a.float().unsqueeze(3), b.float().unsqueeze(1)
    rows = max(1, _PRODUCTS // b[0].numel())
    batches = max(1, rows // a.shape[1])
    for lefts, rights, results in zip(
        a.split(batches), b.split(batches), output.split(batches)
    ):
        for left, result in zip(lefts.split(rows, 1), results.split(rows, 1)):
            result.copy_(fold(left * rights, 2))
    return output


def _on_cuda(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    from vllm.model_executor import vllm_internals

    if not (a.numel() and b.numel()):
        return _fake(a, b).zero_()
    kernels = vllm_internals.batch_invariant_kernels()
    if b.shape[2] > 1:
        return kernels.bmm_batch_invariant(a, b)
    # One column would have tiles of its own.
    return kernels.bmm_batch_invariant(a, b.expand(-1, -1, 2))[..., :1].contiguous()


def _fake(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    return a.new_empty(a.shape[0], a.shape[1], b.shape[2])


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
    a, b = ctx.saved_tensors
    needs_a, needs_b = ctx.needs_input_grad
    return (
        torch.bmm(grad, b.mT) if needs_a else None,
        torch.bmm(a.mT, grad) if needs_b else None,
    )


_batched_matmul = define_op(
    "batched_matmul(Tensor a, Tensor b) -> Tensor",
    fake=_fake,
    cpu=_on_cpu,
    cuda=_on_cuda,
    setup_context=_setup_context,
    backward=_backward,
    instead="leave batch-invariant mode",
)
