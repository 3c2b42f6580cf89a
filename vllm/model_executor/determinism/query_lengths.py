# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""How queries are cut, so that every step runs the same attention kernel.

Attention kernels choose their tiles by the number of queries, and with the tile the
order in which keys are added up.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

# Of queries times heads of one KV head, in the kernel.
ROWS_OF_A_TILE = 8


class Pieces(NamedTuple):
    """Requests cut into pieces, which the attention kernel takes for requests.

    Attributes:
        num_reqs: number of pieces.
        query_start_loc: shape = [num_reqs + 1], int32
        seq_lens: tokens up to a piece's last, shape = [num_reqs], int32
        block_table: shape = [num_reqs, max_blocks], int32
        max_query_len: tokens of the longest piece.
    """

    num_reqs: int
    query_start_loc: torch.Tensor
    seq_lens: torch.Tensor
    block_table: torch.Tensor
    max_query_len: int


def cut_requests(
    query_start_loc: torch.Tensor,
    seq_lens: torch.Tensor,
    block_table: torch.Tensor,
    causal: bool | torch.Tensor,
    num_heads: int,
    num_kv_heads: int,
) -> Pieces:
    """Cut requests into pieces that the kernel computes as it computes a decode step.

    The kernel's tile of keys, which decides the order of its sums, depends on its
    number of query rows, a token's heads of one KV head being rows of their own.

    Args:
        query_start_loc: shape = [num_reqs + 1], int32
        seq_lens: tokens in the cache after this step, shape = [num_reqs], int32
        block_table: shape = [num_reqs, max_blocks], int32
        causal: whether attention is.
        num_heads: query heads.
        num_kv_heads: key/value heads.

    Raises:
        NotImplementedError: attention that is not causal.
    """
    if causal is not True:
        raise NotImplementedError(
            "VLLM_BATCH_INVARIANT=1 on CPU has causal attention only; this layer's is "
            "not. Unset VLLM_BATCH_INVARIANT."
        )
    rows, rest = divmod(ROWS_OF_A_TILE, num_heads // num_kv_heads)
    longest = ROWS_OF_A_TILE if rest or not rows else rows
    lengths = query_start_loc.diff()
    counts = (lengths + (longest - 1)) // longest
    request = torch.arange(len(lengths)).repeat_interleave(counts)
    number = torch.arange(len(request)) - (counts.cumsum(0) - counts)[request]
    stops = query_start_loc[1:][request]
    starts = query_start_loc[:-1][request] + number * longest
    ends = torch.minimum(starts + longest, stops)
    return Pieces(
        num_reqs=len(request),
        query_start_loc=torch.cat([query_start_loc[:1], ends]).int(),
        seq_lens=(seq_lens[request] - (stops - ends)).int(),
        block_table=block_table[request],
        max_query_len=longest,
    )


def invariant_query_len(max_query_len: int, head_size: int) -> int:
    """What to call the longest query, so that one kernel computes decode and prefill.

    FlashAttention 3 takes another for queries of one token, and for heads of 64 another
    for groups of heads that have at most 64 rows together; both visit other numbers of
    keys at a time. (For heads of 128 the second visits as many.)
    """
    return max(max_query_len, 65 if head_size == 64 else 2)
