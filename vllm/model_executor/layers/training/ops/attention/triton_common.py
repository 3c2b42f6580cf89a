# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""What the Triton attention kernels share.

A program owns one block of queries (or keys) of one sequence and visits the keys (or
queries) tile by tile. It visits no tile that the mask hides as a whole, and applies the
mask in the tiles at the mask's edges only. Scores are in units of log 2, for exp2.
"""

from __future__ import annotations

from typing import NamedTuple

from vllm.model_executor.layers.training.ops.attention.call import AttentionSpec
from vllm.triton_utils import tl, triton

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)


class Tiles(NamedTuple):
    """How a kernel divides its work.

    Chosen from the head size, the dtype and the GPU alone, so that the bits of a
    sequence's results depend on no other sequence.
    """

    queries: int
    keys: int
    num_warps: int
    num_stages: int


def count_blocks(num_tokens: int, num_sequences: int, block: int) -> int:
    """How many programs `block_of_sequence` needs for blocks of this size."""
    return num_tokens // block + num_sequences


def numbers_of(spec: AttentionSpec) -> tuple[float, int | None, float | None]:
    """Scale, window and soft cap as the kernels take them."""
    # The sum of a position and the window must not overflow.
    window = min(spec.sliding_window, 2**30) if spec.sliding_window else None
    return spec.scale, window, spec.logits_soft_cap or None


@triton.jit
def block_of_sequence(
    cu_seqlens, num_sequences, LAST_FIRST: tl.constexpr, BLOCK: tl.constexpr
):
    """Which block of which sequence is this program's.

    A sequence starting at token t, the s-th, has the programs from t // BLOCK + s on:
    as many as it has blocks, or one more.

    LAST_FIRST is for blocks of queries under a causal mask, of which the last have most
    to do.

    Returns:
        The sequence's first token and length, and where in it the block begins: at or
        past its end if there is no such block.
    """
    program = tl.program_id(0)
    if LAST_FIRST:
        program = tl.num_programs(0) - 1 - program
    sequence = 0
    end = num_sequences
    while end - sequence > 1:
        middle = (sequence + end) // 2
        is_before = tl.load(cu_seqlens + middle) // BLOCK + middle <= program
        sequence = tl.where(is_before, middle, sequence)
        end = tl.where(is_before, end, middle)
    start = tl.load(cu_seqlens + sequence)
    length = tl.load(cu_seqlens + sequence + 1) - start
    first = (program - start // BLOCK - sequence) * BLOCK
    return start.to(tl.int64), length, first


@triton.jit
def tiles_to_visit(
    first,
    length,
    window,
    CAUSAL: tl.constexpr,
    TILES_ARE_KEYS: tl.constexpr,
    BLOCK: tl.constexpr,
    TILE: tl.constexpr,
):
    """The tiles that the block at `first` sees any position of.

    Positions in [low, full_low) and [full_high, high) are in tiles at the mask's edges;
    [full_low, full_high) are whole tiles that are seen by the whole block.

    Returns:
        low, full_low, full_high, high; the first three are multiples of TILE.
    """
    low = 0
    full_low = 0
    high = length
    full_high = length
    if window is not None:
        low = tl.maximum(low, first - window + 1)
        full_low = tl.maximum(full_low, first + BLOCK - window)
        high = tl.minimum(high, first + BLOCK - 1 + window)
        full_high = tl.minimum(full_high, first + window)
    if CAUSAL:
        if TILES_ARE_KEYS:
            high = tl.minimum(high, first + BLOCK)
            full_high = tl.minimum(full_high, first + 1)
        else:
            low = tl.maximum(low, first)
            full_low = tl.maximum(full_low, first + BLOCK - 1)
    low = low // TILE * TILE
    full_low = tl.minimum(tl.cdiv(full_low, TILE) * TILE, tl.cdiv(high, TILE) * TILE)
    full_high = tl.maximum(full_high // TILE * TILE, full_low)
    return low, full_low, full_high, high


@triton.jit
def count_tiles(
    low, full_low, full_high, high, MASKED: tl.constexpr, TILE: tl.constexpr
):
    """How many tiles there are at the mask's edges (MASKED), or elsewhere."""
    if MASKED:
        return (full_low - low) // TILE + tl.cdiv(tl.maximum(high - full_high, 0), TILE)
    return (full_high - full_low) // TILE


