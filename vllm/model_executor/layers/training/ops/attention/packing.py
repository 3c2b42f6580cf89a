# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""Runs a function of one sequence over packed sequences."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from vllm.model_executor.layers.training.ops.attention.spec import AttentionSpec

OneSequence = Callable[
    [torch.Tensor, torch.Tensor, torch.Tensor, AttentionSpec], torch.Tensor
]


def each_sequence(
    function: OneSequence,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    seqlens: Sequence[int],
    spec: AttentionSpec,
) -> torch.Tensor:
    """Apply a function to each sequence that is not empty.

    One split and one concatenation, whose backwards are one of the other: memory and
    time stay proportional to the tokens, whatever the number of sequences.

    Args:
        function: attention of one sequence of at least one token.
        query: shape = [num_tokens, num_heads, head_size]
        key: shape = [num_tokens, num_kv_heads, head_size]
        value: shape = [num_tokens, num_kv_heads, head_size]
        seqlens: length of each sequence, in order; they add up to num_tokens.
        spec: the features.

    Returns:
        shape = [num_tokens, num_heads, head_size]; it depends on all inputs even
        where there are no tokens, so that each has a gradient.
    """
    lengths = [length for length in seqlens if length]
    if not lengths:
        return query + key.sum() + value.sum()
    pieces = zip(
        query.split(lengths), key.split(lengths), value.split(lengths), strict=True
    )
    return torch.cat([function(q, k, v, spec) for q, k, v in pieces])
