# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""The attention layer that an adopted module calls in place of its own attention."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import nn

from vllm.model_executor import vllm_internals
from vllm.model_executor.layers.training.attention import TrainableAttention
from vllm.model_executor.parallel_context import ParallelContext

if TYPE_CHECKING:
    from vllm.config import VllmConfig

# What configs of transformers' models name as their attention implementation. In the
# engine there is no mask, since the engine knows which tokens form a request.
IN_TRAINER = "training_layers"
IN_ENGINE = "training_layers_in_engine"


class AttentionSite(NamedTuple):
    """What one call of attention in a forward asks for.

    Attributes:
        num_heads: Query heads.
        num_kv_heads: key/value heads.
        head_size: Of queries and keys.
        value_size: Head size of the values, at most `head_size`.
        scale: Factor on the dot products.
        sliding_window: Latest positions that a query sees; None: all.
        logits_soft_cap: Caps the scores; None: no cap.
        sinks: Name of the parameter of the calling module that holds one score more
            for each head; None: there is none.
        is_torchs: Whether it is a call of torch's `scaled_dot_product_attention`.
        is_flex: Whether it is a call of `flex_attention`.
        written: Functions of each score, where the call is written out.
    """

    num_heads: int
    num_kv_heads: int
    head_size: int
    value_size: int
    scale: float
    sliding_window: int | None = None
    logits_soft_cap: float | None = None
    sinks: str | None = None
    is_torchs: bool = False
    is_flex: bool = False
    written: tuple[tuple[str, tuple[float, ...]], ...] | None = None

    @classmethod
    def of(
        cls,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        scale: float | None,
        **features: Any,
    ) -> AttentionSite:
        """Read the sizes from a call.

        Args:
            query: shape = [batch, num_heads, seq, head_size].
            key: shape = [batch, num_kv_heads, seq, head_size].
            value: shape = [batch, num_kv_heads, seq, value_size].
            scale: None means 1/sqrt(head_size).
            **features: The other fields.

        Raises:
            ValueError: It is not self-attention, or no kernel has these sizes.
        """
        shapes = f"{tuple(query.shape)}, {tuple(key.shape)} and {tuple(value.shape)}"
        if not query.ndim == key.ndim == value.ndim == 4:
            raise ValueError(
                f"attention is called with query, key and value of shapes {shapes}; "
                "they must be [batch, heads, seq, head_size]."
            )
        batch, num_heads, seq, head_size = query.shape
        num_kv_heads, value_size = key.shape[1], value.shape[3]
        if key.shape != (batch, num_kv_heads, seq, head_size) or (
            value.shape != (batch, num_kv_heads, seq, value_size)
        ):
            raise ValueError(
                f"attention is called with query, key and value of shapes {shapes}. "
                "Only self-attention over whole sequences can be trained and served, "
                "in which all three have the same tokens. Leave out KV caches of the "
                "model (use_cache=False) and cross-attention."
            )
        if value_size > head_size:
            raise ValueError(
                f"attention is called with value heads of size {value_size}, which "
                f"are larger than the key heads, {head_size}."
            )
        if num_heads % num_kv_heads:
            raise ValueError(
                f"attention is called with {num_heads} query heads, which is no "
                f"multiple of its {num_kv_heads} key/value heads."
            )
        scale = head_size**-0.5 if scale is None else float(scale)
        return cls(num_heads, num_kv_heads, head_size, value_size, scale, **features)


class AdoptedAttention(TrainableAttention):
    """Attention at one call site of a module whose code was not written for it.

    It takes tensors as torch's `scaled_dot_product_attention` does. Values of smaller
    heads are padded with zeros, and the output is cut again. Sinks stay a parameter of
    the calling module.

    Args:
        site: What the call asks for.
        owner: The module that calls it.
        parallel_context: The heads of `site` are those of one of its ranks.
        implementation: As for `TrainableAttention`.
    """

    def __init__(
        self,
        site: AttentionSite,
        owner: nn.Module,
        parallel_context: ParallelContext,
        implementation: str | None = None,
    ) -> None:
        super().__init__(
            site.num_heads,
            site.head_size,
            site.scale,
            site.num_kv_heads,
            sliding_window=site.sliding_window,
            logits_soft_cap=site.logits_soft_cap,
            implementation=implementation,
            parallel_context=parallel_context,
        )
        self.site = site
        # Not a submodule: the owner holds this module.
        self.__dict__["_owner"] = owner
        if site.sinks is not None:
            # Read where they are, so that a state dict has them once.
            del self._parameters["sinks"]

    @property
    def is_in_engine(self) -> bool:
        """Whether the engine's attention computes; the startup check stands for it."""
        return isinstance(self.engine, vllm_internals.Attention)

    def __getattr__(self, name: str) -> Any:
        own = self.__dict__
        if name == "sinks" and "site" in own and own["site"].sinks is not None:
            return getattr(own["_owner"], own["site"].sinks)
        return super().__getattr__(name)

    def bind_engine(self, vllm_config: VllmConfig, prefix: str) -> nn.Module:
        config: Any = getattr(self._owner, "config", None)
        if getattr(config, "_attn_implementation", None) == IN_TRAINER:
            config._attn_implementation = IN_ENGINE
        return super().bind_engine(vllm_config, prefix)

    def attend(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        cu_seqlens: torch.Tensor | None = None,
        max_seqlen: int | None = None,
    ) -> torch.Tensor:
        """Attend within each sequence.

        Args:
            query: shape = [batch, num_heads, seq, head_size].
            key: shape = [batch, num_kv_heads, seq, head_size].
            value: shape = [batch, num_kv_heads, seq, value_size].
            cu_seqlens: Where sequences begin and end in the batch's rows one after
                another, torch.int32, shape = [num_seqs + 1]. None: each row is one.
            max_seqlen: Length of the longest, if known.

        Returns:
            shape = [batch, seq, num_heads, value_size].
        """
        batch, _, seq, _ = query.shape
        q, k, v = (tensor.transpose(1, 2) for tensor in (query, key, value))
        value_size = v.shape[-1]
        if value_size < self.head_size:
            v = nn.functional.pad(v, (0, self.head_size - value_size))
        if cu_seqlens is not None:
            q, k, v = (tensor.flatten(0, 1) for tensor in (q, k, v))
        output = self(
            q.contiguous(), k.contiguous(), v.contiguous(), cu_seqlens, max_seqlen
        )
        return output.view(batch, seq, self.num_heads, -1)[..., :value_size]
