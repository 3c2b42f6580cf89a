# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""Attention over packed sequences on CUDA, forward, with every feature.

Online softmax: Milakov & Gimelshein (2018), arXiv:1805.02867; the loop over tiles of
keys: Dao (2023), arXiv:2307.08691. A sink is where the online softmax starts: with one
term, whose value is zero.
"""

from __future__ import annotations

import torch

from vllm.model_executor.layers.training.ops.attention.call import AttentionCall
from vllm.model_executor.layers.training.ops.attention.triton_common import (
    LN2,
    LOG2E,
    Tiles,
    block_of_sequence,
    count_blocks,
    count_tiles,
    is_visible,
    load_rows,
    numbers_of,
    scores_of,
    store_rows,
    tile_start,
    tiles_to_visit,
)
from vllm.model_executor.op_library import has_large_shared_memory
from vllm.triton_utils import tl, triton


def attention_forward_triton(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    call: AttentionCall,
    _tiles: Tiles | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention within each sequence.

    Args:
        query: shape = [num_tokens, num_heads, head_size]; any strides but the last.
        key: shape = [num_tokens, num_kv_heads, head_size], likewise.
        value: like key.
        call: its max_seqlen is not read: the blocks of all sequences are counted in
            num_tokens.

    Returns:
        The output, in the query's shape and dtype, contiguous, and the logarithm of
        the sum of each softmax, sink included: fp32, shape = [num_heads, num_tokens].
    """
    num_tokens, num_heads, head_size = query.shape
    output = query.new_empty(query.shape)
    lse = query.new_empty(num_heads, num_tokens, dtype=torch.float32)
    num_sequences = call.cu_seqlens.numel() - 1
    if not output.numel():
        return output, lse
    tiles = _tiles or _choose_tiles(head_size, query)
    blocks = count_blocks(num_tokens, num_sequences, tiles.queries)
    _forward_kernel[(blocks, num_heads)](
        query,
        key,
        value,
        output,
        lse,
        call.cu_seqlens,
        call.sinks,
        call.alibi_slopes,
        *query.stride()[:2],
        *key.stride()[:2],
        *value.stride()[:2],
        *output.stride()[:2],
        num_tokens,
        num_sequences,
        num_heads // key.shape[1],
        *numbers_of(call.spec),
        CAUSAL=call.spec.causal,
        HEAD_SIZE=head_size,
        PADDED_HEAD_SIZE=max(16, triton.next_power_of_2(head_size)),
        QUERIES=tiles.queries,
        KEYS=tiles.keys,
        num_warps=tiles.num_warps,
        num_stages=tiles.num_stages,
    )
    return output, lse


def _choose_tiles(head_size: int, query: torch.Tensor) -> Tiles:
    if query.dtype == torch.float32:
        return Tiles(32, 32 if head_size <= 128 else 16, 8, 1)
    if has_large_shared_memory(query.device):
        return Tiles(64, 64, 4, 3) if head_size <= 128 else Tiles(128, 32, 8, 2)
    if head_size <= 64:
        return Tiles(128, 64, 4, 2)
    return Tiles(64, 32, 4, 2) if head_size <= 128 else Tiles(64, 32, 4, 1)


