# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""How a parameter is sharded over the tensor-parallel ranks, and how it is stored.

A layer describes each of its parameters by a `ParameterSharding`: the full shape, the
sharded dimension and the parts that the parameter is fused from. Loading, saving,
resharding and weight transfer read that and know no layer.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Part:
    """One tensor of the checkpoint inside a possibly fused parameter.

    Attributes:
        name: the checkpoint's module name component ("q_proj") where the part is a
            tensor of its own there; None where the checkpoint uses the layer's name.
        shard_id: what vLLM's own weight_loader takes for this part ("q"/"k"/"v", an
            index, or None for a parameter of one part).
        size: full size along the sharded dim, in the checkpoint.
        replicas: how many consecutive ranks hold the same piece; more than 1 where
            there are fewer KV heads than ranks.
        padded_size: size along the sharded dim after zero rows are put behind the
            last one so that the ranks divide it; `size` by default.
    """

    name: str | None
    shard_id: str | int | None
    size: int
    replicas: int = 1
    padded_size: int = 0

    def __post_init__(self) -> None:
        if self.padded_size == 0:
            object.__setattr__(self, "padded_size", self.size)

    def local_size(self, tp_size: int) -> int:
        """Size along the sharded dim on each rank.

        Raises:
            ValueError: the ranks do not divide the part.
        """
        rows = self.padded_size * self.replicas
        if rows % tp_size:
            raise ValueError(
                f"Part {self.name or self.shard_id or 'weight'} of size "
                f"{self.padded_size} with {self.replicas} replicas cannot be cut into "
                f"tp_size={tp_size} equal shards; choose a tensor-parallel size that "
                f"divides {rows}."
            )
        return rows // tp_size


@dataclass(frozen=True)
class ParameterSharding:
    """One parameter of a layer, over all tensor-parallel ranks.

    Attributes:
        shape: full shape without padding and replicas; fused parts side by side.
        dim: the sharded dimension; None for a parameter that every rank holds whole.
        parts: the parts along `dim`, in order. A replicated parameter has one.
    """

    shape: torch.Size
    dim: int | None
    parts: tuple[Part, ...]

    def __post_init__(self) -> None:
        object.__setattr__(self, "shape", torch.Size(self.shape))
        if self.dim is None:
            if len(self.parts) != 1:
                raise ValueError(
                    f"A replicated parameter has one part, not {len(self.parts)}."
                )
            return
        total = sum(part.size for part in self.parts)
        if not 0 <= self.dim < len(self.shape) or total != self.shape[self.dim]:
            raise ValueError(
                f"The parts add up to {total}, which is not the size of dim "
                f"{self.dim} of shape {tuple(self.shape)}."
            )

    @classmethod
    def replicated(cls, shape: torch.Size | tuple[int, ...]) -> ParameterSharding:
        """A parameter that every rank holds whole."""
        part = Part(None, None, shape[0] if shape else 1)
        return cls(torch.Size(shape), None, (part,))

    @classmethod
    def from_local(
        cls,
        shape: torch.Size | tuple[int, ...],
        dim: int,
        tp_size: int,
        parts: int = 1,
    ) -> ParameterSharding:
        """A parameter of any library's, from the shape that each rank holds.

        Args:
            shape: the local shape, equal on all ranks.
            dim: the sharded dimension.
            tp_size: number of ranks.
            parts: how many tensors of equal size lie side by side along `dim` in the
                full parameter, each sharded on its own: 2 for a fused gate and up
                projection.

        Raises:
            ValueError: the parts do not divide the local dimension.
        """
        if shape[dim] % parts:
            raise ValueError(
                f"{parts} parts do not divide dim {dim} of the local shape "
                f"{tuple(shape)}."
            )
        full = list(shape)
        full[dim] *= tp_size
        size = full[dim] // parts
        shard_ids = range(parts) if parts > 1 else (None,)
        pieces = tuple(Part(None, shard_id, size) for shard_id in shard_ids)
        return cls(torch.Size(full), dim, pieces)


