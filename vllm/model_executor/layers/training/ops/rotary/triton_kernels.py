# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""Rotary embedding on CUDA."""

from __future__ import annotations

import torch

from vllm.triton_utils import tl, triton

# Elements that a program rotates at most, and that each of its threads does: several
# accesses of 16 bytes are in flight for each thread.
PROGRAM_ELEMENTS = 2048
THREAD_ELEMENTS = 32


@triton.jit
def _rotate(
    x,
    output,
    num_heads,
    head_stride,
    first_head,
    cos_row,
    in_range,
    half: tl.constexpr,
    head_size: tl.constexpr,
    is_neox_style: tl.constexpr,
    inverse: tl.constexpr,
    block_heads: tl.constexpr,
    block_half: tl.constexpr,
    block_kept: tl.constexpr,
):
    """Rotate a block of the heads of one token; x and output point to its first."""
    head = first_head + tl.arange(0, block_heads)[:, None].to(tl.int64)
    x += head * head_stride
    output += head * head_size

    pair = tl.arange(0, block_half)[None, :]
    known = (pair < half) & in_range
    cos = tl.load(cos_row + pair, mask=known, other=float("nan"))
    sin = tl.load(cos_row + half + pair, mask=known, other=float("nan"))
    if inverse:
        sin = -sin
    mask = (head < num_heads) & (pair < half)
    if is_neox_style:
        first = tl.load(x + pair, mask=mask).to(tl.float32)
        second = tl.load(x + half + pair, mask=mask).to(tl.float32)
    else:
        feature = tl.arange(0, 2 * block_half)[None, :]
        mask = (head < num_heads) & (feature < 2 * half)
        pairs = tl.load(x + feature, mask=mask).to(tl.float32)
        first, second = tl.split(tl.reshape(pairs, (block_heads, block_half, 2)))
    # Written as it is computed: which product is rounded must not depend on how the
    # compiler contracts it, which may differ between a slice and a whole tensor.
    cos = tl.broadcast_to(cos, (block_heads, block_half))
    sin = tl.broadcast_to(sin, (block_heads, block_half))
    turned_first = tl.fma(first, cos, -(second * sin))
    turned_second = tl.fma(second, cos, first * sin)
    if is_neox_style:
        tl.store(output + pair, turned_first, mask=mask)
        tl.store(output + half + pair, turned_second, mask=mask)
    else:
        pairs = tl.join(turned_first, turned_second)
        pairs = tl.reshape(pairs, (block_heads, 2 * block_half))
        tl.store(output + feature, pairs, mask=mask)

    if 2 * half < head_size:
        feature = 2 * half + tl.arange(0, block_kept)[None, :]
        mask = (head < num_heads) & (feature < head_size)
        tl.store(output + feature, tl.load(x + feature, mask=mask), mask=mask)


@triton.jit
def _rotary_embedding_kernel(
    positions,
    query,
    query_output,
    num_query_heads,
    query_token_stride,
    query_head_stride,
    key,
    key_output,
    num_key_heads,
    key_token_stride,
    key_head_stride,
    cos_sin_cache,
    max_positions,
    half: tl.constexpr,
    head_size: tl.constexpr,
    is_neox_style: tl.constexpr,
    inverse: tl.constexpr,
    block_heads: tl.constexpr,
    block_half: tl.constexpr,
    block_kept: tl.constexpr,
):
    """A program rotates a block of one token's heads, of query or else of key."""
    token = tl.program_id(0).to(tl.int64)
    block = tl.program_id(1)
    query_blocks = tl.cdiv(num_query_heads, block_heads)
    position = tl.load(positions + token).to(tl.int64)
    in_range = (position >= 0) & (position < max_positions)
    cos_row = cos_sin_cache + position * 2 * half
    if block < query_blocks:
        _rotate(
            query + token * query_token_stride,
            query_output + token * num_query_heads * head_size,
            num_query_heads,
            query_head_stride,
            block * block_heads,
            cos_row,
            in_range,
            half,
            head_size,
            is_neox_style,
            inverse,
            block_heads,
            block_half,
            block_kept,
        )
    else:
        _rotate(
            key + token * key_token_stride,
            key_output + token * num_key_heads * head_size,
            num_key_heads,
            key_head_stride,
            (block - query_blocks) * block_heads,
            cos_row,
            in_range,
            half,
            head_size,
            is_neox_style,
            inverse,
            block_heads,
            block_half,
            block_kept,
        )


def rotary_embedding(
    positions: torch.Tensor,
    query: torch.Tensor,
    key: torch.Tensor,
    cos_sin_cache: torch.Tensor,
    is_neox_style: bool,
    inverse: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    """One launch for query and key.

    Args:
        positions: int64, shape = [num_tokens].
        query: shape = [num_tokens, num_heads, head_size], the last dim contiguous.
        key: shape = [num_tokens, num_kv_heads, head_size], likewise.
        cos_sin_cache: fp32, shape = [max_positions, rotary_dim], contiguous.
        is_neox_style: as in `op.rotary_embedding`.
        inverse: likewise.
    """
    num_tokens, num_query_heads, head_size = query.shape
    num_key_heads = key.shape[1]
    query_output, key_output = query.new_empty(query.shape), key.new_empty(key.shape)
    half = cos_sin_cache.shape[1] // 2
    block_half = triton.next_power_of_2(half)
    most_heads = max(num_query_heads, num_key_heads, 1)
    block_heads = max(PROGRAM_ELEMENTS // (2 * block_half), 1)
    block_heads = min(block_heads, triton.next_power_of_2(most_heads))
    blocks = triton.cdiv(num_query_heads, block_heads)
    blocks += triton.cdiv(num_key_heads, block_heads)
    warps = block_heads * 2 * block_half // (32 * THREAD_ELEMENTS)
    if num_tokens and blocks:
        _rotary_embedding_kernel[(num_tokens, blocks)](
            positions,
            query,
            query_output,
            num_query_heads,
            query.stride(0),
            query.stride(1),
            key,
            key_output,
            num_key_heads,
            key.stride(0),
            key.stride(1),
            cos_sin_cache,
            cos_sin_cache.shape[0],
            half=half,
            head_size=head_size,
            is_neox_style=is_neox_style,
            inverse=inverse,
            block_heads=block_heads,
            block_half=block_half,
            block_kept=triton.next_power_of_2(max(head_size - 2 * half, 1)),
            num_warps=min(max(warps, 1), 16),
        )
    return query_output, key_output
