# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""Whole checkpoint tensors from the pieces that ranks hold, one tensor at a time."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

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
from vllm.model_executor.checkpoint.shards import held
from vllm.model_executor.checkpoint.state_dict_hooks import refuse_changing_hooks

# Offset and size of a piece in its tensor.
Box = tuple[tuple[int, ...], tuple[int, ...]]


@dataclass
class GatherPlan:
    """Where the pieces of one checkpoint tensor are.

    Attributes:
        shape: the tensor's full shape.
        dtype: its dtype.
        owners: the ranks that hold each piece, ascending.
    """

    shape: tuple[int, ...]
    dtype: torch.dtype
    owners: dict[Box, list[int]] = field(default_factory=dict)

    @property
    def num_bytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize

    @property
    def is_whole(self) -> bool:
        """Whether the pieces have all of the tensor's elements."""
        present = sum(math.prod(sizes) for _, sizes in self.owners)
        return present == math.prod(self.shape)


class Gatherer:
    """Gathers a module's checkpoint tensors, with the other ranks of the job.

    Args:
        module: the module.
        alone: whether a module that this rank holds whole is left to this rank, with
            no communication at all; else all ranks take part in any case.

    Attributes:
        plans: the checkpoint's tensors by name, in the order they are gathered in.
        rank: this process's.

    Raises:
        RuntimeError: the ranks together do not hold a tensor exactly once.
        ValueError: the module is on the meta device, or changes its state dict.
    """

    def __init__(self, module: nn.Module, alone: bool) -> None:
        self._pieces: dict[str, dict[Box, torch.Tensor]] = {}
        self.plans: dict[str, GatherPlan] = {}
        self.rank, self._world_size = rank_and_size()
        own, is_sharded = self._own(module)
        if alone and not is_sharded:
            self._world_size, everyone = 1, {self.rank: own}
        else:
            everyone = dict(enumerate(gather_objects(own)))
        for rank, theirs in everyone.items():
            for name, plan in theirs.items():
                mine = GatherPlan(plan.shape, plan.dtype)
                owners = self.plans.setdefault(name, mine).owners
                for box in plan.owners:
                    owners.setdefault(box, []).append(rank)
        self._check()

    def _own(self, module: nn.Module) -> tuple[dict[str, GatherPlan], bool]:
        """The tensors and pieces that this rank holds; whether ranks cut the module.

        The latter is the same on every rank, whatever pieces it holds.
        """
        own: dict[str, GatherPlan] = {}
        tensors = tensors_of(module)
        refuse_meta(tensors)
        refuse_changing_hooks(module)
        parameters = CheckpointLayout.of(module).parameters
        for name, parameter in parameters.items():
            local = held(tensors[name])
            for shard in parameter.shards:
                plan = GatherPlan(shard.shape, local.dtype)
                plan = own.setdefault(shard.tensor, plan)
                if shard.numel:
                    box = (shard.offsets, shard.sizes)
                    plan.owners[box] = [self.rank]
                    self._pieces.setdefault(shard.tensor, {})[box] = shard.local(local)
        return own, any(parameter.dims for parameter in parameters.values())

    def _check(self) -> None:
        for name, plan in self.plans.items():
            if not plan.is_whole:
                raise RuntimeError(
                    f"{name} of shape {list(plan.shape)} is sharded, and the pieces of "
                    f"the {self._world_size} process(es) do not add up to it. A "
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
        plan = self.plans[name]
        pieces = self._pieces.get(name, {})
        whole = ((0,) * len(plan.shape), plan.shape)
        if len(plan.owners.get(whole, ())) == self._world_size:
            return pieces[whole]
        device = _communication_device()
        full = torch.empty(plan.shape, dtype=plan.dtype, device=device)
        for (offsets, sizes), owners in plan.owners.items():
            if owners[0] == self.rank:
                piece = pieces[offsets, sizes].to(device).contiguous()
            else:
                piece = torch.empty(sizes, dtype=plan.dtype, device=device)
            if self._world_size > 1:
                dist.broadcast(piece, src=owners[0])
            box = tuple(slice(a, a + n) for a, n in zip(offsets, sizes))
            full[box].copy_(piece)
        return full


def _communication_device() -> torch.device:
    """Where tensors have to be for a collective of the default group."""
    platform = vllm_internals.current_platform
    if dist.is_initialized() and dist.get_backend() == platform.dist_backend:
        return torch.device(platform.device_type)
    return torch.device("cpu")