@triton.jit(do_not_specialize=["num_tokens", "num_sequences", "group", "window"])
def _forward_kernel(
    query,
    key,
    value,
    output,
    lse,
    cu_seqlens,
    sinks,
    alibi_slopes,
    query_stride,
    query_head_stride,
    key_stride,
    key_head_stride,
    value_stride,
    value_head_stride,
    output_stride,
    output_head_stride,
    num_tokens,
    num_sequences,
    group,
    scale,
    window,
    soft_cap,
    CAUSAL: tl.constexpr,
    HEAD_SIZE: tl.constexpr,
    PADDED_HEAD_SIZE: tl.constexpr,
    QUERIES: tl.constexpr,
    KEYS: tl.constexpr,
):
    start, length, first = block_of_sequence(cu_seqlens, num_sequences, CAUSAL, QUERIES)
    if first >= length:
        return
    head = tl.program_id(1).to(tl.int64)
    token = start + first
    rows_left = length - first
    query += token * query_stride + head * query_head_stride
    key += start * key_stride + head // group * key_head_stride
    value += start * value_stride + head // group * value_head_stride
    output += token * output_stride + head * output_head_stride

    q = load_rows(
        query, query_stride, rows_left, HEAD_SIZE, PADDED_HEAD_SIZE, QUERIES, True
    )
    slope = None
    if alibi_slopes is not None:
        slope = tl.load(alibi_slopes + head)
    if sinks is not None:
        sink = tl.load(sinks + head).to(tl.float32) * LOG2E
        maximum = tl.zeros([QUERIES], tl.float32) + sink
        total = tl.full([QUERIES], 1.0, tl.float32)
    else:
        maximum = tl.full([QUERIES], float("-inf"), tl.float32)
        total = tl.zeros([QUERIES], tl.float32)
    sums = tl.zeros([QUERIES, PADDED_HEAD_SIZE], tl.float32)

    low, full_low, full_high, high = tiles_to_visit(
        first, length, window, CAUSAL, True, QUERIES, KEYS
    )
    for MASKED in tl.static_range(2):
        sums, maximum, total = _attend(
            sums,
            maximum,
            total,
            q,
            key,
            value,
            key_stride,
            value_stride,
            first,
            length,
            low,
            full_low,
            full_high,
            high,
            scale,
            window,
            soft_cap,
            slope,
            MASKED,
            CAUSAL,
            HEAD_SIZE,
            PADDED_HEAD_SIZE,
            QUERIES,
            KEYS,
        )

    store_rows(
        output,
        output_stride,
        rows_left,
        sums / total[:, None],
        HEAD_SIZE,
        PADDED_HEAD_SIZE,
        QUERIES,
    )
    row = tl.arange(0, QUERIES)
    tl.store(
        lse + head * num_tokens + token + row,
        (maximum + tl.log2(total)) * LN2,
        mask=row < rows_left,
    )


@triton.jit
def _attend(
    sums,
    maximum,
    total,
    q,
    key,
    value,
    key_stride,
    value_stride,
    first,
    length,
    low,
    full_low,
    full_high,
    high,
    scale,
    window,
    soft_cap,
    slope,
    MASKED: tl.constexpr,
    CAUSAL: tl.constexpr,
    HEAD_SIZE: tl.constexpr,
    PADDED_HEAD_SIZE: tl.constexpr,
    QUERIES: tl.constexpr,
    KEYS: tl.constexpr,
):
    """Visit the tiles of keys at the mask's edges (MASKED), or the others."""
    query_index = first + tl.arange(0, QUERIES)[:, None]
    for index in range(count_tiles(low, full_low, full_high, high, MASKED, KEYS)):
        tile = tile_start(index, low, full_low, full_high, MASKED, KEYS)
        k = load_rows(
            key + tile.to(tl.int64) * key_stride,
            key_stride,
            length - tile,
            HEAD_SIZE,
            PADDED_HEAD_SIZE,
            KEYS,
            MASKED,
        )
        v = load_rows(
            value + tile.to(tl.int64) * value_stride,
            value_stride,
            length - tile,
            HEAD_SIZE,
            PADDED_HEAD_SIZE,
            KEYS,
            MASKED,
        )
        key_index = tile + tl.arange(0, KEYS)[None, :]
        products = tl.dot(q, tl.trans(k), input_precision="ieee")
        scores, _ = scores_of(products, query_index, key_index, scale, soft_cap, slope)
        if MASKED:
            visible = is_visible(query_index, key_index, length, window, CAUSAL)
            scores = tl.where(visible, scores, float("-inf"))
        new_maximum = tl.maximum(maximum, tl.max(scores, 1))
        # A row that has seen no key yet, or only scores of -inf.
        reference = tl.where(new_maximum == float("-inf"), 0.0, new_maximum)
        shrink = tl.exp2(maximum - reference)
        weights = tl.exp2(scores - reference[:, None])
        total = total * shrink + tl.sum(weights, 1)
        sums = sums * shrink[:, None]
        sums = tl.dot(weights.to(v.dtype), v, sums, input_precision="ieee")
        maximum = new_maximum
    return sums, maximum, total