@dataclass(frozen=True)
class CheckpointTensor:
    """One tensor of a checkpoint.

    Attributes:
        name: In the checkpoint.
        parameter: Name of the parameter or buffer that holds it.
        shape: Its full, unsharded shape.
        dtype: The parameter's.
        parts: The parts of the parameter's sharding that it consists of: one, or
            all for a fused parameter as a whole.
        dim: The dimension along which the parts lie; None if not sharded.
        origin: Where the tensor begins in the parameter, along `dim`.
    """

    name: str
    parameter: str
    shape: torch.Size
    dtype: torch.dtype
    parts: tuple[Part, ...]
    dim: int | None
    origin: int = 0

    def pieces(self, tensor: torch.Tensor) -> Iterator[tuple[Part, torch.Tensor]]:
        """`tensor` cut into its parts."""
        if len(self.parts) == 1 or self.dim is None:
            yield self.parts[0], tensor
        else:
            sizes = [part.size for part in self.parts]
            yield from zip(self.parts, tensor.split(sizes, dim=self.dim))

    @property
    def num_bytes(self) -> int:
        return self.shape.numel() * self.dtype.itemsize


def local_shape(sharding: ParameterSharding, tp_size: int) -> torch.Size:
    """Shape of the parameter on each rank, padding and replicas included."""
    if sharding.dim is None:
        return sharding.shape
    shape = list(sharding.shape)
    shape[sharding.dim] = sum(part.local_size(tp_size) for part in sharding.parts)
    return torch.Size(shape)


def part_slices(sharding: ParameterSharding, tp_size: int) -> tuple[slice, ...]:
    """Where each part lies in the local parameter, along the sharded dim.

    For a replicated parameter the one slice covers it.
    """
    if sharding.dim is None:
        return (slice(None),)
    slices, start = [], 0
    for part in sharding.parts:
        stop = start + part.local_size(tp_size)
        slices.append(slice(start, stop))
        start = stop
    return tuple(slices)


def part_rows(part: Part, tp_rank: int, tp_size: int) -> tuple[int, int]:
    """The piece of a part that a rank holds, along the sharded dim.

    Returns:
        Where it begins in the part's full tensor, and its size there; what the rank
        holds beyond that size is padding.
    """
    size = part.local_size(tp_size)
    start = min(tp_rank // part.replicas * size, part.size)
    return start, min(size, part.size - start)


def split_parts(
    full_tensor: torch.Tensor, sharding: ParameterSharding
) -> tuple[torch.Tensor, ...]:
    """Cut a fused full tensor into the full tensors of its parts (views).

    Args:
        full_tensor: shape = sharding.shape.
    """
    _check_shape("the full parameter", full_tensor, sharding.shape)
    if sharding.dim is None:
        return (full_tensor,)
    return full_tensor.split([part.size for part in sharding.parts], sharding.dim)


def take_shard(
    full_tensor: torch.Tensor,
    sharding: ParameterSharding,
    part: Part,
    tp_rank: int,
    tp_size: int,
) -> torch.Tensor:
    """The piece of one part that a rank holds.

    Args:
        full_tensor: the part's full tensor as in the checkpoint: sharding.shape with
            the sharded dim replaced by part.size.
        sharding: the parameter the part belongs to.
        part: one of sharding.parts.
        tp_rank: the rank.
        tp_size: number of ranks.

    Returns:
        A view where there is no padding; where the rank's piece reaches into the
        padding, a new tensor whose rows beyond the checkpoint's are zero.
    """
    dim = sharding.dim
    if dim is None:
        _check_shape("a replicated parameter", full_tensor, sharding.shape)
        return full_tensor
    expected = list(sharding.shape)
    expected[dim] = part.size
    _check_shape(
        f"part {part.name or part.shard_id or 'weight'}", full_tensor, expected
    )
    size = part.local_size(tp_size)
    start, real = part_rows(part, tp_rank, tp_size)
    piece = full_tensor.narrow(dim, start, real)
    if real == size:
        return piece
    padding = list(piece.shape)
    padding[dim] = size - real
    return torch.cat((piece, piece.new_zeros(padding)), dim)


def local_from_full(
    full_tensor: torch.Tensor,
    sharding: ParameterSharding,
    tp_rank: int,
    tp_size: int,
) -> torch.Tensor:
    """The local parameter of a rank, from the full parameter.

    Args:
        full_tensor: shape = sharding.shape.

    Returns:
        shape = local_shape(sharding, tp_size).
    """
    pieces = [
        take_shard(full, sharding, part, tp_rank, tp_size)
        for full, part in zip(
            split_parts(full_tensor, sharding), sharding.parts, strict=True
        )
    ]
    return pieces[0] if sharding.dim is None else torch.cat(pieces, sharding.dim)


def _check_shape(
    what: str, tensor: torch.Tensor, expected: torch.Size | list[int]
) -> None:
    if list(tensor.shape) != list(expected):
        raise ValueError(
            f"The tensor for {what} has shape {tuple(tensor.shape)}; "
            f"{tuple(expected)} is needed."
        )
