# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""Whole checkpoint tensors of a module, one at a time, and writing them to files."""

import os
from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path

import torch
from torch import nn

from vllm.model_executor.checkpoint.files import CheckpointWriter
from vllm.model_executor.checkpoint.gather import Gatherer
from vllm.model_executor.checkpoint.ranks import on_rank_0
from vllm.model_executor.checkpoint.specification import CheckpointTensor


def checkpoint_tensors(module: nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield the whole tensors of a checkpoint of `module`, detached, on every rank.

    You can pass them to an engine in this process:
    `llm.collective_rpc("reload_weights", kwargs={"weights_iterator": list(...)})`.

    If the module is sharded, all processes of the job iterate together to the end,
    because shards are gathered one tensor at a time.

    Raises:
        RuntimeError: The processes together do not hold all of the module.
    """
    gatherer = Gatherer(module, alone=True)
    for name in gatherer.tensors:
        yield name, gatherer.gather(name)


def save_checkpoint(
    module: nn.Module,
    directory: str | os.PathLike,
    max_shard_size: int = 5 * 2**30,
) -> None:
    """Write a module's tensors as one checkpoint of safetensors.

    All processes of a job call this, and it returns when the checkpoint is written.
    Rank 0 writes. It holds the tensors of one file at a time; the other ranks hold one
    tensor. The old checkpoint stays until the new one is complete.

    Args:
        module: A training module, sharded or not, also under DistributedDataParallel
            or FSDP2.
        directory: Where to write. It is created if it does not exist.
        max_shard_size: Size of a file in bytes: a larger checkpoint becomes several
            files and `model.safetensors.index.json`.

    Raises:
        RuntimeError: The processes together do not hold all of the module, or rank 0
            could not write. The message says why.
    """
    gatherer = Gatherer(module, alone=False)
    groups = _file_groups(gatherer.tensors, max_shard_size)
    writer = CheckpointWriter(Path(directory), len(groups))
    try:
        on_rank_0(writer.begin)
        for names in groups:
            tensors = {}
            for name in names:
                whole = gatherer.gather(name)
                if gatherer.rank == 0:
                    tensors[name] = whole.contiguous().cpu()
                del whole
            on_rank_0(partial(writer.add, tensors))
        on_rank_0(writer.commit)
    finally:
        if gatherer.rank == 0:
            writer.discard()


def _file_groups(
    checkpoint: Mapping[str, CheckpointTensor], limit: int
) -> list[list[str]]:
    """The tensors of each file: in order, up to `limit` bytes, at least one."""
    if not isinstance(limit, int) or limit < 1:
        raise ValueError(f"max_shard_size={limit!r} must be a number of bytes above 0.")
    groups: list[list[str]] = [[]]
    room = limit
    for name, tensor in checkpoint.items():
        if groups[-1] and tensor.num_bytes > room:
            groups.append([])
            room = limit
        groups[-1].append(name)
        room -= tensor.num_bytes
    return groups
