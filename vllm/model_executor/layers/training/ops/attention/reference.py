# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""Specification of attention over packed sequences, in plain torch of any dtype.

Written to be read and differentiated in fp64, sequence by sequence and head by head
with the whole score matrix; no other implementation imports it.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from vllm.model_executor.layers.training.ops.attention.spec import AttentionSpec


def attention_reference(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    seqlens: Sequence[int],
    spec: AttentionSpec,
) -> torch.Tensor:
    """softmax(mask(cap(scale * q k^T))) v within each sequence.

    Query head h reads KV head h // (num_heads // num_kv_heads).

    Args:
        query: shape = [num_tokens, num_heads, head_size]
        key: shape = [num_tokens, num_kv_heads, head_size]
        value: shape = [num_tokens, num_kv_heads, head_size]
        seqlens: length of each sequence, in order; they add up to num_tokens.
        spec: the features.

    Returns:
        shape = [num_tokens, num_heads, head_size], in the query's dtype.
    """
    group = query.shape[1] // key.shape[1]
    outputs = [query[:0]]
    start = 0
    for length in seqlens:
        rows = slice(start, start + length)
        start += length
        visible = visible_keys(length, spec, query.device)
        heads = []
        for head in range(query.shape[1]):
            q, k, v = (
                query[rows, head],
                key[rows, head // group],
                value[rows, head // group],
            )
            scores = q @ k.T * spec.scale
            if spec.logits_soft_cap is not None:
                cap = spec.logits_soft_cap
                scores = cap * torch.tanh(scores / cap)
            scores = scores.masked_fill(~visible, float("-inf"))
            heads.append(torch.softmax(scores, dim=-1) @ v)
        outputs.append(torch.stack(heads, dim=1))
    return torch.cat(outputs)


def visible_keys(
    length: int, spec: AttentionSpec, device: torch.device
) -> torch.Tensor:
    """Which keys each query of one sequence sees.

    Returns:
        bool, shape = [length, length], queries first.
    """
    position = torch.arange(length, device=device)
    ahead = position[None, :] - position[:, None]
    visible = torch.ones(length, length, dtype=torch.bool, device=device)
    if spec.causal:
        visible &= ahead <= 0
    if spec.sliding_window is not None:
        visible &= ahead.abs() < spec.sliding_window
    return visible
