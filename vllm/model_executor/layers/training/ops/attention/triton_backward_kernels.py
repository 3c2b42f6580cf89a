# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""The two large kernels of `triton_backward`."""

from __future__ import annotations

from vllm.model_executor.layers.training.ops.attention.triton_common import (
    LOG2E,
    block_of_sequence,
    count_tiles,
    is_visible,
    load_rows,
    scores_of,
    store_rows,
    tile_start,
    tiles_to_visit,
)
from vllm.triton_utils import tl, triton


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
def grad_query_kernel(
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
def grad_key_value_kernel(
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
