# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""Torch's own FlashAttention 2 for CUDA, on packed sequences."""

from __future__ import annotations

import torch

from vllm.model_executor.layers.training.ops.attention.call import AttentionCall


def forward(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, call: AttentionCall
) -> tuple[torch.Tensor, torch.Tensor]:
    """The forward of torch's scaled_dot_product_attention, called by its name."""
    left, right = call.spec.window_sides
    output, lse, *_ = torch.ops.aten._flash_attention_forward(
        query,
        key,
        value,
        call.cu_seqlens,
        call.cu_seqlens,
        call.max_seqlen,
        call.max_seqlen,
        0.0,
        call.spec.causal,
        False,
        scale=call.spec.scale,
        window_size_left=left,
        window_size_right=right,
    )
    return output, lse


def backward(
    grad_output: torch.Tensor,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    output: torch.Tensor,
    lse: torch.Tensor,
    call: AttentionCall,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Its backward. Gradients of the query differ from run to run."""
    left, right = call.spec.window_sides
    no_dropout = torch.zeros(2, dtype=torch.uint64, device=query.device)
    return torch.ops.aten._flash_attention_backward(
        grad_output,
        query,
        key,
        value,
        output,
        lse,
        call.cu_seqlens,
        call.cu_seqlens,
        call.max_seqlen,
        call.max_seqlen,
        0.0,
        call.spec.causal,
        no_dropout,
        no_dropout,
        scale=call.spec.scale,
        window_size_left=left,
        window_size_right=right,
    )
