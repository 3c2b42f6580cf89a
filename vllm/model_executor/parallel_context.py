# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""Ranks, sizes and process groups of one process, as an immutable value.

A model builder gets a `ParallelContext` from the engine, a trainer gets one from
`vllm.training.initialize_parallel`, and every layer of
`vllm.model_executor.layers.training` takes one. A layer that has one reads no
process-global state.
"""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from typing import Any, NoReturn

import torch
from torch.distributed import DeviceMesh, ProcessGroup

_AXES = ("tp", "pp", "dp")


@dataclass(frozen=True)
class ParallelContext:
    """Ranks, sizes and process groups of tensor, pipeline and data parallelism.

    Ranks are laid out as in vLLM: data parallel outermost, then pipeline, then
    tensor parallel, whose ranks are adjacent.

    A context belongs to the process that made it. One that holds process groups
    cannot be pickled; copying it (also as part of a module) returns the same object.

    Attributes:
        tp_rank: Rank within the tensor-parallel group.
        tp_size: Number of tensor-parallel ranks.
        pp_rank: Rank within the pipeline-parallel group, i.e. the stage.
        pp_size: Number of pipeline stages.
        dp_rank: Rank within the data-parallel group.
        dp_size: Number of data-parallel replicas.
        rank: Rank among all processes.
        world_size: Number of all processes; by default the product of the sizes.
        local_rank: Rank on this host, which picks the device.
        device: The device of this rank; CPU by default.
        tp_group: Group for tensor-parallel collectives.
        pp_group: Group for pipeline transfers.
        dp_group: Group for data-parallel collectives. vLLM's groups exist even if their
            size is 1, because for PyTorch no group means all processes. None with one
            process, and if no group was given.
        tp_reduction_shards: Number of partial products that a row-parallel output is
            the sum of, in rank order. A multiple of tp_size, which is the default. To
            be bitwise identical to an engine with a larger tensor-parallel size, a
            trainer sets the engine's size here. An engine takes it from
            `additional_config`: LLM(..., additional_config={"tp_reduction_shards": n}).
    """

    tp_rank: int = 0
    tp_size: int = 1
    pp_rank: int = 0
    pp_size: int = 1
    dp_rank: int = 0
    dp_size: int = 1
    rank: int = 0
    world_size: int = field(default=None)  # type: ignore[assignment]
    local_rank: int = 0
    device: torch.device = torch.device("cpu")
    tp_group: ProcessGroup | None = field(default=None, repr=False)
    pp_group: ProcessGroup | None = field(default=None, repr=False)
    dp_group: ProcessGroup | None = field(default=None, repr=False)
    tp_reduction_shards: int = field(default=None)  # type: ignore[assignment]

    def __post_init__(self) -> None:
        object.__setattr__(self, "device", torch.device(self.device))
        model_size = 1
        for axis in _AXES:
            rank, size = getattr(self, f"{axis}_rank"), getattr(self, f"{axis}_size")
            _check_rank(f"{axis}_rank", rank, f"{axis}_size", size)
            _check_group(axis, rank, size, getattr(self, f"{axis}_group"))
            model_size *= size
        if self.world_size is None:
            object.__setattr__(self, "world_size", model_size)
        _check_rank("rank", self.rank, "world_size", self.world_size)
        if self.world_size % model_size:
            raise ValueError(
                f"world_size={self.world_size} is not a multiple of tp_size * pp_size "
                f"* dp_size = {self.tp_size} * {self.pp_size} * {self.dp_size} = "
                f"{model_size}; every process belongs to exactly one group of each "
                "kind, so change a size or the number of processes."
            )
        if self.tp_reduction_shards is None:
            object.__setattr__(self, "tp_reduction_shards", self.tp_size)
        shards = self.tp_reduction_shards
        if not _is_count(shards) or shards % self.tp_size:
            raise ValueError(
                f"tp_reduction_shards={shards!r} must be a positive multiple of "
                f"tp_size={self.tp_size}: each tensor-parallel rank adds up a whole "
                "number of partial products. Give the tensor-parallel size of the "
                "engine to be reproduced, or leave it out."
            )

    @property
    def is_first_stage(self) -> bool:
        """Whether this is the pipeline stage that embeds the tokens."""
        return self.pp_rank == 0

    @property
    def is_last_stage(self) -> bool:
        """Whether this is the pipeline stage that has the head."""
        return self.pp_rank == self.pp_size - 1

    @classmethod
    def single(cls, device: torch.device | str | None = None) -> ParallelContext:
        """Return the context of a single process: every size is 1, without groups.

        Args:
            device: Device of the process; CPU by default.
        """
        return cls(device=torch.device(device or "cpu"))

    @classmethod
    def current(cls) -> ParallelContext:
        """Return the context of vLLM's process groups in this process.

        Returns:
            The context, inside a vLLM worker or after
            `vllm.training.initialize_parallel`.

        Raises:
            RuntimeError: The groups do not exist.
        """
        from vllm.model_executor import vllm_internals

        if not vllm_internals.model_parallel_is_initialized():
            raise RuntimeError(
                "ParallelContext.current() needs vLLM's process groups, and this "
                "process has none. In a trainer call "
                "vllm.training.initialize_parallel(tensor_parallel_size=...) first; "
                "in a model builder use the parallel_context that the builder "
                "receives; without parallelism use ParallelContext.single()."
            )
        world = vllm_internals.get_world_group()
        axes: dict[str, Any] = {}
        for axis, group in (
            ("tp", vllm_internals.get_tp_group()),
            ("pp", vllm_internals.get_pp_group()),
            ("dp", vllm_internals.get_dp_group()),
        ):
            axes[f"{axis}_rank"] = group.rank_in_group
            axes[f"{axis}_size"] = group.world_size
            axes[f"{axis}_group"] = group.device_group if world.world_size > 1 else None
        config = vllm_internals.get_current_vllm_config_or_none()
        additional = {} if config is None else config.additional_config
        if isinstance(additional, dict) and "tp_reduction_shards" in additional:
            axes["tp_reduction_shards"] = additional["tp_reduction_shards"]
        return cls(
            rank=world.rank,
            world_size=world.world_size,
            local_rank=world.local_rank,
            device=world.device,
            **axes,
        )

    @classmethod
    def current_or_single(cls) -> ParallelContext:
        """Return `current()` if vLLM's groups exist, else `single()`.

        A layer without a context uses this one.
        """
        from vllm.model_executor import vllm_internals

        if vllm_internals.model_parallel_is_initialized():
            return cls.current()
        return cls.single()

    def device_mesh(self) -> DeviceMesh:
        """Return a mesh with dims ("dp", "pp", "tp") over the context's groups.

        For DTensor and FSDP2: `fully_shard(model, mesh=context.device_mesh()["dp"])`.
        All ranks call this together, once. It creates a group of one process for each
        dim of size 1 that has no group.

        Raises:
            RuntimeError: torch.distributed is not initialised, or a group is missing.
        """
        if not torch.distributed.is_initialized():
            raise RuntimeError(
                "device_mesh() needs torch.distributed, which is not initialised in "
                "this process. Call vllm.training.initialize_parallel() first; it "
                "also works for a single process."
            )
        model_size = self.dp_size * self.pp_size * self.tp_size
        first = self.rank - self.rank % model_size
        ranks = torch.arange(first, first + model_size)
        groups = []
        for axis in ("dp", "pp", "tp"):
            size, group = (
                getattr(self, f"{axis}_{part}") for part in ("size", "group")
            )
            if size > 1 or group is not None:
                groups.append(self.group(axis))
            else:
                groups.append(
                    torch.distributed.new_group(
                        [self.rank], use_local_synchronization=True
                    )
                )
        return DeviceMesh.from_group(
            groups,
            self.device.type,
            mesh=ranks.view(self.dp_size, self.pp_size, self.tp_size),
            mesh_dim_names=("dp", "pp", "tp"),
        )

    def group(self, axis: str) -> ProcessGroup:
        """Return the process group of one axis, for a collective over it.

        Args:
            axis: "tp", "pp" or "dp".

        Raises:
            RuntimeError: The context has no such group.
        """
        group = getattr(self, f"{axis}_group")
        if group is None:
            raise RuntimeError(
                f"A collective over {axis} needs a process group, and this "
                f"ParallelContext has {axis}_size={getattr(self, f'{axis}_size')} but "
                f"{axis}_group=None. Take the context from "
                "vllm.training.initialize_parallel() or from the engine."
            )
        return group

    def __copy__(self) -> ParallelContext:
        return self

    def __deepcopy__(self, memo: dict[int, Any]) -> ParallelContext:
        return self

    def __reduce__(self) -> tuple[Any, ...]:
        if any(getattr(self, f"{axis}_group") is not None for axis in _AXES):
            _refuse_pickle(self)
        return type(self), tuple(getattr(self, f.name) for f in fields(self))


def _refuse_pickle(context: ParallelContext) -> NoReturn:
    raise TypeError(
        f"{context} holds process groups, which exist only in the process that made "
        "them, so it cannot be pickled or sent. Save state_dict() instead of the "
        "module; in a model builder take parallel_context as a parameter instead of "
        "capturing one."
    )


def _is_count(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 1


def _check_rank(rank_name: str, rank: int, size_name: str, size: int) -> None:
    if not _is_count(size):
        raise ValueError(f"{size_name}={size!r} must be an integer of at least 1.")
    if not isinstance(rank, int) or not 0 <= rank < size:
        raise ValueError(
            f"{rank_name}={rank!r} must be an integer from 0 to {size - 1}, because "
            f"{size_name}={size}."
        )


def _check_group(axis: str, rank: int, size: int, group: ProcessGroup | None) -> None:
    if group is None:
        return
    if (group.size(), group.rank()) != (size, rank):
        raise ValueError(
            f"{axis}_group has size {group.size()} and this process is rank "
            f"{group.rank()} in it, but {axis}_size={size} and {axis}_rank={rank}; "
            "give the group that the sizes were taken from."
        )
