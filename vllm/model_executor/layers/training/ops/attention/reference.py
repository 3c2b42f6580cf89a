# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""Specification of attention over packed sequences, in plain torch of any dtype.

Holds the whole score matrix of one sequence at a time. `forward` and `backward` are
what computes where there is no kernel: in fp64, and on CPU without the extension.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch

from vllm.model_executor.layers.training.ops.attention.call import (
    AttentionCall,
    AttentionSpec,
)


def attention_reference(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    cu_seqlens: torch.Tensor,
    sinks: torch.Tensor | None = None,
    alibi_slopes: torch.Tensor | None = None,
    *,
    scale: float,
    causal: bool = True,
    window: int | None = None,
    soft_cap: float | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """softmax(mask(cap(scale * q k^T) - slope * |i - j|)) v within each sequence.

    Query head h reads KV head h // (num_heads // num_kv_heads). A sink is one more
    score of every query of its head; its value is zero (arXiv:2508.10925). ALiBi:
    arXiv:2108.12409.

    Args:
        query: shape = [num_tokens, num_heads, head_size]
        key: shape = [num_tokens, num_kv_heads, head_size]
        value: like key.
        cu_seqlens: int32, shape = [num_seqs + 1], from 0 to num_tokens.
        sinks: shape = [num_heads]
        alibi_slopes: shape = [num_heads]
        scale: factor on the dot products.
        causal: a query sees keys up to its own position.
        window: a query sees keys less than this far away; None: all.
        soft_cap: C: a scaled dot product s becomes C * tanh(s / C); None: it stays.

    Returns:
        The output in the query's shape, and the logarithm of the sum of each softmax,
        sink included, shape = [num_heads, num_tokens]; both in the query's dtype, in
        which everything is computed.
    """
    spec = AttentionSpec(scale, causal, window, soft_cap)
    num_heads, num_kv_heads = query.shape[1], key.shape[1]
    outputs, lses = [query[:0]], [query.new_empty(num_heads, 0)]
    for rows in _sequences(cu_seqlens):
        q, k, v = (_grouped(t[rows], num_kv_heads) for t in (query, key, value))
        scores = _scores(q, k, spec, alibi_slopes)
        if sinks is not None:
            column = sinks.to(q.dtype).view(num_kv_heads, -1, 1, 1)
            scores = torch.cat((scores, column.expand(*scores.shape[:3], 1)), dim=-1)
        weights = scores.softmax(-1)[..., : k.shape[2]]
        outputs.append(_packed(weights @ v))
        lses.append(scores.logsumexp(-1).flatten(0, 1))
    return torch.cat(outputs), torch.cat(lses, dim=1)


def forward(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, call: AttentionCall
) -> tuple[torch.Tensor, torch.Tensor]:
    """`attention_reference` in fp32, or in fp64 if the inputs are.

    Returns:
        The output in the query's dtype, and lse in fp32 or fp64.
    """
    spec = call.spec
    q, k, v = _widened(query, key, value)
    output, lse = attention_reference(
        q,
        k,
        v,
        call.cu_seqlens,
        call.sinks,
        call.alibi_slopes,
        scale=spec.scale,
        causal=spec.causal,
        window=spec.sliding_window,
        soft_cap=spec.logits_soft_cap,
    )
    return output.to(query.dtype), lse


def backward(
    grad_output: torch.Tensor,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    output: torch.Tensor,
    lse: torch.Tensor,
    call: AttentionCall,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gradients of query, key and value, from the results of any forward.

    With P = exp(S - lse) and delta the row sums of dO * O: dV = P^T dO and
    dS = P * (dO V^T - delta) (arXiv:2205.14135, appendix B), times the derivative of
    the soft cap, 1 - tanh^2. A key's gradient sums over the query heads of its group.
    Sinks are in lse.
    """
    dtype, num_kv_heads, spec = query.dtype, key.shape[1], call.spec
    inputs = _widened(query, key, value, output, grad_output)
    grads: list[list[torch.Tensor]] = [[t[:0]] for t in inputs[:3]]
    for rows in _sequences(call.cu_seqlens):
        q, k, v, out, grad = (_grouped(t[rows], num_kv_heads) for t in inputs)
        row_lse = lse[:, rows].unflatten(0, (num_kv_heads, -1)).unsqueeze(-1)
        scores = _scores(q, k, spec, call.alibi_slopes)
        weights = torch.exp(scores - row_lse)
        delta = (grad * out).sum(-1, keepdim=True)
        grad_scores = weights * (grad @ v.mT - delta) * spec.scale
        if spec.logits_soft_cap:
            capped = q @ k.mT * (spec.scale / spec.logits_soft_cap)
            grad_scores *= 1 - torch.tanh(capped).square()
        parts = (
            grad_scores @ k,
            (grad_scores.mT @ q).sum(1, keepdim=True),
            (weights.mT @ grad).sum(1, keepdim=True),
        )
        for whole, part in zip(grads, parts, strict=True):
            whole.append(_packed(part))
    grad_query, grad_key, grad_value = (torch.cat(whole).to(dtype) for whole in grads)
    return grad_query, grad_key, grad_value


def visible_keys(
    length: int, causal: bool, window: int | None, device: torch.device
) -> torch.Tensor:
    """Which keys each query of one sequence sees.

    Returns:
        bool, shape = [length, length], queries first.
    """
    ahead = _ahead(length, device)
    visible = torch.ones_like(ahead, dtype=torch.bool)
    if causal:
        visible &= ahead <= 0
    if window:
        visible &= ahead.abs() < window
    return visible


def _ahead(length: int, device: torch.device) -> torch.Tensor:
    """How far each key is ahead of each query, shape = [length, length]."""
    position = torch.arange(length, device=device)
    return position[None, :] - position[:, None]


def _sequences(cu_seqlens: torch.Tensor) -> Iterator[slice]:
    """The tokens of each sequence that is not empty."""
    bounds = cu_seqlens.tolist()
    for start, stop in zip(bounds, bounds[1:], strict=False):
        if stop > start:
            yield slice(start, stop)


def _widened(*tensors: torch.Tensor) -> list[torch.Tensor]:
    return [t.to(torch.promote_types(t.dtype, torch.float32)) for t in tensors]


def _grouped(tensor: torch.Tensor, num_kv_heads: int) -> torch.Tensor:
    """Heads by the KV head that they share.

    Args:
        tensor: shape = [length, heads, head_size]

    Returns:
        shape = [num_kv_heads, heads / num_kv_heads, length, head_size]
    """
    return tensor.unflatten(1, (num_kv_heads, -1)).permute(1, 2, 0, 3)


def _packed(tensor: torch.Tensor) -> torch.Tensor:
    """The inverse of `_grouped`."""
    return tensor.permute(2, 0, 1, 3).flatten(1, 2)


def _scores(
    q: torch.Tensor,
    k: torch.Tensor,
    spec: AttentionSpec,
    alibi_slopes: torch.Tensor | None,
) -> torch.Tensor:
    """shape = [num_kv_heads, group, length, length]; -inf where a key is hidden."""
    scores, soft_cap = q @ k.mT * spec.scale, spec.logits_soft_cap
    if soft_cap:
        scores = soft_cap * torch.tanh(scores / soft_cap)
    length = scores.shape[-1]
    if alibi_slopes is not None:
        slopes = alibi_slopes.to(scores.dtype).view(*scores.shape[:2], 1, 1)
        scores = scores - slopes * _ahead(length, scores.device).abs()
    seen = visible_keys(length, spec.causal, spec.sliding_window, scores.device)
    return scores.masked_fill(~seen, float("-inf"))
