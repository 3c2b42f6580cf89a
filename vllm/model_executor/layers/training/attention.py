# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""Attention that is trained outside vLLM's engine and served inside it."""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING

import torch
from torch import nn

from vllm.model_executor import upstream
from vllm.model_executor.layers.training.attention_layout import (
    packed_view,
    sequence_lengths,
)
from vllm.model_executor.layers.training.base import TrainingLayer
from vllm.model_executor.layers.training.ops.attention.dispatch import attention
from vllm.model_executor.layers.training.ops.attention.spec import AttentionSpec
from vllm.model_executor.parallel_context import ParallelContext

if TYPE_CHECKING:
    from vllm.config import VllmConfig


class TrainableAttention(TrainingLayer):
    """Multi-head, grouped-query or multi-query self-attention, without parameters.

    Outside the engine it computes attention under autograd, within each sequence.
    Inside the engine it is vLLM's `Attention` with its paged KV cache.

    Args:
        num_heads: query heads on this rank, as for vLLM's `Attention`.
        head_size: size of each head.
        scale: factor on the dot products; 1/sqrt(head_size) if None.
        num_kv_heads: key/value heads on this rank; num_heads if None.
        causal: a query sees keys up to its own position.
        sliding_window: a query sees this many latest positions, its own among them.
        logits_soft_cap: caps the scaled dot products s at ±C by C * tanh(s / C).
        parallel_context: accepted for uniformity; the heads are already this rank's.

    Attributes:
        engine: vLLM's `Attention` inside the engine, else None.

    Raises:
        ValueError: heads or features that make no sense.
    """

    def __init__(
        self,
        num_heads: int,
        head_size: int,
        scale: float | None = None,
        num_kv_heads: int | None = None,
        *,
        causal: bool = True,
        sliding_window: int | None = None,
        logits_soft_cap: float | None = None,
        parallel_context: ParallelContext | None = None,
    ) -> None:
        super().__init__(parallel_context)
        num_kv_heads = num_heads if num_kv_heads is None else num_kv_heads
        if num_heads < 1 or num_kv_heads < 1 or num_heads % num_kv_heads:
            raise ValueError(
                f"num_heads={num_heads} must be a positive multiple of "
                f"num_kv_heads={num_kv_heads}."
            )
        if head_size < 1:
            raise ValueError(f"head_size={head_size} must be at least 1.")
        if sliding_window is not None and sliding_window < 1:
            raise ValueError(
                f"sliding_window={sliding_window} must be at least 1, which lets a "
                "query see its own position only; None means no window."
            )
        if logits_soft_cap is not None and logits_soft_cap <= 0:
            raise ValueError(
                f"logits_soft_cap={logits_soft_cap} must be positive; None means no "
                "cap."
            )
        self.num_heads = num_heads
        self.num_kv_heads = num_kv_heads
        self.head_size = head_size
        self.spec = AttentionSpec(
            scale=head_size**-0.5 if scale is None else scale,
            causal=causal,
            sliding_window=sliding_window,
            logits_soft_cap=logits_soft_cap,
        )
        self.engine: nn.Module | None = None

    def forward(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        cu_seqlens: torch.Tensor | None = None,
        max_seqlen: int | None = None,
    ) -> torch.Tensor:
        """Attend within each sequence.

        Args:
            query: shape = [num_tokens, num_heads, head_size],
                [num_tokens, num_heads * head_size],
                [batch, seq, num_heads, head_size] or
                [batch, seq, num_heads * head_size]. Three dims of which the last two
                are (num_heads, head_size) are the first of these.
            key: as the query, with num_kv_heads heads and the same tokens.
            value: as the key.
            cu_seqlens: where the packed sequences begin and end, torch.int32,
                shape = [num_seqs + 1], from 0 to num_tokens; None: packed tokens are
                one sequence. Not for batched tensors. Sequences may be empty.
            max_seqlen: length of the longest sequence, if known.

        Returns:
            The query's shape and dtype.

        Inside the engine cu_seqlens and max_seqlen are not read: the engine's
        metadata says which tokens form a request.

        Raises:
            ValueError: shapes or cu_seqlens that do not fit.
        """
        q, batch_and_seq = packed_view("query", query, self.num_heads, self.head_size)
        k, key_batch = packed_view("key", key, self.num_kv_heads, self.head_size)
        v, value_batch = packed_view("value", value, self.num_kv_heads, self.head_size)
        if not len(q) == len(k) == len(v) or not (
            batch_and_seq == key_batch == value_batch
        ):
            raise ValueError(
                f"query, key and value of shapes {tuple(query.shape)}, "
                f"{tuple(key.shape)} and {tuple(value.shape)} must be all packed or "
                "all batched and hold the same tokens."
            )
        if self.engine is not None:
            output = self.engine(q.flatten(1), k.flatten(1), v.flatten(1))
            return output.view(query.shape)
        seqlens = sequence_lengths(len(q), batch_and_seq, cu_seqlens, max_seqlen)
        return attention(q, k, v, seqlens, self.spec).reshape(query.shape)

    def bind_engine(self, vllm_config: VllmConfig, prefix: str) -> nn.Module:
        """Create vLLM's attention under the layer's module path.

        Raises:
            ValueError: the layer is not causal, or the engine's attention backend
                has no kernel for its head size.
        """
        if not self.spec.causal:
            raise ValueError(
                f"{prefix}: TrainableAttention(causal=False) cannot be served for "
                "generation, whose KV cache holds the past only; build it with "
                "causal=True."
            )
        cache_config = vllm_config.cache_config
        if self.spec.sliding_window is None and cache_config.sliding_window is not None:
            # The layer decides, not the model-wide default of the config.
            cache_config = copy.copy(cache_config)
            cache_config.sliding_window = None
        self.engine = upstream.Attention(
            self.num_heads,
            self.head_size,
            self.spec.scale,
            num_kv_heads=self.num_kv_heads,
            cache_config=cache_config,
            quant_config=vllm_config.quant_config,
            logits_soft_cap=self.spec.logits_soft_cap,
            per_layer_sliding_window=self.spec.sliding_window,
            prefix=prefix,
        )
        backend = self.engine.attn_backend
        if not backend.supports_head_size(self.head_size):
            raise ValueError(
                f"{prefix}: vLLM's {backend.get_name()} backend has no kernel for "
                f"head_size={self.head_size}; it has "
                f"{backend.get_supported_head_sizes()}. Choose such a size or another "
                "attention backend."
            )
        return self

    def extra_repr(self) -> str:
        return (
            f"num_heads={self.num_heads}, num_kv_heads={self.num_kv_heads}, "
            f"head_size={self.head_size}, {self.spec}"
        )
