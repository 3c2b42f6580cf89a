# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""What VLLM_BATCH_INVARIANT=1 means on CPU.

- Linear layers multiply with oneDNN, whose rows do not depend on their number.
- Attention is computed in pieces of so few query tokens that each is computed as a
  decode step is, and no thread takes a part of a sequence's keys.
- An all-reduce adds up the ranks in their order.

The rest of a model built from the training layers is independent of the batch as it
is. Called by the engine; the trainer calls the same functions.
"""

from __future__ import annotations

import os
from typing import Any, NamedTuple

import torch


def init() -> None:
    """Set up a worker process."""
    os.environ["VLLM_CPU_ATTN_SPLIT_KV"] = "0"


def pack_linear(layer: Any, remove_weight: bool) -> None:
    """Give a vLLM layer its product with a packed copy of its weight.

    Args:
        layer: a linear layer or head; `cpu_linear` becomes its product.
        remove_weight: free the weight itself.

    Raises:
        NotImplementedError: a weight that is not a matrix, as of convolutions and
            mixtures of experts.
    """
    from vllm.model_executor.layers.training.ops.linear.cpu import PackedWeight

    weight = layer.weight
    if weight.is_meta:
        layer.cpu_linear = torch.nn.functional.linear
        return
    if weight.ndim != 2:
        raise NotImplementedError(
            f"VLLM_BATCH_INVARIANT=1 on CPU has no kernel for {type(layer).__name__} "
            f"with a weight of shape {tuple(weight.shape)}; it serves models of "
            "linear layers, norms and attention. Unset VLLM_BATCH_INVARIANT."
        )
    packed = PackedWeight(weight)
    layer.cpu_linear = lambda x, weight, bias: packed(x, bias)
    if remove_weight:
        layer.weight = torch.nn.Parameter(weight.new_empty(0), requires_grad=False)


def all_reduce(communicator: Any, input_: torch.Tensor) -> torch.Tensor:
    """Sum over a communicator's ranks, in their order, in place.

    Args:
        communicator: vLLM's communicator of the group.
        input_: any shape, floating point, of this rank.
    """
    from vllm.model_executor.layers.training.ops.ordered_sum import ordered_sum

    gathered = communicator.all_gather(input_.contiguous().view(1, -1), dim=0)
    return input_.copy_(ordered_sum(gathered).view(input_.shape))


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
