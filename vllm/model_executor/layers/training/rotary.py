# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""Rotary position embedding."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from vllm.model_executor.layers.training.base import TrainingLayer
from vllm.model_executor.parallel_context import ParallelContext


class RotaryEmbedding(TrainingLayer):
    """Rotates pairs of query and key features by position (arXiv:2104.09864).

    The pair i of rotary_dim / 2 is rotated by position * base^(-2 i / rotary_dim).
    Cosines and sines are computed in fp32 on the CPU, so they are the same on every
    device, and rounded to the query's dtype before use, as in vLLM's native
    operation; the bits are the same. Trainer and engine both run this layer.

    Args:
        head_size: size of each head.
        rotary_dim: the leading features of a head that are rotated; head_size if
            None.
        max_position_embeddings: number of positions.
        base: base of the geometric progression of frequencies.
        is_neox_style: a pair is feature i and i + rotary_dim / 2; else 2 i and
            2 i + 1 (GPT-J).
        parallel_context: accepted for uniformity; the layer is the same on all
            ranks.

    Attributes:
        cos_sin_cache: shape = [max_position_embeddings, rotary_dim], fp32; cosines
            in the first half. Not part of the state dict. It stays fp32 when the
            module is cast.

    Raises:
        ValueError: rotary_dim is odd or exceeds head_size.
    """

    cos_sin_cache: torch.Tensor

    def __init__(
        self,
        head_size: int,
        rotary_dim: int | None = None,
        max_position_embeddings: int = 8192,
        base: float = 10000.0,
        is_neox_style: bool = True,
        *,
        parallel_context: ParallelContext | None = None,
    ) -> None:
        super().__init__(parallel_context)
        rotary_dim = head_size if rotary_dim is None else rotary_dim
        if rotary_dim % 2 or not 0 < rotary_dim <= head_size:
            raise ValueError(
                f"rotary_dim={rotary_dim} must be even and from 2 to "
                f"head_size={head_size}."
            )
        self.head_size = head_size
        self.rotary_dim = rotary_dim
        self.max_position_embeddings = max_position_embeddings
        self.base = base
        self.is_neox_style = is_neox_style
        cache = self._compute_cos_sin_cache().to(torch.get_default_device())
        self.register_buffer("cos_sin_cache", cache, persistent=False)

    def _compute_cos_sin_cache(self) -> torch.Tensor:
        kwargs: dict[str, Any] = {"dtype": torch.float32, "device": "cpu"}
        exponents = torch.arange(0, self.rotary_dim, 2, **kwargs) / self.rotary_dim
        frequencies = 1.0 / self.base**exponents
        positions = torch.arange(self.max_position_embeddings, **kwargs)
        angles = torch.outer(positions, frequencies)
        return torch.cat((angles.cos(), angles.sin()), dim=-1)

    def _apply(
        self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True
    ) -> RotaryEmbedding:
        """Move with the module, but keep the cache's values and dtype."""
        super()._apply(fn, recurse)
        cache = self.cos_sin_cache
        if not cache.is_meta:
            self.cos_sin_cache = self._compute_cos_sin_cache().to(cache.device)
        return self

    def forward(
        self, positions: torch.Tensor, query: torch.Tensor, key: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Rotate query and key.

        Args:
            positions: integers, shape = [num_tokens] or [batch, seq].
            query: shape = [*positions.shape, num_heads, head_size] or
                [*positions.shape, num_heads * head_size].
            key: as query, with the key's number of heads.

        Returns:
            The rotated query and key, in their own shapes.

        Raises:
            ValueError: shapes that do not fit each other.
            IndexError: a position beyond max_position_embeddings.
        """
        for name, tensor in (("query", query), ("key", key)):
            self._check_shapes(name, tensor, positions)
        try:
            rows = self.cos_sin_cache.index_select(0, positions.flatten())
        except IndexError as error:
            raise IndexError(
                f"positions go from {positions.min()} to {positions.max()}; this "
                "RotaryEmbedding holds positions 0 to "
                f"{self.max_position_embeddings - 1}. Build it with a larger "
                "max_position_embeddings."
            ) from error
        cos, sin = rows.to(query.dtype).unsqueeze(-2).chunk(2, dim=-1)
        return self._rotate(query, cos, sin), self._rotate(key, cos, sin)

    def _check_shapes(
        self, name: str, tensor: torch.Tensor, positions: torch.Tensor
    ) -> None:
        dims = positions.ndim
        if (
            tensor.shape[:dims] != positions.shape
            or tensor.ndim not in (dims + 1, dims + 2)
            or tensor.shape[-1] % self.head_size
        ):
            raise ValueError(
                f"{name} of shape {tuple(tensor.shape)} does not fit positions of "
                f"shape {tuple(positions.shape)} and head_size={self.head_size}; its "
                "shape must be [*positions.shape, num_heads, head_size] or "
                "[*positions.shape, num_heads * head_size]."
            )

    def _rotate(
        self, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor
    ) -> torch.Tensor:
        """Rotate one tensor.

        Args:
            x: query or key in any accepted layout.
            cos: shape = [num_tokens, 1, rotary_dim / 2].
            sin: the shape of cos.
        """
        num_tokens = cos.shape[0]
        num_heads = x.numel() // (num_tokens * self.head_size) if num_tokens else 1
        heads = x.reshape(num_tokens, num_heads, self.head_size)
        rotated, kept = heads.split(
            (self.rotary_dim, self.head_size - self.rotary_dim), dim=-1
        )
        if self.is_neox_style:
            first, second = rotated.chunk(2, dim=-1)
        else:
            first, second = rotated[..., ::2], rotated[..., 1::2]
        turned = (first * cos - second * sin, second * cos + first * sin)
        if self.is_neox_style:
            output = torch.cat((*turned, kept), dim=-1)
        else:
            output = torch.cat((torch.stack(turned, dim=-1).flatten(-2), kept), dim=-1)
        return output.reshape(x.shape)

    def extra_repr(self) -> str:
        return (
            f"head_size={self.head_size}, rotary_dim={self.rotary_dim}, "
            f"max_position_embeddings={self.max_position_embeddings}, "
            f"base={self.base}, is_neox_style={self.is_neox_style}"
        )
