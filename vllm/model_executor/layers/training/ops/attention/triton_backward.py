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

from vllm.model_executor.layers.training.ops.attention.triton_backward_kernels import (
    grad_key_value_kernel,
    grad_query_kernel,
)
from vllm.model_executor.layers.training.ops.attention.triton_common import (
    Tiles,
    count_blocks,
    load_rows,
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
    cu_seqlens: torch.Tensor,
    max_seqlen: int,
    alibi_slopes: torch.Tensor | None,
    scale: float,
    causal: bool,
    window: int,
    soft_cap: float,
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
    num_sequences = cu_seqlens.numel() - 1
    inputs = (grad_output, query, key, value, lse, delta, cu_seqlens, alibi_slopes)
    strides = [
        stride
        for tensor in (grad_output, query, key, value)
        for stride in tensor.stride()[:2]
    ]
    group = num_heads // num_kv_heads
    features = (scale, min(window, 2**30) or None, soft_cap or None)

    blocks = count_blocks(num_tokens, num_sequences, tiles.for_key.keys)
    grad_key_value_kernel[(blocks, num_kv_heads)](
        *inputs,
        grad_key,
        grad_value,
        *strides,
        *grad_key.stride()[:2],
        num_tokens,
        num_sequences,
        group,
        *features,
        CAUSAL=causal,
        HEAD_SIZE=head_size,
        PADDED_HEAD_SIZE=padded_head_size,
        QUERIES=tiles.for_key.queries,
        KEYS=tiles.for_key.keys,
        num_warps=tiles.for_key.num_warps,
        num_stages=tiles.for_key.num_stages,
    )
    blocks = count_blocks(num_tokens, num_sequences, tiles.for_query.queries)
    grad_query_kernel[(blocks, num_heads)](
        *inputs,
        grad_query,
        *strides,
        *grad_query.stride()[:2],
        num_tokens,
        num_sequences,
        group,
        *features,
        CAUSAL=causal,
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
