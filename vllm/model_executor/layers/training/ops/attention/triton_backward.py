# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""Attention over packed sequences on CUDA, backward, with every feature.

Dao (2023), arXiv:2307.08691, section 3.1, with one kernel for the keys' and values'
gradients and another for the queries', so that each sum is made by one program, in a
fixed order, without atomics.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from vllm.model_executor.layers.training.ops.attention.call import AttentionCall
from vllm.model_executor.layers.training.ops.attention.triton_common import (
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


class BackwardTiles(NamedTuple):
    for_query: Tiles
    for_key: Tiles


def attention_backward_triton(
    grad_output: torch.Tensor,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    output: torch.Tensor,
    lse: torch.Tensor,
    call: AttentionCall,
    _tiles: BackwardTiles | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gradients of `attention_forward_triton`, whose arguments and results it takes.

    Sinks are not among them: `lse` includes them.

    Returns:
        The gradients of query, key and value, in their shapes and dtypes, contiguous.
    """
    num_tokens, num_heads, head_size = query.shape
    num_kv_heads = key.shape[1]
    grad_query, grad_key, grad_value = (
        tensor.new_empty(tensor.shape) for tensor in (query, key, value)
    )
    if not query.numel():
        return grad_query, grad_key, grad_value
    tiles = _tiles or _choose_tiles(head_size, query)
    padded_head_size = max(16, triton.next_power_of_2(head_size))
    delta = torch.empty_like(lse)
    _delta_kernel[(triton.cdiv(num_tokens, 32), num_heads)](
        grad_output,
        output,
        delta,
        *grad_output.stride()[:2],
        *output.stride()[:2],
        num_tokens,
        HEAD_SIZE=head_size,
        PADDED_HEAD_SIZE=padded_head_size,
        ROWS=32,
    )
    num_sequences = call.cu_seqlens.numel() - 1
    inputs = (grad_output, query, key, value, lse, delta)
    of_call = (call.cu_seqlens, call.alibi_slopes)
    strides = [
        stride
        for tensor in (grad_output, query, key, value)
        for stride in tensor.stride()[:2]
    ]
    group = num_heads // num_kv_heads
    numbers = numbers_of(call.spec)

    blocks = count_blocks(num_tokens, num_sequences, tiles.for_key.keys)
    _grad_key_value_kernel[(blocks, num_kv_heads)](
        *inputs,
        *of_call,
        grad_key,
        grad_value,
        *strides,
        *grad_key.stride()[:2],
        num_tokens,
        num_sequences,
        group,
        *numbers,
        CAUSAL=call.spec.causal,
        HEAD_SIZE=head_size,
        PADDED_HEAD_SIZE=padded_head_size,
        QUERIES=tiles.for_key.queries,
        KEYS=tiles.for_key.keys,
        num_warps=tiles.for_key.num_warps,
        num_stages=tiles.for_key.num_stages,
    )
    blocks = count_blocks(num_tokens, num_sequences, tiles.for_query.queries)
    _grad_query_kernel[(blocks, num_heads)](
        *inputs,
        *of_call,
        grad_query,
        *strides,
        *grad_query.stride()[:2],
        num_tokens,
        num_sequences,
        group,
        *numbers,
        CAUSAL=call.spec.causal,
        HEAD_SIZE=head_size,
        PADDED_HEAD_SIZE=padded_head_size,
        QUERIES=tiles.for_query.queries,
        KEYS=tiles.for_query.keys,
        num_warps=tiles.for_query.num_warps,
        num_stages=tiles.for_query.num_stages,
    )
    return grad_query, grad_key, grad_value


def _choose_tiles(head_size: int, query: torch.Tensor) -> BackwardTiles:
    if query.dtype == torch.float32:
        if head_size <= 128:
            return BackwardTiles(Tiles(32, 32, 8, 1), Tiles(32, 32, 8, 1))
        return BackwardTiles(Tiles(32, 16, 8, 1), Tiles(16, 32, 8, 1))
    if has_large_shared_memory(query.device):
        if head_size <= 64:
            return BackwardTiles(Tiles(64, 64, 4, 2), Tiles(64, 64, 4, 2))
        if head_size <= 128:
            return BackwardTiles(Tiles(64, 64, 4, 2), Tiles(32, 64, 4, 3))
        return BackwardTiles(Tiles(64, 32, 4, 2), Tiles(32, 64, 8, 2))
    if head_size <= 64:
        return BackwardTiles(Tiles(64, 64, 4, 2), Tiles(64, 64, 4, 2))
    if head_size <= 128:
        return BackwardTiles(Tiles(64, 32, 4, 2), Tiles(32, 64, 4, 2))
    return BackwardTiles(Tiles(32, 32, 4, 1), Tiles(32, 32, 4, 1))


@triton.jit(do_not_specialize=["num_tokens"])
def _delta_kernel(
    grad_output,
    output,
    delta,
    grad_output_stride,
    grad_output_head_stride,
    output_stride,
    output_head_stride,
    num_tokens,
    HEAD_SIZE: tl.constexpr,
    PADDED_HEAD_SIZE: tl.constexpr,
    ROWS: tl.constexpr,
):
    """Rows' sums of grad_output * output; shape = [num_heads, num_tokens]."""
    token = tl.program_id(0).to(tl.int64) * ROWS
    head = tl.program_id(1).to(tl.int64)
    rows_left = num_tokens - token
    grad = load_rows(
        grad_output + token * grad_output_stride + head * grad_output_head_stride,
        grad_output_stride,
        rows_left,
        HEAD_SIZE,
        PADDED_HEAD_SIZE,
        ROWS,
        True,
    )
    out = load_rows(
        output + token * output_stride + head * output_head_stride,
        output_stride,
        rows_left,
        HEAD_SIZE,
        PADDED_HEAD_SIZE,
        ROWS,
        True,
    )
    row = tl.arange(0, ROWS)
    tl.store(
        delta + head * num_tokens + token + row,
        tl.sum(grad.to(tl.float32) * out.to(tl.float32), 1),
        mask=row < rows_left,
    )


@triton.jit
def _weights_of(
    products,
    query_index,
    key_index,
    lse,
    length,
    scale,
    window,
    soft_cap,
    slope,
    MASKED: tl.constexpr,
    CAUSAL: tl.constexpr,
):
    """The softmax of a tile, and `scores_of`'s tanh."""
    scores, tanh = scores_of(products, query_index, key_index, scale, soft_cap, slope)
    weights = tl.exp2(scores - lse * LOG2E)
    if MASKED:
        visible = is_visible(query_index, key_index, length, window, CAUSAL)
        weights = tl.where(visible, weights, 0.0)
    return weights, tanh


@triton.jit
def _grad_products_of(weights, grad_weights, delta, soft_cap, tanh):
    """The gradient of a tile's products of queries and keys, apart from `scale`."""
    grad_products = weights * (grad_weights - delta)
    if soft_cap is not None:
        grad_products *= 1.0 - tanh * tanh
    return grad_products


@triton.jit(do_not_specialize=["num_tokens", "num_sequences", "group", "window"])
def _grad_query_kernel(
    grad_output,
    query,
    key,
    value,
    lse,
    delta,
    cu_seqlens,
    alibi_slopes,
    grad_query,
    grad_output_stride,
    grad_output_head_stride,
    query_stride,
    query_head_stride,
    key_stride,
    key_head_stride,
    value_stride,
    value_head_stride,
    grad_query_stride,
    grad_query_head_stride,
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
    key += start * key_stride + head // group * key_head_stride
    value += start * value_stride + head // group * value_head_stride

    q = load_rows(
        query + token * query_stride + head * query_head_stride,
        query_stride,
        rows_left,
        HEAD_SIZE,
        PADDED_HEAD_SIZE,
        QUERIES,
        True,
    )
    grad = load_rows(
        grad_output + token * grad_output_stride + head * grad_output_head_stride,
        grad_output_stride,
        rows_left,
        HEAD_SIZE,
        PADDED_HEAD_SIZE,
        QUERIES,
        True,
    )
    row = tl.arange(0, QUERIES)
    of_row = head * num_tokens + token + row
    row_lse = tl.load(lse + of_row, mask=row < rows_left, other=0.0)
    row_delta = tl.load(delta + of_row, mask=row < rows_left, other=0.0)
    slope = None
    if alibi_slopes is not None:
        slope = tl.load(alibi_slopes + head)
    sums = tl.zeros([QUERIES, PADDED_HEAD_SIZE], tl.float32)
    query_index = first + row[:, None]

    low, full_low, full_high, high = tiles_to_visit(
        first, length, window, CAUSAL, True, QUERIES, KEYS
    )
    for MASKED in tl.static_range(2):
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
            weights, tanh = _weights_of(
                tl.dot(q, tl.trans(k), input_precision="ieee"),
                query_index,
                tile + tl.arange(0, KEYS)[None, :],
                row_lse[:, None],
                length,
                scale,
                window,
                soft_cap,
                slope,
                MASKED,
                CAUSAL,
            )
            grad_weights = tl.dot(grad, tl.trans(v), input_precision="ieee")
            grad_products = _grad_products_of(
                weights, grad_weights, row_delta[:, None], soft_cap, tanh
            )
            sums = tl.dot(grad_products.to(k.dtype), k, sums, input_precision="ieee")

    store_rows(
        grad_query + token * grad_query_stride + head * grad_query_head_stride,
        grad_query_stride,
        rows_left,
        sums * scale,
        HEAD_SIZE,
        PADDED_HEAD_SIZE,
        QUERIES,
    )


@triton.jit(do_not_specialize=["num_tokens", "num_sequences", "group", "window"])
def _grad_key_value_kernel(
    grad_output,
    query,
    key,
    value,
    lse,
    delta,
    cu_seqlens,
    alibi_slopes,
    grad_key,
    grad_value,
    grad_output_stride,
    grad_output_head_stride,
    query_stride,
    query_head_stride,
    key_stride,
    key_head_stride,
    value_stride,
    value_head_stride,
    grad_stride,
    grad_head_stride,
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
    start, length, first = block_of_sequence(cu_seqlens, num_sequences, False, KEYS)
    if first >= length:
        return
    kv_head = tl.program_id(1).to(tl.int64)
    token = start + first
    rows_left = length - first

    k = load_rows(
        key + token * key_stride + kv_head * key_head_stride,
        key_stride,
        rows_left,
        HEAD_SIZE,
        PADDED_HEAD_SIZE,
        KEYS,
        True,
    )
    v = load_rows(
        value + token * value_stride + kv_head * value_head_stride,
        value_stride,
        rows_left,
        HEAD_SIZE,
        PADDED_HEAD_SIZE,
        KEYS,
        True,
    )
    key_sums = tl.zeros([KEYS, PADDED_HEAD_SIZE], tl.float32)
    value_sums = tl.zeros([KEYS, PADDED_HEAD_SIZE], tl.float32)
    key_index = first + tl.arange(0, KEYS)[:, None]

    low, full_low, full_high, high = tiles_to_visit(
        first, length, window, CAUSAL, False, KEYS, QUERIES
    )
    for head in range(kv_head * group, (kv_head + 1) * group):
        head_query = query + start * query_stride + head * query_head_stride
        head_grad = (
            grad_output + start * grad_output_stride + head * grad_output_head_stride
        )
        of_head = head * num_tokens + start
        slope = None
        if alibi_slopes is not None:
            slope = tl.load(alibi_slopes + head)
        for MASKED in tl.static_range(2):
            for index in range(
                count_tiles(low, full_low, full_high, high, MASKED, QUERIES)
            ):
                tile = tile_start(index, low, full_low, full_high, MASKED, QUERIES)
                q = load_rows(
                    head_query + tile.to(tl.int64) * query_stride,
                    query_stride,
                    length - tile,
                    HEAD_SIZE,
                    PADDED_HEAD_SIZE,
                    QUERIES,
                    MASKED,
                )
                grad = load_rows(
                    head_grad + tile.to(tl.int64) * grad_output_stride,
                    grad_output_stride,
                    length - tile,
                    HEAD_SIZE,
                    PADDED_HEAD_SIZE,
                    QUERIES,
                    MASKED,
                )
                query_index = tile + tl.arange(0, QUERIES)
                in_sequence = query_index < length
                row_lse = tl.load(
                    lse + of_head + query_index, mask=in_sequence, other=0.0
                )
                row_delta = tl.load(
                    delta + of_head + query_index, mask=in_sequence, other=0.0
                )
                weights, tanh = _weights_of(
                    tl.dot(k, tl.trans(q), input_precision="ieee"),
                    query_index[None, :],
                    key_index,
                    row_lse[None, :],
                    length,
                    scale,
                    window,
                    soft_cap,
                    slope,
                    MASKED,
                    CAUSAL,
                )
                value_sums = tl.dot(
                    weights.to(grad.dtype), grad, value_sums, input_precision="ieee"
                )
                grad_weights = tl.dot(v, tl.trans(grad), input_precision="ieee")
                grad_products = _grad_products_of(
                    weights, grad_weights, row_delta[None, :], soft_cap, tanh
                )
                key_sums = tl.dot(
                    grad_products.to(q.dtype), q, key_sums, input_precision="ieee"
                )

    offset = token * grad_stride + kv_head * grad_head_stride
    store_rows(
        grad_key + offset,
        grad_stride,
        rows_left,
        key_sums * scale,
        HEAD_SIZE,
        PADDED_HEAD_SIZE,
        KEYS,
    )
    store_rows(
        grad_value + offset,
        grad_stride,
        rows_left,
        value_sums,
        HEAD_SIZE,
        PADDED_HEAD_SIZE,
        KEYS,
    )
