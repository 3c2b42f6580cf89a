# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""Attention in plain torch with a mask, for features that no tiled kernel has.

It holds one sequence's score matrix of [num_heads, length, length] at a time, in
fp32 or wider.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from vllm.model_executor.layers.training.ops.attention.packing import each_sequence
from vllm.model_executor.layers.training.ops.attention.spec import AttentionSpec

NAME = "plain torch with a mask"
FEATURES = frozenset({"sliding_window", "logits_soft_cap"})


def attention_masked(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    seqlens: Sequence[int],
    spec: AttentionSpec,
) -> torch.Tensor:
    """Attention within each sequence; arguments as in `attention_reference`."""
    return each_sequence(_one_sequence, query, key, value, seqlens, spec)


def _one_sequence(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, spec: AttentionSpec
) -> torch.Tensor:
    length, num_heads, head_size = q.shape
    num_kv_heads = k.shape[1]
    dtype = q.dtype
    compute_dtype = torch.promote_types(dtype, torch.float32)
    # [num_kv_heads, group, length, head_size] against [num_kv_heads, 1, length, ...]
    q = (
        q.to(compute_dtype)
        .view(length, num_kv_heads, -1, head_size)
        .permute(1, 2, 0, 3)
    )
    k, v = (t.to(compute_dtype).transpose(0, 1).unsqueeze(1) for t in (k, v))
    scores = q @ k.transpose(-1, -2) * spec.scale
    if spec.logits_soft_cap is not None:
        scores = torch.tanh(scores / spec.logits_soft_cap) * spec.logits_soft_cap
    hidden = _hidden_keys(length, spec, q.device)
    if hidden is not None:
        scores = scores.masked_fill(hidden, float("-inf"))
    output = torch.softmax(scores, dim=-1) @ v
    return output.permute(2, 0, 1, 3).reshape(length, num_heads, head_size).to(dtype)


def _hidden_keys(
    length: int, spec: AttentionSpec, device: torch.device
) -> torch.Tensor | None:
    """bool, shape = [length, length]: keys (second dim) that a query does not see."""
    if not spec.causal and spec.sliding_window is None:
        return None
    after = 0 if spec.causal else length
    before = length
    if spec.sliding_window is not None:
        before = spec.sliding_window - 1
        after = min(after, before)
    seen = torch.ones(length, length, dtype=torch.bool, device=device)
    return ~seen.tril(after).triu(-before)
