# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""x W^T + b on CUDA for few rows: a program reads its piece of the weight once.

Every element adds up the products in the order of K in one fp32 accumulator, whatever
the tiles are, adds the bias in fp32 and is rounded once. Those are the bits of vLLM's
`matmul_persistent`, and a row's bits do not depend on the other rows.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from vllm.model_executor.op_library import has_large_shared_memory
from vllm.triton_utils import tl, triton


@triton.jit(do_not_specialize=["num_rows"])
def _linear_kernel(
    x,
    weight,
    bias,
    output,
    num_rows,
    out_features,
    in_features,
    x_stride,
    weight_stride,
    rows: tl.constexpr,
    columns: tl.constexpr,
    depth: tl.constexpr,
    swapped: tl.constexpr,
    ragged_depth: tl.constexpr,
):
    # Programs that read the same piece of the weight are adjacent.
    row_tiles = tl.cdiv(num_rows, rows)
    row = (tl.program_id(0) % row_tiles) * rows + tl.arange(0, rows)
    column = (tl.program_id(0) // row_tiles) * columns + tl.arange(0, columns)
    k = tl.arange(0, depth)
    # A weight, such as a vocabulary's, may have more elements than 32 bits count.
    x += row.to(tl.int64)[:, None] * x_stride + k[None, :]
    weight += column.to(tl.int64)[:, None] * weight_stride + k[None, :]
    x_mask = row[:, None] < num_rows
    weight_mask = column[:, None] < out_features
    if swapped:
        total = tl.zeros((columns, rows), tl.float32)
    else:
        total = tl.zeros((rows, columns), tl.float32)
    for start in range(0, in_features, depth):
        if ragged_depth:
            inside = k[None, :] < in_features - start
            x_tile = tl.load(x + start, mask=x_mask & inside, other=0.0)
            weight_tile = tl.load(weight + start, mask=weight_mask & inside, other=0.0)
        else:
            x_tile = tl.load(x + start, mask=x_mask, other=0.0)
            weight_tile = tl.load(weight + start, mask=weight_mask, other=0.0)
        if swapped:
            total = tl.dot(weight_tile, x_tile.T, total)
        else:
            total = tl.dot(x_tile, weight_tile.T, total)
    if swapped:
        total = total.T
    if bias is not None:
        addend = tl.load(bias + column, mask=column < out_features, other=0.0)
        total += addend.to(tl.float32)[None, :]
    output += row.to(tl.int64)[:, None] * out_features + column[None, :]
    mask = x_mask & (column[None, :] < out_features)
    tl.store(output, total.to(output.dtype.element_ty), mask=mask)


class Tiles(NamedTuple):
    """How the kernel divides its work; no bit depends on it.

    Attributes:
        rows: of a program's result.
        columns: likewise.
        depth: of K, read at once.
        swapped: the weight is the product's left side, of which Hopper's instructions
            for large matrices take 64 rows at least.
        num_warps: of a program.
        num_stages: tiles in flight.
    """

    rows: int
    columns: int
    depth: int
    swapped: bool
    num_warps: int
    num_stages: int


def tiles_for(num_rows: int, out_features: int, large_memory: bool) -> Tiles:
    """The tiles that suit a shape.

    The fastest on an H200 among some forty for the weights of models of 1.7 to 32
    billion parameters: few programs with deep tiles where there are few columns, more
    stages in flight the fewer programs share a multiprocessor.

    Args:
        num_rows: M
        out_features: N
        large_memory: whether a program may have more than 99 KB of shared memory.
    """
    wide = out_features > 8192
    if num_rows <= 16 or (num_rows <= 32 and out_features <= 4608):
        tiles = Tiles(16, 64, 128, True, 4, 4 if wide else 6)
    elif num_rows <= 32:
        tiles = Tiles(32, 64, 128, True, 4, 4 if wide else 6)
    elif wide:
        tiles = Tiles(64, 128, 64, False, 4, 4)
    else:
        tiles = Tiles(64, 64, 64, True, 4, 8)
    stage = 2 * (tiles.rows + tiles.columns) * tiles.depth
    memory = (160 if large_memory else 96) * 1024
    return tiles._replace(num_stages=min(tiles.num_stages, memory // stage))


def few_rows_linear(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    output: torch.Tensor | None = None,
) -> torch.Tensor:
    """x W^T + b.

    Args:
        x: shape = [M, K], each row contiguous; bf16 or fp16. Any M is right, but large
            ones are slow.
        weight: shape = [N, K], each row contiguous; dtype of x.
        bias: shape = [N] or None.
        output: where to write; a new tensor if None.

    Returns:
        shape = [M, N], dtype of x.
    """
    tiles = tiles_for(x.shape[0], weight.shape[0], has_large_shared_memory(x.device))
    return launch(x, weight, bias, tiles, output)


def launch(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    tiles: Tiles,
    output: torch.Tensor | None = None,
) -> torch.Tensor:
    """`few_rows_linear` with given tiles."""
    num_rows, in_features = x.shape
    out_features = weight.shape[0]
    if output is None:
        output = x.new_empty(num_rows, out_features)
    if output.numel():
        row_tiles = -(-num_rows // tiles.rows)
        column_tiles = -(-out_features // tiles.columns)
        _linear_kernel[(row_tiles * column_tiles,)](
            x,
            weight,
            None if bias is None else bias.contiguous(),
            output,
            num_rows,
            out_features,
            in_features,
            x.stride(0),
            weight.stride(0),
            ragged_depth=in_features % tiles.depth != 0,
            **tiles._asdict(),
        )
    return output
