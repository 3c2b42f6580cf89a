# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""Boxes of tensors through torch's distributed checkpoints (DCP).

A rank gives DCP the boxes that it holds of whole tensors, each with its place, and asks
for the boxes that it needs; DCP writes each box once and finds what overlaps. So a
checkpoint does not know how the job that wrote it was sharded.
"""

from __future__ import annotations

import io
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.default_planner import DefaultSavePlanner
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import (
    LoadPlan,
    LoadPlanner,
    ReadItem,
    SavePlan,
    TensorWriteData,
    WriteItem,
    WriteItemType,
)
from torch.distributed.checkpoint.planner_helpers import (
    create_read_items_for_chunk_list,
)

from vllm.model_executor.checkpoint.shards import LocalParameter


@dataclass(frozen=True)
class Piece:
    """A shard of a stored tensor, and the memory that holds it on this rank.

    Attributes:
        name: of the stored tensor.
        shape: its full shape.
        offsets: where the box begins in it.
        memory: shape of the box.
    """

    name: str
    shape: tuple[int, ...]
    offsets: tuple[int, ...]
    memory: torch.Tensor

    @property
    def index(self) -> MetadataIndex:
        return MetadataIndex(self.name, self.offsets)

    @property
    def chunk(self) -> ChunkStorageMetadata:
        return ChunkStorageMetadata(torch.Size(self.offsets), self.memory.shape)


def pieces_of(
    parameter: LocalParameter, tensor: torch.Tensor, prefix: str
) -> Iterator[Piece]:
    """The pieces of a tensor that is sharded as a parameter is.

    Args:
        parameter: the parameter.
        tensor: what this rank holds, shape = parameter.local_shape.
        prefix: put before the names of the parameter's checkpoint tensors.
    """
    for shard in parameter.shards:
        if shard.numel:
            name = prefix + shard.tensor
            yield Piece(name, shard.shape, shard.offsets, shard.local(tensor))


def write_pieces(directory: Path, pieces: Sequence[Piece]) -> None:
    """Write the pieces of all ranks; what several ranks hold is written once."""
    with _one_process_is_fine():
        dcp.save(
            {},
            storage_writer=dcp.FileSystemWriter(directory),
            planner=_SavePieces(pieces),
            no_dist=not dist.is_initialized(),
        )


def read_pieces(directory: Path, pieces: Sequence[Piece]) -> None:
    """Fill the pieces' memory, each rank its own."""
    with _one_process_is_fine():
        dcp.load(
            {},
            storage_reader=dcp.FileSystemReader(directory),
            planner=_LoadPieces(pieces),
            no_dist=not dist.is_initialized(),
        )


def stored_tensors(directory: Path) -> dict[str, TensorStorageMetadata]:
    """What a directory that `write_pieces` wrote holds."""
    stored = dcp.FileSystemReader(directory).read_metadata().state_dict_metadata
    return {
        name: entry
        for name, entry in stored.items()
        if isinstance(entry, TensorStorageMetadata)
    }


class _SavePieces(DefaultSavePlanner):
    def __init__(self, pieces: Sequence[Piece]) -> None:
        super().__init__(flatten_state_dict=False, flatten_sharded_tensors=False)
        self._pieces = {piece.index: piece for piece in pieces}

    def create_local_plan(self) -> SavePlan:
        self.plan = SavePlan([_write_item(piece) for piece in self._pieces.values()])
        return self.plan

    def lookup_object(self, index: MetadataIndex) -> torch.Tensor:
        return self._pieces[index].memory


def _write_item(piece: Piece) -> WriteItem:
    properties = TensorProperties.create_from_tensor(piece.memory)
    data = TensorWriteData(piece.chunk, properties, torch.Size(piece.shape))
    return WriteItem(piece.index, WriteItemType.SHARD, tensor_data=data)


class _LoadPieces(LoadPlanner):
    def __init__(self, pieces: Sequence[Piece]) -> None:
        self._pieces = {piece.index: piece for piece in pieces}
        self._metadata: Metadata | None = None

    def set_up_planner(
        self,
        state_dict: dict[str, Any],
        metadata: Metadata | None = None,
        is_coordinator: bool = False,
    ) -> None:
        self._metadata = metadata

    def create_local_plan(self) -> LoadPlan:
        assert self._metadata is not None, "DCP gives it to set_up_planner"
        stored: dict[str, Any] = self._metadata.state_dict_metadata
        items: list[ReadItem] = []
        for piece in self._pieces.values():
            items += create_read_items_for_chunk_list(
                piece.name, stored[piece.name], [piece.chunk]
            )
        return LoadPlan(items)

    def create_global_plan(self, global_plan: list[LoadPlan]) -> list[LoadPlan]:
        return global_plan

    def finish_plan(self, central_plan: LoadPlan) -> LoadPlan:
        return central_plan

    def load_bytes(self, read_item: ReadItem, value: io.BytesIO) -> None:
        raise NotImplementedError("pieces are tensors")

    def resolve_tensor(self, read_item: ReadItem) -> torch.Tensor:
        memory = self._pieces[read_item.dest_index].memory
        for dim, start in enumerate(read_item.dest_offsets):
            memory = memory.narrow(dim, start, read_item.lengths[dim])
        return memory

    def commit_tensor(self, read_item: ReadItem, tensor: torch.Tensor) -> None:
        """The tensor is the piece's memory itself."""


@contextmanager
def _one_process_is_fine() -> Iterator[None]:
    """Without DCP's warning that there is only one process."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "torch.distributed is disabled")
        yield
