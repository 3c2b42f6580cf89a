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

    def features(self) -> frozenset[str]:
        """Names of the features in use beyond scale and causality."""
        names = set()
        if self.sliding_window is not None:
            names.add("sliding_window")
        if self.logits_soft_cap is not None:
            names.add("logits_soft_cap")
        return frozenset(names)
