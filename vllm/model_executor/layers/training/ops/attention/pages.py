# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""Packed keys as a cache with pages, for the engine's kernels.

A trainer's keys and values are a cache whose pages hold one token. The page size
decides where keys are read, and no bit of the result.
"""

from __future__ import annotations

import torch

# Kernels may read the entries of whole tiles of so many keys.
TILE = 32


def pages_of_one(
    key: torch.Tensor, value: torch.Tensor, cu_seqlens: torch.Tensor, max_seqlen: int
) -> tuple[torch.Tensor, torch.Tensor, dict[str, torch.Tensor]]:
    """Each sequence as a request whose pages hold one token.

    Args:
        key: shape = [num_tokens, num_kv_heads, head_size]
        value: likewise.
        cu_seqlens: int32, shape = [num_seqs + 1]
        max_seqlen: no sequence is longer.

    Returns:
        The pages of keys and of values, shape = [num_tokens, 1, num_kv_heads,
        head_size], and the engine's arguments that say which are whose.
    """
    requests = {
        "seqused_k": cu_seqlens.diff(),
        "block_table": block_table_of(cu_seqlens, max_seqlen),
    }
    return key.unsqueeze(1), value.unsqueeze(1), requests


def block_table_of(cu_seqlens: torch.Tensor, max_seqlen: int) -> torch.Tensor:
    """The page of each position: its token, as pages have one.

    Entries past a sequence's end lead nowhere, and no kernel follows them.

    Args:
        cu_seqlens: int32, shape = [num_seqs + 1]
        max_seqlen: no sequence is longer.

    Returns:
        int32, shape = [num_seqs, max_seqlen rounded up to whole tiles]
    """
    columns = -(-max_seqlen // TILE) * TILE
    positions = torch.arange(columns, dtype=torch.int32, device=cu_seqlens.device)
    return cu_seqlens[:-1].unsqueeze(1) + positions
