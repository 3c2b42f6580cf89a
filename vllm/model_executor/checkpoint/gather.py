# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""Whole checkpoint tensors from the pieces that ranks hold, one tensor at a time."""

from __future__ import annotations

import math

import torch
import torch.distributed as dist
from torch import nn

from vllm.model_executor import vllm_internals
from vllm.model_executor.checkpoint.layout import (
    CheckpointLayout,
    refuse_meta,
    tensors_of,
)
from vllm.model_executor.checkpoint.ranks import gather_objects, rank_and_size
from vllm.model_executor.checkpoint.shards import local_tensor, slices
from vllm.model_executor.checkpoint.specification import CheckpointTensor
from vllm.model_executor.checkpoint.state_dict_hooks import refuse_changing_hooks

# Offsets and sizes of a shard in its tensor.
_Box = tuple[tuple[int, ...], tuple[int, ...]]


class Gatherer:
    """Gathers a module's checkpoint tensors, with the other ranks of the job.

    Args:
        module: the module.
        alone: whether a module that this rank holds whole is left to this rank, with
            no communication at all; else all ranks take part in any case.

    Attributes:
        tensors: the checkpoint's tensors by name, in the order they are gathered in.
        rank: this process's.

    Raises:
        RuntimeError: the ranks together do not hold a tensor exactly once.
        ValueError: the module is on the meta device, or changes its state dict.
    """

    def __init__(self, module: nn.Module, alone: bool) -> None:
        self.rank, self._world_size = rank_and_size()
        self.tensors: dict[str, CheckpointTensor] = {}
        # By tensor, and by a shard's offsets and sizes: this rank's memory, and the
        # ranks that hold the shard, ascending.
        self._own: dict[str, dict[_Box, torch.Tensor]] = {}
        self._owners: dict[str, dict[_Box, list[int]]] = {}
        tensors = tensors_of(module)
        refuse_meta(tensors)
        refuse_changing_hooks(module)
        layout = CheckpointLayout.of(module)
        for name, parameter in layout.parameters.items():
            local = local_tensor(tensors[name])
            for shard in parameter.shards:
                own = self._own.setdefault(shard.tensor, {})
                if shard.numel:
                    own[shard.offsets, shard.sizes] = shard.local(local)
        boxes = [(layout.tensors[name], list(own)) for name, own in self._own.items()]
        # The same on every rank, whatever it holds.
        is_sharded = any(parameter.dims for parameter in layout.parameters.values())
        if alone and not is_sharded:
            self._world_size, everyone = 1, {self.rank: boxes}
        else:
            everyone = dict(enumerate(gather_objects(boxes)))
        for rank, theirs in everyone.items():
            for tensor, held in theirs:
                self.tensors.setdefault(tensor.name, tensor)
                owners = self._owners.setdefault(tensor.name, {})
                for box in held:
                    owners.setdefault(box, []).append(rank)
        self._refuse_incomplete()

    def _refuse_incomplete(self) -> None:
        for name, tensor in self.tensors.items():
            present = sum(math.prod(sizes) for _, sizes in self._owners[name])
            if present != tensor.shape.numel():
                raise RuntimeError(
                    f"{name} of shape {list(tensor.shape)} is sharded, and the pieces "
                    f"of the {self._world_size} process(es) do not add up to it. A "
                    "sharded module is gathered by all the processes it is sharded "
                    "over: build it with the context of "
                    "vllm.training.initialize_parallel()."
                )

    def gather(self, name: str) -> torch.Tensor:
        """One whole tensor, on every rank.

        Returns:
            A view of the module's own memory where every rank holds the tensor whole,
            else a new tensor on the device that the ranks communicate on.
        """
        tensor, owners_of = self.tensors[name], self._owners[name]
        own = self._own.get(name, {})
        whole = (0,) * len(tensor.shape), tuple(tensor.shape)
        if len(owners_of.get(whole, ())) == self._world_size:
            return own[whole]
        device = _communication_device()
        full = torch.empty(tensor.shape, dtype=tensor.dtype, device=device)
        for (offsets, sizes), owners in owners_of.items():
            if owners[0] == self.rank:
                piece = own[offsets, sizes].to(device).contiguous()
            else:
                piece = torch.empty(sizes, dtype=tensor.dtype, device=device)
            if self._world_size > 1:
                dist.broadcast(piece, src=owners[0])
            full[slices(offsets, sizes)].copy_(piece)
        return full


def _communication_device() -> torch.device:
    """Where tensors have to be for a collective of the default group."""
    platform = vllm_internals.current_platform
    if dist.is_initialized() and dist.get_backend() == platform.dist_backend:
        return torch.device(platform.device_type)
    return torch.device("cpu")
