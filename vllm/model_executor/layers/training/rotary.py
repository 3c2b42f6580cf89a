# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""Rotary position embedding."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch

from vllm.model_executor.layers.training.arguments import (
    check_sizes,
    is_finite,
    is_integer,
)
from vllm.model_executor.layers.training.base import TrainingLayer
from vllm.model_executor.layers.training.computed_buffer import buffer_for, home_of
from vllm.model_executor.layers.training.ops.rotary.op import rotary_embedding
from vllm.model_executor.layers.training.rotary_scaling import (
    check_rope_scaling,
    compute_cos_sin_cache,
)
from vllm.model_executor.parallel_context import ParallelContext


class RotaryEmbedding(TrainingLayer):
    """Rotates pairs of query and key features by position (arXiv:2104.09864).

    The pair i of rotary_dim / 2 is rotated by position * base^(-2 i / rotary_dim),
    or as `rope_scaling` has it. Cosines and sines are computed in fp32 on the CPU, so
    they are the same on every device, and used unrounded. Trainer and engine run this
    layer and the same op.

    Args:
        head_size: Size of each head.
        rotary_dim: The leading features of a head that are rotated. If None,
            rope_scaling's partial_rotary_factor of the head, or all of it.
        max_position_embeddings: Number of positions; "linear" and "yarn" scaling have
            more.
        base: Base of the geometric progression of frequencies. If None, rope_scaling's
            rope_theta, or 10000.
        is_neox_style: A pair is feature i and i + rotary_dim / 2; else 2 i and
            2 i + 1 (GPT-J).
        rope_scaling: How positions are scaled, as Hugging Face's configs and vLLM's
            `get_rope` have it: `rope_parameters`, or `rope_scaling` of older ones. Its
            rope_type is default, linear, dynamic, yarn or llama3; `rotary_scaling`
            has the formulas and the other keys.
        parallel_context: Accepted for uniformity; the layer is the same on all
            ranks.

    Attributes:
        cos_sin_cache: shape = [num_positions, rotary_dim], fp32; cosines in the first
            half. Not part of the state dict. It stays fp32 when the module is cast,
            and is on the CPU while the module is on the meta device.

    Raises:
        ValueError: Sizes are not positive integers, rotary_dim is odd or exceeds
            head_size, rope_scaling is unknown or incomplete, or contradicts rotary_dim
            or base, or angles cannot be computed from the numbers.
    """

    cos_sin_cache: torch.Tensor

    def __init__(
        self,
        head_size: int,
        rotary_dim: int | None = None,
        max_position_embeddings: int = 8192,
        base: float | None = None,
        is_neox_style: bool = True,
        *,
        rope_scaling: Mapping[str, Any] | None = None,
        parallel_context: ParallelContext | None = None,
    ) -> None:
        super().__init__(parallel_context)
        check_sizes(
            "RotaryEmbedding",
            head_size=head_size,
            max_position_embeddings=max_position_embeddings,
        )
        self.rope_scaling = check_rope_scaling(rope_scaling)
        given = rope_scaling or {}
        part = given.get("partial_rotary_factor")
        scaled_dim = None if part is None else int(head_size * part)
        rotary_dim = _agreed("rotary_dim", rotary_dim, scaled_dim, head_size)
        base = _agreed("base", base, given.get("rope_theta"), 10000.0)
        if not is_integer(rotary_dim) or rotary_dim not in range(2, head_size + 1, 2):
            raise ValueError(
                f"rotary_dim={rotary_dim!r} must be even and from 2 to "
                f"head_size={head_size}."
            )
        if not is_finite(base) or base <= 0:
            raise ValueError(
                f"RotaryEmbedding got base={base!r}; it must be a finite number above "
                "0, such as 10000."
            )
        self.head_size = head_size
        self.rotary_dim = rotary_dim
        self.max_position_embeddings = max_position_embeddings
        self.base = float(base)
        self.is_neox_style = is_neox_style
        cache = self._compute_cos_sin_cache(torch.get_default_device())
        self.register_buffer("cos_sin_cache", cache, persistent=False)

    def _compute_cos_sin_cache(self, device: torch.device) -> torch.Tensor:
        cache = compute_cos_sin_cache(
            self.rotary_dim, self.max_position_embeddings, self.base, self.rope_scaling
        )
        return cache.to(home_of(device))

    def _apply(
        self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True
    ) -> RotaryEmbedding:
        """Move with the module, but keep the cache's values and dtype."""
        if self.cos_sin_cache.is_meta:  # Others can put it there.
            self.cos_sin_cache = self._compute_cos_sin_cache(torch.device("cpu"))
        super()._apply(fn, recurse)
        self.cos_sin_cache = self._compute_cos_sin_cache(self.cos_sin_cache.device)
        return self

    def forward(
        self, positions: torch.Tensor, query: torch.Tensor, key: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Rotate query and key.

        Args:
            positions: int32 or int64, shape = [num_tokens] or [batch, seq]. On CUDA a
                position outside the cache makes its token's rotated features NaN.
            query: shape = [*positions.shape, num_heads, head_size] or
                [*positions.shape, num_heads * head_size]. Slices of one tensor, such
                as the projection to query, key and value, are not copied.
            key: As query, with the key's number of heads, dtype of query.

        Returns:
            The rotated query and key, in their own shapes.

        Raises:
            ValueError: Shapes, dtypes or devices do not match. If weights were put on
                another device than the cache, as by
                `load_state_dict(assign=True)`, move the module there with `to`.
            IndexError: On CPU, a position is outside the cache.
        """
        rotated = rotary_embedding(
            positions.flatten(),
            self._as_heads("query", query, positions),
            self._as_heads("key", key, positions),
            buffer_for(query, "cos_sin_cache", self.cos_sin_cache),
            self.is_neox_style,
        )
        return rotated[0].view(query.shape), rotated[1].view(key.shape)

    def _as_heads(
        self, name: str, tensor: torch.Tensor, positions: torch.Tensor
    ) -> torch.Tensor:
        """shape = [num_tokens, num_heads, head_size] of query or key."""
        dims = positions.ndim
        features = tensor.shape[dims:]
        if (
            tensor.shape[:dims] != positions.shape
            or len(features) not in (1, 2)
            or features[-1] % self.head_size
            or (len(features) == 2 and features[1] != self.head_size)
        ):
            raise ValueError(
                f"{name} of shape {tuple(tensor.shape)} does not fit positions of "
                f"shape {tuple(positions.shape)} and head_size={self.head_size}; its "
                "shape must be [*positions.shape, num_heads, head_size] or "
                "[*positions.shape, num_heads * head_size]."
            )
        num_heads = features.numel() // self.head_size
        return tensor.reshape(positions.numel(), num_heads, self.head_size)

    def extra_repr(self) -> str:
        return (
            f"head_size={self.head_size}, rotary_dim={self.rotary_dim}, "
            f"max_position_embeddings={self.max_position_embeddings}, "
            f"base={self.base}, is_neox_style={self.is_neox_style}, "
            f"rope_scaling={self.rope_scaling}"
        )


def _agreed(name: str, given: Any, scaled: Any, default: Any) -> Any:
    """An argument that rope_scaling may hold too."""
    if None not in (given, scaled) and given != scaled:
        raise ValueError(
            f"{name}={given}, but rope_scaling says {scaled}; give one of them."
        )
    values = (value for value in (given, scaled) if value is not None)
    return next(values, default)
