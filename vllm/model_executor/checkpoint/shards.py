# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""What one rank holds of a model's parameters, as boxes of the checkpoint's tensors.

A box is an offset and a size in each dimension. Saving, loading, resharding and weight
transfer copy boxes; none of them knows a layer.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch.distributed.tensor import DTensor, Shard
from torch.distributed.tensor.placement_types import _StridedShard

from vllm.model_executor.checkpoint.specification import (
    CheckpointTensor,
    ParameterSharding,
    part_rows,
    part_slices,
)
from vllm.model_executor.parallel_context import ParallelContext


@dataclass(frozen=True)
class TensorShard:
    """The piece of one checkpoint tensor that this rank holds.

    Attributes:
        tensor: name of the tensor in the checkpoint.
        part: which part of a fused parameter it is, as vLLM's `weight_loader` names
            it ("q", "k", "v", or an index); None where nothing is fused.
        part_start: where the part begins in the full fused parameter, along the
            parameter's `dim`.
        shape: full shape of the tensor.
        sizes: shape of the piece. It is empty where the rank holds nothing but
            padding.
        offsets: where the piece begins in the tensor.
        parameter_offsets: where it begins in the full parameter.
        local_offsets: where it begins in what this rank holds of the parameter.
        padding: rows of zeros that follow it in what this rank holds, along the
            parameter's `dim`; they are not part of the checkpoint.
        replicas: how many consecutive ranks of "tp" hold the same piece where it is
            sharded over "tp".
    """

    tensor: str
    part: str | int | None
    part_start: int
    shape: tuple[int, ...]
    sizes: tuple[int, ...]
    offsets: tuple[int, ...]
    parameter_offsets: tuple[int, ...]
    local_offsets: tuple[int, ...]
    padding: int
    replicas: int

    def local(self, tensor: torch.Tensor) -> torch.Tensor:
        """The piece as a view of what this rank holds of the parameter."""
        return tensor[slices(self.local_offsets, self.sizes)]

    @property
    def numel(self) -> int:
        """Number of elements of the piece."""
        return math.prod(self.sizes)


@dataclass(frozen=True)
class LocalParameter:
    """One parameter or persistent buffer of a model, as this rank holds it.

    Attributes:
        name: its name in the model.
        shape: full shape over all ranks, without padding and replicas; fused parts
            side by side.
        local_shape: shape of what this rank holds.
        dim: the dimension along which its fused parts lie and tensor parallelism cuts
            it; None where it has neither.
        dims: the sharded dimension by the group it is sharded over: "tp", and the
            dims of a DTensor's mesh, such as "dp" under FSDP2. A group that is not
            listed holds replicas.
        shards: what this rank holds of each of the checkpoint's tensors.
    """

    name: str
    shape: tuple[int, ...]
    local_shape: tuple[int, ...]
    dim: int | None
    dims: dict[str, int]
    shards: tuple[TensorShard, ...]

    def source(self, shard: TensorShard, origin: int) -> tuple[slice, ...]:
        """Where a shard lies in a tensor that begins at `origin` in the parameter.

        Args:
            shard: one of `shards`.
            origin: index along `dim`.
        """
        offsets = list(shard.parameter_offsets)
        if self.dim is not None:
            offsets[self.dim] -= origin
        return slices(offsets, shard.sizes)

    def put(
        self, tensor: torch.Tensor, shard: TensorShard, piece: torch.Tensor
    ) -> None:
        """Copy a shard's piece to its place, and zero the padding behind it.

        Args:
            tensor: what this rank holds, shape = local_shape.
            shard: one of `shards`.
            piece: shape = shard.sizes.
        """
        shard.local(tensor).copy_(piece)
        self.clear_padding(tensor, shard)

    def clear_padding(self, tensor: torch.Tensor, shard: TensorShard) -> None:
        """Zero the padding behind a shard."""
        if shard.padding and self.dim is not None:
            start = shard.local_offsets[self.dim] + shard.sizes[self.dim]
            tensor.narrow(self.dim, start, shard.padding).zero_()


