# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""Attention on CPU: our C++ kernels, and the engine's own forward."""

from __future__ import annotations

import functools
from types import SimpleNamespace

import torch

from vllm.model_executor import vllm_internals
from vllm.model_executor.determinism.query_lengths import cut_requests
from vllm.model_executor.layers.training.ops.attention.call import (
    AttentionCall,
    AttentionSpec,
)

PAGE_SIZE = 128


def forward(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, call: AttentionCall
) -> tuple[torch.Tensor, torch.Tensor]:
    """Our C++ kernel."""
    return torch.ops.vllm_training.cpu_attention_forward(
        query,
        key,
        value,
        call.cu_seqlens,
        call.sinks,
        call.alibi_slopes,
        *_numbers(call.spec),
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
    """Our C++ kernel. It needs no sinks: they are in lse."""
    return torch.ops.vllm_training.cpu_attention_backward(
        grad_output,
        query,
        key,
        value,
        output,
        lse,
        call.cu_seqlens,
        call.alibi_slopes,
        *_numbers(call.spec),
    )


def _numbers(spec: AttentionSpec) -> tuple[float, bool, int, float]:
    """The spec as our kernels take it, to which 0 is no window and no cap."""
    return (
        spec.scale,
        spec.causal,
        spec.sliding_window or 0,
        spec.logits_soft_cap or 0.0,
    )


def forward_vllm(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, call: AttentionCall
) -> tuple[torch.Tensor, torch.Tensor]:
    """The engine's kernel, on a KV cache filled from the packed keys and values.

    Each sequence is a request whose whole prompt is computed in one step, in
    batch-invariant mode cut into pieces as the engine cuts it. The engine's kernel does
    not return lse, which our own computes.
    """
    vllm, spec = _engines_attention(), call.spec
    num_heads, head_size = query.shape[1:]
    num_kv_heads = key.shape[1]
    isa = vllm.isa(query.dtype, PAGE_SIZE, head_size)
    window = spec.sliding_window or -1

    # The engine has no empty requests.
    bounds = call.cu_seqlens.unique_consecutive()
    lengths = bounds.diff()
    first_page, slots, num_pages = _pages(bounds, lengths)
    longest = -(-int(lengths.max()) // PAGE_SIZE)
    pages = torch.arange(longest, dtype=torch.int32)
    block_table = (first_page.unsqueeze(1) + pages).clamp_(max=num_pages - 1)
    cache = query.new_zeros(num_pages, num_kv_heads, 2 * PAGE_SIZE, head_size)
    key_cache, value_cache = cache.chunk(2, dim=2)
    vllm.ops.cpu_attn_reshape_and_cache(key, value, key_cache, value_cache, slots, isa)
    split_kv = vllm.split_kv()
    if call.batch_invariant:
        pieces = cut_requests(
            bounds, lengths, block_table, spec.causal, num_heads, num_kv_heads
        )
        _, bounds, lengths, block_table, _ = pieces
        split_kv = False
    metadata = vllm.ops.cpu_attn_get_scheduler_metadata(
        num_reqs=len(lengths),
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        head_dim=head_size,
        seq_lens=lengths,
        dtype=query.dtype,
        query_start_loc=bounds,
        causal=spec.causal,
        sliding_window_size=window,
        isa=isa,
        enable_kv_split=split_kv,
    )
    output = query.new_empty(query.shape)
    vllm.ops.cpu_attention_with_kv_cache(
        query=query,
        key_cache=key_cache,
        value_cache=value_cache,
        output=output,
        query_start_loc=bounds,
        seq_lens=lengths,
        scale=spec.scale,
        causal=spec.causal,
        alibi_slopes=call.alibi_slopes,
        sliding_window=window,
        block_table=block_table,
        softcap=spec.logits_soft_cap or 0.0,
        scheduler_metadata=metadata,
        s_aux=call.sinks,
    )
    lse = torch.ops.vllm_training.cpu_attention_lse(
        query,
        key,
        call.cu_seqlens,
        call.sinks,
        call.alibi_slopes,
        *_numbers(spec),
    )
    return output, lse


@functools.cache
def _engines_attention() -> SimpleNamespace:
    """The engine's attention, ready to run.

    A process has to ask the system for AMX before it uses it, or is killed. In an
    engine oneDNN has asked.
    """
    torch.cpu._init_amx()
    return vllm_internals.cpu_attention()


def _pages(
    bounds: torch.Tensor, lengths: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, int]:
    """Where sequences lie in a KV cache in which each begins at a new page.

    Returns:
        Each sequence's first page, int32; each token's slot, int64; number of pages.
    """
    num_pages = (lengths + PAGE_SIZE - 1) // PAGE_SIZE
    ends = num_pages.cumsum(0, dtype=torch.int32)
    first_page = ends - num_pages
    shift = first_page.long() * PAGE_SIZE - bounds[:-1]
    slots = torch.arange(int(bounds[-1])) + shift.repeat_interleave(lengths)
    return first_page, slots, int(ends[-1])
