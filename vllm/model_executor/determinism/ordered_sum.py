# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""The sum of partial results in one order, with one rounding.

An op of its own: torch.compile would leave out the rounding to 16 bits where it fuses
the sum with what reads it.
"""

from __future__ import annotations

import torch

from vllm.model_executor.op_library import define_op


def _sum(parts: torch.Tensor) -> torch.Tensor:
    total = parts[0].to(torch.promote_types(parts.dtype, torch.float32), copy=True)
    for part in parts[1:]:
        total += part
    return total.to(parts.dtype)


def _fake(parts: torch.Tensor) -> torch.Tensor:
    return parts.new_empty(parts.shape[1:])


_ordered_sum = define_op(
    "ordered_sum(Tensor parts) -> Tensor", fake=_fake, cpu=_sum, cuda=_sum
)


def ordered_sum(parts: torch.Tensor) -> torch.Tensor:
    """The sum over the first dim, in its order, in fp32, rounded once.

    Args:
        parts: shape = [n, ...], floating point.

    Returns:
        shape = [...], dtype of parts. It has no gradient of its own: a part's is that
        of the sum, see `collectives.sum_parts_from_group`.
    """
    return _ordered_sum(parts)
