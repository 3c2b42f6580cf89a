# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""The engine's TRITON_ATTN backend for CUDA."""

from __future__ import annotations

import torch

from vllm.model_executor import upstream
from vllm.model_executor.layers.training.ops.attention.triton_forward import (
    attention_forward_triton,
)

# How many keys the engine's kernel visits at a time.
TILE = 32


def forward(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    cu_seqlens: torch.Tensor,
    max_seqlen: int,
    sinks: torch.Tensor | None,
    alibi_slopes: torch.Tensor | None,
    scale: float,
    causal: bool,
    window: int,
    soft_cap: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The engine's kernel, to which the packed keys are a cache with pages of one.

    Each sequence is a request whose whole prompt is computed in one step. Without
    buffers for partial results the kernel runs as in a batch-invariant engine: one
    program visits all keys of a query, in the same tiles in any step. The page size
    decides where keys are read, and no bit. The kernel does not return lse, which our
    own forward computes.
    """
    output = query.new_empty(query.shape)
    upstream.triton_attention()(
        q=query,
        k=key.unsqueeze(1),
        v=value.unsqueeze(1),
        out=output,
        cu_seqlens_q=cu_seqlens,
        max_seqlen_q=max_seqlen,
        seqused_k=cu_seqlens.diff(),
        max_seqlen_k=max_seqlen,
        softmax_scale=scale,
        causal=causal,
        window_size=(window - 1, 0) if window else (-1, -1),
        block_table=block_table(cu_seqlens, max_seqlen),
        softcap=soft_cap,
        q_descale=None,
        k_descale=None,
        v_descale=None,
        sinks=sinks,
    )
    _, lse = attention_forward_triton(
        query,
        key,
        value,
        cu_seqlens,
        max_seqlen,
        sinks,
        alibi_slopes,
        scale,
        causal,
        window,
        soft_cap,
    )
    return output, lse


def block_table(cu_seqlens: torch.Tensor, max_seqlen: int) -> torch.Tensor:
    """The page of each position: its token, as pages have one.

    The kernel reads the entries of whole tiles. Those past a sequence's end lead
    nowhere, and it does not follow them.

    Args:
        cu_seqlens: int32, shape = [num_seqs + 1]

    Returns:
        int32, shape = [num_seqs, max_seqlen rounded up to whole tiles]
    """
    columns = -(-max_seqlen // TILE) * TILE
    positions = torch.arange(columns, dtype=torch.int32, device=cu_seqlens.device)
    return cu_seqlens[:-1].unsqueeze(1) + positions
