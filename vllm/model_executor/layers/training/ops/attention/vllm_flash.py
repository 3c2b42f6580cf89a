# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""FlashAttention 3 and 4, which vLLM ships for CUDA."""

from __future__ import annotations

import torch

from vllm.model_executor import vllm_internals
from vllm.model_executor.determinism.query_lengths import invariant_query_len
from vllm.model_executor.layers.training.ops.attention.call import (
    AttentionCall,
    AttentionSpec,
)
from vllm.model_executor.layers.training.ops.attention.pages import pages_of_one

# Heads for which FlashAttention 3 visits other numbers of keys at a time if they are in
# pages, as the engine's are; of other sizes it visits as many (vLLM 0.32.0, causal).
PAGED_HEADS = range(65, 97)


def forward(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    call: AttentionCall,
    *,
    version: int,
) -> tuple[torch.Tensor, torch.Tensor]:
    """FlashAttention's forward; version 3 is what the engine runs on Hopper GPUs.

    One KV split: a row's bits do not depend on the batch. In batch-invariant mode they
    are those of the engine, whose keys are in pages of any size, but not with a window.
    It has no ALiBi.
    """
    spec, cu_seqlens, max_seqlen = call.spec, call.cu_seqlens, call.max_seqlen
    keys = {"cu_seqlens_k": cu_seqlens}
    max_query_len = max_seqlen
    if version == 3 and call.batch_invariant:
        max_query_len = invariant_query_len(max_seqlen, query.shape[2])
        if query.shape[2] in PAGED_HEADS:
            key, value, keys = pages_of_one(key, value, cu_seqlens, max_seqlen)
    output, lse = vllm_internals.flash_attention().flash_attn_varlen_func(
        query,
        key,
        value,
        max_seqlen_q=max_query_len,
        cu_seqlens_q=cu_seqlens,
        max_seqlen_k=max_seqlen,
        **keys,
        softmax_scale=spec.scale,
        causal=spec.causal,
        window_size=_window_size(spec),
        softcap=spec.logits_soft_cap or 0.0,
        return_softmax_lse=True,
        fa_version=version,
        num_splits=1,
        # FA3 reads sinks in bf16 only; ours are rounded to the query's dtype.
        s_aux=None if call.sinks is None else call.sinks.to(query.dtype),
    )
    return output, lse


def _window_size(spec: AttentionSpec) -> list[int]:
    """Keys before and after a query's own position, as vLLM takes them; -1: all."""
    return [-1 if side is None else side for side in spec.window_sides]


def decode_from_pages(
    query: torch.Tensor,
    key_pages: torch.Tensor,
    value_pages: torch.Tensor,
    lengths: torch.Tensor,
    block_table: torch.Tensor,
    spec: AttentionSpec,
    sinks: torch.Tensor | None = None,
) -> torch.Tensor:
    """One query a request, as a batch-invariant engine calls FlashAttention 3.

    For probing that its bits are those of `forward`.

    Args:
        query: shape = [num_requests, num_heads, head_size], the last token of each.
        key_pages: shape = [num_pages, page_size, num_kv_heads, head_size].
        value_pages: likewise.
        lengths: tokens of each request, int32, shape = [num_requests].
        block_table: each request's pages, int32, shape = [num_requests, n].
        spec: of a causal layer.
        sinks: shape = [num_heads] or None.

    Returns:
        shape = [num_requests, num_heads, head_size].
    """
    kernels = vllm_internals.flash_attention()
    num_requests, num_heads, head_size = query.shape
    _, page_size, num_kv_heads, _ = key_pages.shape
    max_query_len = invariant_query_len(1, head_size)
    cu_seqlens = torch.arange(num_requests + 1, dtype=torch.int32, device=query.device)
    max_seqlen = block_table.shape[1] * page_size
    window_size = _window_size(spec)
    # The engine's is made once a step, for all layers.
    schedule = kernels.get_scheduler_metadata(
        batch_size=num_requests,
        max_seqlen_q=max_query_len,
        max_seqlen_k=max_seqlen,
        num_heads_q=num_heads,
        num_heads_kv=num_kv_heads,
        headdim=head_size,
        cache_seqlens=lengths,
        qkv_dtype=query.dtype,
        cu_seqlens_q=cu_seqlens,
        page_size=page_size,
        causal=True,
        window_size=window_size,
        num_splits=1,
    )
    return kernels.flash_attn_varlen_func(
        query,
        key_pages,
        value_pages,
        max_seqlen_q=max_query_len,
        cu_seqlens_q=cu_seqlens,
        max_seqlen_k=max_seqlen,
        seqused_k=lengths,
        block_table=block_table,
        softmax_scale=spec.scale,
        causal=True,
        window_size=window_size,
        softcap=spec.logits_soft_cap or 0.0,
        scheduler_metadata=schedule,
        fa_version=3,
        num_splits=1,
        s_aux=None if sinks is None else sinks.to(query.dtype),
    )


def backward(
    grad_output: torch.Tensor,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    output: torch.Tensor,
    lse: torch.Tensor,
    call: AttentionCall,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """FlashAttention 4's backward, for what any version's forward has computed.

    A sink is in lse, so the gradients of query, key and value need no more of it.
    Sequences of one length run as a batch, which is some percent faster. That they are
    is known without reading cu_seqlens from the device: no sequence is longer than
    max_seqlen, and together they have num_seqs * max_seqlen tokens.
    """
    spec, max_seqlen = call.spec, call.max_seqlen
    num_seqs = call.cu_seqlens.shape[0] - 1
    left, right = spec.window_sides
    tensors = query, key, value, output, grad_output
    lengths: dict[str, torch.Tensor | int] = {}
    if query.shape[0] == num_seqs * max_seqlen:
        batch_and_seq = num_seqs, max_seqlen
        tensors = tuple(t.unflatten(0, batch_and_seq) for t in tensors)
        lse = lse.unflatten(1, batch_and_seq).transpose(0, 1).contiguous()
    else:
        lengths = {
            "cu_seqlens_q": call.cu_seqlens,
            "cu_seqlens_k": call.cu_seqlens,
            "max_seqlen_q": max_seqlen,
            "max_seqlen_k": max_seqlen,
        }
    grads = vllm_internals.flash_attention_backward()(
        *tensors,
        lse,
        softmax_scale=spec.scale,
        causal=spec.causal,
        softcap=spec.logits_soft_cap or 0.0,
        window_size_left=left,
        window_size_right=right,
        deterministic=call.deterministic,
        **lengths,
    )
    return tuple(
        grad.reshape(t.shape)
        for grad, t in zip(grads, (query, key, value), strict=True)
    )
