# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""Specification of the rotary embedding, in plain torch."""

from __future__ import annotations

import torch


def rotary_embedding_reference(
    positions: torch.Tensor,
    query: torch.Tensor,
    key: torch.Tensor,
    cos_sin_cache: torch.Tensor,
    is_neox_style: bool,
    inverse: bool = False,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Rotate query and key; arguments as in `rotary_embedding`."""
    dtype = torch.promote_types(query.dtype, torch.float32)
    rows = cos_sin_cache.index_select(0, positions).to(dtype).unsqueeze(-2)
    cos, sin = rows.chunk(2, dim=-1)
    sin = -sin if inverse else sin

    def rotate(x: torch.Tensor) -> torch.Tensor:
        rotary_dim = rows.shape[-1]
        rotated, kept = x.to(dtype).tensor_split((rotary_dim,), dim=-1)
        # Pairs in the last dim.
        rotated = rotated.unflatten(-1, (2, -1) if is_neox_style else (-1, 2))
        pairs = rotated.mT if is_neox_style else rotated
        first, second = pairs.unbind(-1)
        pairs = torch.stack(
            (first * cos - second * sin, second * cos + first * sin), dim=-1
        )
        rotated = (pairs.mT if is_neox_style else pairs).flatten(-2)
        return torch.cat((rotated, kept), dim=-1).to(x.dtype)

    return rotate(query), rotate(key)
