# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""From logits to their gradient in one pass: the op."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch

from vllm.model_executor.layers.training.ops.logprobs import triton_kernels
from vllm.model_executor.layers.training.ops.logprobs.reference import (
    logits_gradient_reference,
)
from vllm.model_executor.op_library import define_op, has_kernel


class RowNumbers(NamedTuple):
    """What the gradient of rows of logits takes, one number a row.

    Each has shape = [num_tokens], and all but targets are fp32, or fp64 for fp64
    logits. A torch op takes them in this order, which is that of ROWS_SCHEMA.

    Attributes:
        lse: logarithm of the sum of exp(logits / temperature) over the whole
            vocabulary.
        targets: int64 column of each target, or a number outside where the target is
            not among the columns.
        grad: of the logprobs, divided by temperature.
        entropy: None without grad_entropy.
        grad_entropy: of the entropies, divided by temperature; None for zeros.
        temperature: divides the logits; None for 1.
    """

    lse: torch.Tensor
    targets: torch.Tensor
    grad: torch.Tensor
    entropy: torch.Tensor | None
    grad_entropy: torch.Tensor | None
    temperature: torch.Tensor | None

    @classmethod
    def of_gradients(
        cls,
        saved: Sequence[Any],
        grad: torch.Tensor | None,
        grad_entropy: torch.Tensor | None,
    ) -> RowNumbers:
        """From the gradients that autograd gives.

        Args:
            saved: targets, temperature, entropy and lse; temperature and entropy may
                be None.
            grad: of the logprobs; None for zeros.
            grad_entropy: of the entropies; None for zeros.
        """
        targets, temperature, entropy, lse = saved

        def divided(grad: torch.Tensor) -> torch.Tensor:
            return (grad if temperature is None else grad / temperature).contiguous()

        return cls(
            lse,
            targets,
            torch.zeros_like(lse) if grad is None else divided(grad),
            None if grad_entropy is None else entropy,
            None if grad_entropy is None else divided(grad_entropy),
            temperature,
        )

    def of_rows(self, rows: slice) -> RowNumbers:
        """Those of some rows."""
        chosen: Any = (None if each is None else each[rows] for each in self)
        return RowNumbers(*chosen)


ROWS_SCHEMA = (
    "Tensor lse, Tensor targets, Tensor grad, Tensor? entropy, Tensor? grad_entropy, "
    "Tensor? temperature"
)


def logits_gradient(
    logits: torch.Tensor, numbers: RowNumbers, dtype: torch.dtype
) -> torch.Tensor:
    """Gradient of the logits from those of logprobs and entropy, times temperature.

    With y = logits / temperature - lse and p = exp(y) it is

        grad (onehot(targets) - p) - grad_entropy p (y + entropy)

    Computed in fp32 and rounded once.

    Args:
        logits: shape = [num_tokens, columns], columns of neighbouring tokens of the
            vocabulary; rows are contiguous.
        numbers: of these tokens.
        dtype: of the result: that of logits, or torch.float32.

    Returns:
        shape = [num_tokens, columns]
    """
    function = _logits_gradient if has_kernel(logits) else logits_gradient_reference
    return function(logits, *numbers, dtype)


def _fake(logits: torch.Tensor, *arguments: Any) -> torch.Tensor:
    return logits.new_empty(logits.shape, dtype=arguments[-1])


_logits_gradient = define_op(
    f"logits_gradient(Tensor logits, {ROWS_SCHEMA}, ScalarType dtype) -> Tensor",
    fake=_fake,
    cuda=triton_kernels.logits_gradient,
)
