# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""From logits to their gradient in one pass: the op."""

from __future__ import annotations

from typing import Any

import torch

from vllm.model_executor.layers.training.ops.logprobs import triton_kernels
from vllm.model_executor.layers.training.ops.logprobs.reference import (
    logits_gradient_reference,
)
from vllm.model_executor.op_library import define_op, has_kernel


def logits_gradient(
    logits: torch.Tensor,
    lse: torch.Tensor,
    targets: torch.Tensor,
    grad: torch.Tensor,
    entropy: torch.Tensor | None,
    grad_entropy: torch.Tensor | None,
    temperature: torch.Tensor | None,
    dtype: torch.dtype,
) -> torch.Tensor:
    """Gradient of the logits from those of logprobs and entropy, times temperature.

    With y = logits / temperature - lse and p = exp(y) it is

        grad (onehot(targets) - p) - grad_entropy p (y + entropy)

    Computed in fp32 and rounded once.

    Args:
        logits: shape = [num_tokens, columns], columns of neighbouring tokens of the
            vocabulary; rows are contiguous.
        lse: logarithm of the sum of exp(logits / temperature) over the whole
            vocabulary; fp32 (fp64 for fp64 logits) as are all below, shape =
            [num_tokens].
        targets: int64 column of each target, or a number outside where the target is
            not among the columns, shape = [num_tokens].
        grad: shape = [num_tokens]
        entropy: shape = [num_tokens]; None without grad_entropy.
        grad_entropy: shape = [num_tokens] or None for zeros.
        temperature: divides the logits, shape = [num_tokens]; None for 1.
        dtype: of the result: that of logits, or torch.float32.

    Returns:
        shape = [num_tokens, columns]
    """
    function = _logits_gradient if has_kernel(logits) else logits_gradient_reference
    return function(
        logits, lse, targets, grad, entropy, grad_entropy, temperature, dtype
    )


def _fake(logits: torch.Tensor, *arguments: Any) -> torch.Tensor:
    return logits.new_empty(logits.shape, dtype=arguments[-1])


_logits_gradient = define_op(
    "logits_gradient(Tensor logits, Tensor lse, Tensor targets, Tensor grad, "
    "Tensor? entropy, Tensor? grad_entropy, Tensor? temperature, ScalarType dtype) "
    "-> Tensor",
    fake=_fake,
    cuda=triton_kernels.logits_gradient,
)
