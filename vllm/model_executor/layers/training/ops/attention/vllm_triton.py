# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""The engine's TRITON_ATTN backend for CUDA."""

from __future__ import annotations

import torch

from vllm.model_executor import vllm_internals
from vllm.model_executor.layers.training.ops.attention.call import AttentionCall
from vllm.model_executor.layers.training.ops.attention.pages import pages_of_one
from vllm.model_executor.layers.training.ops.attention.triton_forward import (
    attention_forward_triton,
)

# A sink that weighs nothing beside any score.
_NO_SINK = -1e30


def forward(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, call: AttentionCall
) -> tuple[torch.Tensor, torch.Tensor]:
    """The engine's kernel, to which the packed keys are a cache with pages of one.

    Each sequence is a request whose whole prompt is computed in one step. Without
    buffers for partial results the kernel runs as in a batch-invariant engine: one
    program visits all keys of a query, in the same tiles in any step. It does not
    return lse, which our own forward computes.
    """
    spec, window = call.spec, call.spec.sliding_window
    output = query.new_empty(query.shape)
    key_pages, value_pages, requests = pages_of_one(
        key, value, call.cu_seqlens, call.max_seqlen
    )
    vllm_internals.triton_attention()(
        q=query,
        k=key_pages,
        v=value_pages,
        out=output,
        cu_seqlens_q=call.cu_seqlens,
        max_seqlen_q=call.max_seqlen,
        max_seqlen_k=call.max_seqlen,
        **requests,
        softmax_scale=spec.scale,
        causal=spec.causal,
        window_size=(window - 1, 0) if window else (-1, -1),
        softcap=spec.logits_soft_cap or 0.0,
        q_descale=None,
        k_descale=None,
        v_descale=None,
        sinks=sinks_for(window, call.sinks, query.shape[1], query.device),
    )
    _, lse = attention_forward_triton(query, key, value, call)
    return output, lse


def sinks_for(
    window: int | None,
    sinks: torch.Tensor | None,
    num_heads: int,
    device: torch.device,
) -> torch.Tensor | None:
    """What to give the kernel as sinks, so that a row does not depend on its block.

    With a window the first keys that a block of queries visits may all be hidden from
    some of its queries. Those would start their maximum at 0, and with a sink start it
    there: one that weighs nothing makes them all alike.

    Args:
        window: keys that a query sees; None: all.
        sinks: those of the model, if it has any.
        num_heads: of the query.
        device: of the query.

    Returns:
        shape = [num_heads], or None.
    """
    if sinks is None and window:
        return torch.full((num_heads,), _NO_SINK, device=device)
    return sinks