@triton.jit
def tile_start(
    index, low, full_low, full_high, MASKED: tl.constexpr, TILE: tl.constexpr
):
    """Where the index-th tile of `count_tiles` begins."""
    if MASKED:
        first = low + index * TILE
        return tl.where(first < full_low, first, first + (full_high - full_low))
    return full_low + index * TILE


@triton.jit
def load_rows(
    base,
    stride,
    rows_left,
    HEAD_SIZE: tl.constexpr,
    PADDED_HEAD_SIZE: tl.constexpr,
    ROWS: tl.constexpr,
    ANY_ROW: tl.constexpr,
):
    """Rows from `base` on, zero from HEAD_SIZE on, and from rows_left on if ANY_ROW.

    Returns:
        shape = [ROWS, PADDED_HEAD_SIZE]
    """
    row = tl.arange(0, ROWS)[:, None]
    column = tl.arange(0, PADDED_HEAD_SIZE)[None, :]
    pointers = base + (row * stride + column)
    if ANY_ROW:
        mask = (row < rows_left) & (column < HEAD_SIZE)
        return tl.load(pointers, mask=mask, other=0.0)
    if HEAD_SIZE != PADDED_HEAD_SIZE:
        return tl.load(pointers, mask=column < HEAD_SIZE, other=0.0)
    return tl.load(pointers)


@triton.jit
def store_rows(
    base,
    stride,
    rows_left,
    rows,
    HEAD_SIZE: tl.constexpr,
    PADDED_HEAD_SIZE: tl.constexpr,
    ROWS: tl.constexpr,
):
    """The counterpart of `load_rows`."""
    row = tl.arange(0, ROWS)[:, None]
    column = tl.arange(0, PADDED_HEAD_SIZE)[None, :]
    mask = (row < rows_left) & (column < HEAD_SIZE)
    tl.store(base + (row * stride + column), rows, mask=mask)


@triton.jit
def is_visible(query, key, length, window, CAUSAL: tl.constexpr):
    """Whether the queries at some positions see the keys at others.

    Args:
        query: positions, shape = [a, 1] or [1, a]
        key: positions, shape = [1, b] or [b, 1]
    """
    visible = (query < length) & (key < length)
    if CAUSAL:
        visible = visible & (key <= query)
    if window is not None:
        visible = visible & (tl.abs(query - key) < window)
    return visible


@triton.jit
def scores_of(products, query, key, scale, soft_cap, slope):
    """Scores in units of log 2, and the capped part's tanh (0 without a cap).

    Args:
        products: of queries and keys; see `is_visible` for their positions.
        soft_cap: None: no cap.
        slope: of ALiBi; None: no bias.
    """
    tanh = 0.0
    if soft_cap is not None:
        tanh = tanh_of(products * (scale / soft_cap))
        scores = tanh * (soft_cap * LOG2E)
    else:
        scores = products * (scale * LOG2E)
    if slope is not None:
        scores -= (slope * LOG2E) * tl.abs(query - key).to(tl.float32)
    return scores, tanh


@triton.jit
def tanh_of(x):
    """tanh, accurate to a few units in the last place.

    Near zero, where the formula with exp cancels, by a minimax polynomial.
    """
    size = tl.abs(x)
    far = 1.0 - 2.0 / (tl.exp2(size * (2.0 * LOG2E)) + 1.0)
    far = tl.where(x < 0.0, -far, far)
    square = x * x
    near = 0.020639070832947474 + square * -0.005704970342745042
    near = -0.05373970943766733 + square * near
    near = 0.13331442119863912 + square * near
    near = -0.3333328193848723 + square * near
    return tl.where(size < 0.625, x + x * square * near, far)