def local_parameter(
    name: str,
    tensor: torch.Tensor,
    sharding: ParameterSharding,
    stored: Sequence[CheckpointTensor],
    context: ParallelContext,
) -> LocalParameter:
    """Describe what this rank holds of a parameter.

    Args:
        name: the parameter's name.
        tensor: the parameter; a DTensor is sharded further, as FSDP2 does.
        sharding: how it is sharded over the tensor-parallel ranks.
        stored: the checkpoint tensor of each of the sharding's parts.
        context: of this rank.
    """
    offsets, sizes, dims = _local_box(tensor)
    dim, tp_size = sharding.dim, context.tp_size
    if dim is not None and tp_size > 1:
        dims = {"tp": dim} | dims
    shards, start = [], 0
    places = part_slices(sharding, tp_size)
    for part, place, where in zip(sharding.parts, places, stored, strict=True):
        row = local_row = size = padding = 0
        if dim is not None:
            # The part's rows in the tensor-parallel shard, of which a DTensor has some.
            row, count = part_rows(part, context.tp_rank, tp_size)
            first, last = offsets[dim], offsets[dim] + sizes[dim]
            begin = min(max(place.start, first), place.stop)
            end = max(begin, min(place.stop, last))
            skipped = min(begin - place.start, count)
            size = min(end - begin, count - skipped)
            padding = end - begin - size
            row, local_row = row + skipped, begin - first
        shard = TensorShard(
            tensor=where.name,
            part=part.shard_id,
            part_start=start,
            shape=tuple(where.shape),
            sizes=_with(sizes, dim, size),
            offsets=_with(offsets, dim, start + row - where.origin),
            parameter_offsets=_with(offsets, dim, start + row),
            local_offsets=_with((0,) * len(sizes), dim, local_row),
            padding=padding,
            replicas=part.replicas,
        )
        rows = _with(shard.sizes, dim, size + padding)
        if math.prod(rows) or not math.prod(sharding.shape):
            shards.append(shard)
        start += part.size
    return LocalParameter(name, tuple(sharding.shape), sizes, dim, dims, tuple(shards))


def _with(values: tuple[int, ...], dim: int | None, value: int) -> tuple[int, ...]:
    """`values` with another value in one dim, if one is given."""
    return values if dim is None else (*values[:dim], value, *values[dim + 1 :])


def local_tensor(tensor: torch.Tensor) -> torch.Tensor:
    """What this rank holds of a tensor, sharing its memory; detached."""
    tensor = tensor.detach()
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def _local_box(
    tensor: torch.Tensor,
) -> tuple[tuple[int, ...], tuple[int, ...], dict[str, int]]:
    """Offset, size and sharded dims of what this rank holds of a possible DTensor."""
    if not isinstance(tensor, DTensor):
        return (0,) * tensor.dim(), tuple(tensor.shape), {}
    (chunk,) = tensor.__create_chunk_list__()
    dims = {name: dim for name, _, dim in sharded_mesh_dims(tensor)}
    return tuple(chunk.offsets), tuple(chunk.sizes), dims


def sharded_mesh_dims(tensor: DTensor) -> list[tuple[str, int, int]]:
    """The dims of a mesh that cut a DTensor: name, size, and the tensor's dim."""
    mesh = tensor.device_mesh
    names = mesh.mesh_dim_names or [f"mesh_{index}" for index in range(mesh.ndim)]
    return [
        (names[index], mesh.size(index), placement.dim)
        for index, placement in enumerate(tensor.placements)
        # FSDP2 over a dim that tensor parallelism cuts already is no Shard.
        if isinstance(placement, Shard | _StridedShard) and mesh.size(index) > 1
    ]


def slices(offsets: Sequence[int], sizes: Sequence[int]) -> tuple[slice, ...]:
    """Where a box lies in a tensor, as an index of it."""
    return tuple(slice(start, start + size) for start, size in zip(offsets, sizes))
