# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""What one call of attention computes, apart from its tensors."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class AttentionSpec:
    """Features of an attention layer.

    Attributes:
        scale: factor on the dot products.
        causal: a query sees keys up to its own position.
        sliding_window: W: a query at position i sees keys at positions above i - W
            (the window counts the query's own position) and, where not causal,
            below i + W. None: no limit.
        logits_soft_cap: C: a scaled dot product s becomes C * tanh(s / C). None: it
            stays.
    """

    scale: float
    causal: bool = True
    sliding_window: int | None = None
    logits_soft_cap: float | None = None

    @property
    def window(self) -> int:
        """The sliding window as kernels take it: 0 means no limit."""
        return self.sliding_window or 0

    @property
    def soft_cap(self) -> float:
        """The soft cap as kernels take it: 0 means none."""
        return self.logits_soft_cap or 0.0


def window_sides(causal: bool, window: int) -> tuple[int | None, int | None]:
    """How many keys before and after its own position a query sees; None: all."""
    if not window:
        return None, None
    return window - 1, 0 if causal else window - 1
