# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""Attention that is trained outside vLLM's engine and served inside it."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from vllm import envs
from vllm.model_executor import vllm_internals
from vllm.model_executor.checkpoint.specification import ParameterSharding, Part
from vllm.model_executor.layers.training.arguments import (
    check_sizes,
    is_finite,
    is_integer,
)
from vllm.model_executor.layers.training.attention_layout import (
    packed_view,
    sequence_bounds,
)
from vllm.model_executor.layers.training.base import TrainingLayer, resolve_dtype
from vllm.model_executor.layers.training.computed_buffer import buffer_for, home_of
from vllm.model_executor.layers.training.ops.attention import vllm_triton
from vllm.model_executor.layers.training.ops.attention.call import AttentionSpec
from vllm.model_executor.layers.training.ops.attention.op import attention
from vllm.model_executor.layers.training.ops.attention.table import check_name
from vllm.model_executor.parallel_context import ParallelContext

if TYPE_CHECKING:
    from vllm.config import VllmConfig


class TrainableAttention(TrainingLayer):
    """Multi-head, grouped-query or multi-query self-attention.

    Query head h reads key/value head h // (num_heads // num_kv_heads), as in Llama and
    in vLLM. In libraries that repeat all key/value heads one after another, as
    `key.repeat(1, num_heads // num_kv_heads, 1)` does, it reads head h % num_kv_heads.
    Reorder the query heads of such weights, in the rows of the query's projection and
    in the columns of the output's, so that those of one key/value head are adjacent.

    Outside the engine it computes attention under autograd, within each sequence.
    Inside the engine it is vLLM's `Attention` with its paged KV cache.

    Args:
        num_heads: Query heads on this rank, as for vLLM's `Attention`.
        head_size: Size of each head.
        scale: Factor on the dot products; 1/sqrt(head_size) if None.
        num_kv_heads: key/value heads on this rank; num_heads if None.
        causal: A query sees keys up to its own position.
        sliding_window: A query sees this many latest positions, its own among them.
        logits_soft_cap: Caps the scaled dot products s at ±C by C * tanh(s / C).
        sinks: Learn one more score for each head, whose value is zero.
        alibi_slopes: Slope of each head on this rank. ALiBi subtracts slope * d from
            the score of a key at distance d. The slopes are constants.
        dropout: Must be 0. No kernel supports dropout, in trainer or engine.
        implementation: Name of an implementation of `ops.attention.table`, for outside
            the engine. If None, the first that can compute the call, which is logged.
        deterministic: Gradients are bitwise identical from run to run.
        params_dtype: Dtype of the sinks; torch's default dtype if None.
        parallel_context: The context that the sinks are sharded by. The head counts are
            those of this rank.

    Attributes:
        sinks: shape = [num_heads], trained; None without sinks.
        alibi_slopes: shape = [num_heads], fp32; None without slopes. Not part of the
            state dict. It stays fp32 when the module is cast, and is on the CPU while
            the module is on the meta device.
        engine: vLLM's `Attention` inside the engine, else None.

    Raises:
        ValueError: Heads or features are invalid.
    """

    sinks: nn.Parameter | None
    alibi_slopes: torch.Tensor | None
    has_state = True

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
        sinks: bool = False,
        alibi_slopes: Sequence[float] | None = None,
        dropout: float = 0.0,
        implementation: str | None = None,
        deterministic: bool = False,
        params_dtype: torch.dtype | None = None,
        parallel_context: ParallelContext | None = None,
    ) -> None:
        super().__init__(parallel_context)
        num_kv_heads = num_heads if num_kv_heads is None else num_kv_heads
        check_sizes(
            "TrainableAttention",
            num_heads=num_heads,
            num_kv_heads=num_kv_heads,
            head_size=head_size,
        )
        if num_heads % num_kv_heads:
            raise ValueError(
                f"num_heads={num_heads} must be a positive multiple of "
                f"num_kv_heads={num_kv_heads}."
            )
        if sliding_window is not None and (
            not is_integer(sliding_window) or sliding_window < 1
        ):
            raise ValueError(
                f"sliding_window={sliding_window!r} must be an integer and at least 1, "
                "which lets a query see its own position only; None means no window."
            )
        if logits_soft_cap is not None and (
            not is_finite(logits_soft_cap) or logits_soft_cap <= 0
        ):
            raise ValueError(
                f"logits_soft_cap={logits_soft_cap!r} must be a finite number above 0; "
                "None means no cap."
            )
        if scale is not None and not is_finite(scale):
            raise ValueError(
                f"scale={scale!r} must be a finite number; None means "
                "1/sqrt(head_size)."
            )
        if alibi_slopes is not None and len(alibi_slopes) != num_heads:
            raise ValueError(
                f"alibi_slopes has {len(alibi_slopes)} elements; it must have one for "
                f"each of the {num_heads} heads on this rank."
            )
        slopes = None if alibi_slopes is None else tuple(map(float, alibi_slopes))
        if slopes is not None and not all(map(is_finite, slopes)):
            raise ValueError(f"alibi_slopes={slopes} must be finite numbers.")
        if dropout:
            raise ValueError(
                f"dropout={dropout}: attention has no dropout of its weights, in "
                "training as in the engine. Leave it out, or apply torch's Dropout "
                "to the output."
            )
        if implementation is not None:
            check_name(implementation)
        self.num_heads = num_heads
        self.num_kv_heads = num_kv_heads
        self.head_size = head_size
        self.spec = AttentionSpec(
            scale=head_size**-0.5 if scale is None else float(scale),
            causal=causal,
            sliding_window=sliding_window,
            logits_soft_cap=logits_soft_cap,
        )
        self.implementation = implementation
        self.deterministic = deterministic
        self.engine: nn.Module | None = None
        self.engine_dtype: torch.dtype | None = None
        self._slopes = slopes
        device = torch.get_default_device()
        self.register_buffer("alibi_slopes", self._make_slopes(device), False)
        self._has_sinks = sinks
        self.register_parameter("sinks", None)
        if sinks:
            self._add_parameter("sinks", resolve_dtype(params_dtype))
            self._initialise()

    def _make_slopes(self, device: torch.device) -> torch.Tensor | None:
        if self._slopes is None:
            return None
        return torch.tensor(self._slopes, dtype=torch.float32, device=home_of(device))

    def _apply(
        self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True
    ) -> TrainableAttention:
        """Move with the module, but keep the slopes' values and dtype."""
        if self.alibi_slopes is not None and self.alibi_slopes.is_meta:
            self.alibi_slopes = self._make_slopes(torch.device("cpu"))
        super()._apply(fn, recurse)
        if self.alibi_slopes is not None:
            self.alibi_slopes = self._make_slopes(self.alibi_slopes.device)
        return self

    def parameter_sharding(self) -> dict[str, ParameterSharding]:
        """The sinks are sharded as the heads are."""
        if not self._has_sinks:
            return {}
        heads = self.num_heads * self.tp_size
        part = Part(None, None, heads)
        return {"sinks": ParameterSharding(torch.Size((heads,)), 0, (part,))}

    def reset_parameters(self) -> None:
        """Zeros: a sink weighs as much as a key of score 0."""
        if self.sinks is not None:
            self.draw("sinks", nn.init.zeros_)

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
            key: As the query, with num_kv_heads heads and the same tokens.
            value: As the key.
            cu_seqlens: Where the packed sequences begin and end, torch.int32, on the
                query's device, shape = [num_seqs + 1], from 0 to num_tokens; None:
                packed tokens are one sequence. Not for batched tensors. Sequences may
                be empty. Not read on the host, so on CUDA its values are not checked.
            max_seqlen: Length of the longest sequence, if known: on CUDA it saves the
                kernels work.

        Returns:
            The query's shape and dtype.

        Inside the engine cu_seqlens and max_seqlen are not read: the engine's
        metadata says which tokens form a request.

        Raises:
            ValueError: Shapes or cu_seqlens do not match.
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
            self._check_dtype(q)
            output = self.engine(q.flatten(1), k.flatten(1), v.flatten(1))
            return output.view(query.shape)
        slopes = self.alibi_slopes
        if slopes is not None:
            slopes = buffer_for(query, "alibi_slopes", slopes)
        bounds, max_seqlen = sequence_bounds(
            len(q), batch_and_seq, cu_seqlens, max_seqlen, q.device
        )
        output = attention(
            q,
            k,
            v,
            bounds,
            max_seqlen,
            self.spec,
            sinks=self.sinks,
            alibi_slopes=slopes,
            implementation=self.implementation,
            deterministic=self.deterministic,
        )
        return output if q is query else output.view(query.shape)

    @property
    def encodes_positions(self) -> bool:
        """Whether scores depend on distances, without the model's `positions`."""
        return self._slopes is not None

    def row_wise(self, *inputs: torch.Tensor) -> torch.Tensor:
        """A function of each token's own query, key and value; see `TrainingLayer`.

        Args:
            inputs: Query, shape = [num_tokens, num_heads * head_size], key and value,
                shape = [num_tokens, num_kv_heads * head_size].

        Returns:
            The query's shape: of each head the value, and the mean of the query and
            of the key, each weighted by the place in the head.
        """
        q, k, v = (each.unflatten(-1, (-1, self.head_size)) for each in inputs)
        group = self.num_heads // self.num_kv_heads
        k, v = k.repeat_interleave(group, 1), v.repeat_interleave(group, 1)
        weights = torch.linspace(-1, 1, self.head_size).to(q)
        mixed = (q * weights).mean(-1, keepdim=True)
        mixed = mixed + (k * weights.flip(0).square()).mean(-1, keepdim=True)
        return (v + mixed).flatten(1)

    def bind_engine(self, vllm_config: VllmConfig, prefix: str) -> nn.Module:
        """Create vLLM's attention under the layer's module path.

        Raises:
            ValueError: The layer is not causal, or the engine's attention backend
                has no kernel for its head size, its sinks or its ALiBi slopes.
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
        extra: dict[str, Any] = {}
        if self.sinks is not None:
            extra["sinks"] = self._engine_sinks()
        engine = vllm_internals.Attention(
            self.num_heads,
            self.head_size,
            self.spec.scale,
            num_kv_heads=self.num_kv_heads,
            alibi_slopes=None if self._slopes is None else list(self._slopes),
            cache_config=cache_config,
            quant_config=vllm_config.quant_config,
            logits_soft_cap=self.spec.logits_soft_cap,
            per_layer_sliding_window=self.spec.sliding_window,
            prefix=prefix,
            **extra,
        )
        # vLLM's attention has its own copy.
        self.alibi_slopes = None
        self._check_backend(engine, prefix)
        if envs.VLLM_BATCH_INVARIANT:
            self._add_sinks_of_the_mode(engine)
        self.engine, self.engine_dtype = engine, engine.dtype
        return self

    def _check_dtype(self, query: torch.Tensor) -> None:
        if self.engine_dtype not in (None, query.dtype):
            raise TypeError(
                f"TrainableAttention was called with {query.dtype} in an engine of "
                f"{self.engine_dtype}, whose KV cache has that dtype. Build the model "
                "in the engine's dtype, which is torch's default dtype and the "
                "config's dtype while a builder runs; or start the engine with dtype="
                f"'{str(query.dtype).removeprefix('torch.')}'."
            )

    def _engine_sinks(self) -> nn.Parameter:
        """The sinks as vLLM's attention shares them, in a dtype it does not cast.

        It would cast fp16 once, on CPU, and not see weights that are loaded later.
        """
        assert self.sinks is not None
        if self.sinks.dtype == torch.float16 and self.sinks.device.type == "cpu":
            self.sinks.data = self.sinks.data.float()
        return self.sinks

    def _add_sinks_of_the_mode(self, engine: vllm_internals.Attention) -> None:
        """What vLLM's Triton kernel needs to be batch-invariant with a window."""
        if self.sinks is not None or engine.attn_backend.get_name() != "TRITON_ATTN":
            return
        device = torch.get_default_device()
        window = self.spec.sliding_window
        sinks = vllm_triton.sinks_for(window, None, self.num_heads, device)
        # A buffer, which outlasts an engine's sleep.
        self.register_buffer("sinks_of_the_mode", sinks, persistent=False)
        setattr(engine.impl, "sinks", sinks)  # noqa: B010

    def _check_backend(self, engine: vllm_internals.Attention, prefix: str) -> None:
        backend = engine.attn_backend
        name = backend.get_name()
        if not backend.supports_head_size(self.head_size):
            raise ValueError(
                f"{prefix}: vLLM's {name} backend has no kernel for "
                f"head_size={self.head_size}; it has "
                f"{backend.get_supported_head_sizes()}. Choose such a size or another "
                "attention backend."
            )
        if self._slopes is not None and not vllm_internals.has_alibi(engine):
            raise ValueError(
                f"{prefix}: vLLM's {name} backend has no kernel for alibi_slopes here. "
                "Choose TRITON_ATTN as the attention backend."
            )
        if self._slopes is not None and self.sinks is not None and name != "CPU_ATTN":
            raise ValueError(
                f"{prefix}: vLLM's {name} backend shifts the scores of a query with "
                "alibi_slopes by a constant, which sinks would see. Leave out one of "
                "the two; CPU_ATTN has both."
            )
        if self.sinks is None or name != "FLASH_ATTN":
            return
        if self.sinks.dtype != torch.bfloat16 or self.num_heads > 64:
            raise ValueError(
                f"{prefix}: vLLM's FLASH_ATTN backend has sinks in torch.bfloat16 and "
                f"for at most 64 heads; these are {self.sinks.dtype} for "
                f"{self.num_heads}. Choose TRITON_ATTN as the attention backend."
            )

    def extra_repr(self) -> str:
        parts = [
            f"num_heads={self.num_heads}",
            f"num_kv_heads={self.num_kv_heads}",
            f"head_size={self.head_size}",
            str(self.spec),
        ]
        if self.sinks is not None:
            parts.append("sinks=True")
        if self._slopes is not None:
            parts.append(f"alibi_slopes={self._slopes}")
        if self.implementation is not None:
            parts.append(f"implementation={self.implementation!r}")
        if self.deterministic:
            parts.append("deterministic=True")
        return ", ".join(parts)
