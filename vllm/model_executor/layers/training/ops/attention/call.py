# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""What attention computes, apart from query, key and value, as values."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch


class AttentionSpec(NamedTuple):
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
    def window_sides(self) -> tuple[int | None, int | None]:
        """How many keys before and after its own position a query sees; None: all."""
        if not self.sliding_window:
            return None, None
        before = self.sliding_window - 1
        return before, 0 if self.causal else before


class AttentionCall(NamedTuple):
    """One call of attention.

    A kernel takes it whole. A torch op takes the values in it: `flat` returns them in
    the order of FLAT_FIELDS, and `of_flat` restores the call.

    Attributes:
        spec: the layer's features.
        cu_seqlens: where the sequences begin and end, int32, contiguous,
            shape = [num_seqs + 1], from 0 to num_tokens.
        max_seqlen: no sequence is longer.
        sinks: one more score of every query of a head, whose value is zero;
            contiguous, shape = [num_heads]. None: none.
        alibi_slopes: of each head, fp32, contiguous, shape = [num_heads]. None: none.
        implementation: name in the table of implementations; empty: its first that can.
        deterministic: gradients are equal bit for bit from run to run.
        batch_invariant: the output has the bits of a batch-invariant engine.
    """

    spec: AttentionSpec
    cu_seqlens: torch.Tensor
    max_seqlen: int
    sinks: torch.Tensor | None = None
    alibi_slopes: torch.Tensor | None = None
    implementation: str = ""
    deterministic: bool = False
    batch_invariant: bool = False

    @property
    def tensors(self) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None]:
        """What a backward saves apart from the other fields."""
        return self.cu_seqlens, self.sinks, self.alibi_slopes

    def with_tensors(
        self, cu_seqlens: Any, sinks: Any, alibi_slopes: Any
    ) -> AttentionCall:
        """The call with other `tensors`, or with None in their place."""
        return self._replace(
            cu_seqlens=cu_seqlens, sinks=sinks, alibi_slopes=alibi_slopes
        )

    @classmethod
    def of_flat(cls, *fields: Any) -> AttentionCall:
        """Restore a call from what `flat` returned."""
        size = len(AttentionSpec._fields)
        return cls(AttentionSpec(*fields[:size]), *fields[size:])

    def flat(self) -> tuple[Any, ...]:
        """The fields, with those of the spec in its place."""
        return *self.spec, *self[1:]


FLAT_FIELDS = (*AttentionSpec._fields, *AttentionCall._fields[1:])
FLAT_SCHEMA = (
    "float scale, bool causal, int? sliding_window, float? logits_soft_cap, "
    "Tensor cu_seqlens, SymInt max_seqlen, Tensor? sinks, Tensor? alibi_slopes, "
    "str implementation, bool deterministic, bool batch_invariant"
)
