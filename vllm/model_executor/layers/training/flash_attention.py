# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""A whole attention block: projections, rotary embedding and attention."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from vllm.model_executor.layers.training.arguments import check_sizes
from vllm.model_executor.layers.training.attention import TrainableAttention
from vllm.model_executor.layers.training.base import TrainingLayer
from vllm.model_executor.layers.training.linear import (
    QKVParallelLinear,
    RowParallelLinear,
)
from vllm.model_executor.layers.training.rotary import RotaryEmbedding
from vllm.model_executor.parallel_context import ParallelContext


class VLLMFlashAttention(TrainingLayer):
    """Self-attention with its own query/key/value and output projections.

    To train, `VLLMFlashAttention(hidden_size=256, num_heads=4)` is enough. In
    a checkpoint the projections are q_proj, k_proj, v_proj and o_proj. Query head h
    reads key/value head h // (num_heads // num_kv_heads); `TrainableAttention` says
    what to do with weights of another order.

    Args:
        hidden_size: Size of a hidden state.
        num_heads: Query heads, over all ranks.
        num_kv_heads: key/value heads, over all ranks; num_heads if None.
        head_dim: Size of each head; hidden_size / num_heads if None.
        bias: Give the projections a bias.
        rotary: Rotary embedding of query and key; None for none.
        causal: A token sees tokens up to its own position.
        sliding_window: A token sees this many latest positions, its own among them.
        logits_soft_cap: Caps the scaled dot products s at ±C by C * tanh(s / C).
        scale: Factor on the dot products; 1/sqrt(head_dim) if None.
        sinks: Learn one more score for each head, whose value is zero.
        alibi_slopes: Slope of each head, over all ranks. ALiBi subtracts slope * d from
            the score of a key at distance d. The slopes are constants.
        dropout: Must be 0, as for `TrainableAttention`.
        implementation: What computes attention, as for `TrainableAttention`.
        deterministic: attention's gradients are equal bit for bit from run to run.
        params_dtype: Dtype of the parameters; torch's default dtype if None.
        sequence_parallel: Hidden states and output are this rank's slice of the
            tokens, positions of all tokens. In the engine all are of all tokens.
        parallel_context: The context to shard by.

    Attributes:
        qkv_proj: QKVParallelLinear.
        o_proj: RowParallelLinear.
        rotary_emb: The rotary embedding or None.
        attn: TrainableAttention over this rank's heads.

    Raises:
        ValueError: A size is not a multiple of another as it must be, or the rotary
            embedding has another head size.
    """

    def __init__(
        self,
        hidden_size: int,
        num_heads: int,
        num_kv_heads: int | None = None,
        *,
        head_dim: int | None = None,
        bias: bool = False,
        rotary: RotaryEmbedding | None = None,
        causal: bool = True,
        sliding_window: int | None = None,
        logits_soft_cap: float | None = None,
        scale: float | None = None,
        sinks: bool = False,
        alibi_slopes: Sequence[float] | None = None,
        dropout: float = 0.0,
        implementation: str | None = None,
        deterministic: bool = False,
        params_dtype: torch.dtype | None = None,
        sequence_parallel: bool = False,
        parallel_context: ParallelContext | None = None,
    ) -> None:
        super().__init__(parallel_context)
        check_sizes("VLLMFlashAttention", hidden_size=hidden_size, num_heads=num_heads)
        if head_dim is None:
            if hidden_size % num_heads:
                raise ValueError(
                    f"hidden_size={hidden_size} is not divisible by "
                    f"num_heads={num_heads}; choose sizes that divide, or give "
                    "head_dim."
                )
            head_dim = hidden_size // num_heads
        if rotary is not None and rotary.head_size != head_dim:
            raise ValueError(
                f"rotary has head_size={rotary.head_size}, but the heads have size "
                f"{head_dim}; build RotaryEmbedding({head_dim})."
            )
        self.hidden_size = hidden_size
        self.head_dim = head_dim
        self.qkv_proj = QKVParallelLinear(
            hidden_size,
            head_dim,
            num_heads,
            num_kv_heads,
            bias=bias,
            part_names=("q_proj", "k_proj", "v_proj"),
            params_dtype=params_dtype,
            sequence_parallel=sequence_parallel,
            parallel_context=self.parallel_context,
        )
        self.num_heads = self.qkv_proj.num_heads
        self.num_kv_heads = self.qkv_proj.num_kv_heads
        self.rotary_emb = rotary
        if alibi_slopes is not None:
            if len(alibi_slopes) != num_heads:
                raise ValueError(
                    f"alibi_slopes has {len(alibi_slopes)} elements; it must have one "
                    f"for each of the {num_heads} heads."
                )
            first = self.tp_rank * self.num_heads
            alibi_slopes = alibi_slopes[first : first + self.num_heads]
        self.attn = TrainableAttention(
            self.num_heads,
            head_dim,
            scale,
            self.num_kv_heads,
            causal=causal,
            sliding_window=sliding_window,
            logits_soft_cap=logits_soft_cap,
            sinks=sinks,
            alibi_slopes=alibi_slopes,
            dropout=dropout,
            implementation=implementation,
            deterministic=deterministic,
            params_dtype=params_dtype,
            parallel_context=self.parallel_context,
        )
        self.o_proj = RowParallelLinear(
            num_heads * head_dim,
            hidden_size,
            bias=bias,
            params_dtype=params_dtype,
            sequence_parallel=sequence_parallel,
            parallel_context=self.parallel_context,
        )

    def forward(
        self,
        hidden_states: torch.Tensor,
        positions: torch.Tensor | None = None,
        cu_seqlens: torch.Tensor | None = None,
        max_seqlen: int | None = None,
    ) -> torch.Tensor:
        """Attend within each sequence.

        Args:
            hidden_states: shape = [num_tokens, hidden_size] or
                [batch, seq, hidden_size].
            positions: Integers, shape = [num_tokens] or [batch, seq]; needed with a
                rotary embedding and not read without one.
            cu_seqlens: Where packed sequences begin and end, torch.int32,
                shape = [num_seqs + 1]; None: packed tokens are one sequence.
            max_seqlen: Length of the longest sequence, if known.

        Returns:
            The shape and dtype of hidden_states.

        Raises:
            ValueError: Shapes do not match, or positions are missing.
        """
        if hidden_states.ndim not in (2, 3):
            raise ValueError(
                f"hidden_states of shape {tuple(hidden_states.shape)} must be "
                f"[num_tokens, {self.hidden_size}] or [batch, seq, "
                f"{self.hidden_size}]."
            )
        qkv = self.qkv_proj(hidden_states)
        leading = qkv.shape[:-1]
        heads = self.num_heads + 2 * self.num_kv_heads
        qkv = qkv.view(*leading, heads, self.head_dim)
        q, k, v = qkv.split(
            (self.num_heads, self.num_kv_heads, self.num_kv_heads), dim=-2
        )
        if self.rotary_emb is not None:
            if positions is None:
                raise ValueError(
                    "VLLMFlashAttention with a rotary embedding needs positions of "
                    f"shape {tuple(leading)}; none were given."
                )
            q, k = self.rotary_emb(positions, q, k)
        output = self.attn(q, k, v, cu_seqlens, max_seqlen)
        return self.o_proj(output.flatten(-2))
