# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""Process groups of a trainer, which are vLLM's own."""

from __future__ import annotations

import itertools
import os
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from functools import cache

import torch
import torch.distributed as dist
from torch.distributed.rendezvous import rendezvous

from vllm.logger import init_logger
from vllm.model_executor import vllm_internals
from vllm.model_executor.parallel_context import ParallelContext

logger = init_logger(__name__)

_generations = itertools.count()

_LAUNCHER_VARIABLES = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


@dataclass(frozen=True)
class _Launch:
    """This process among those that were started together."""

    rank: int
    world_size: int
    local_rank: int


def initialize_parallel(
    tensor_parallel_size: int = 1,
    pipeline_parallel_size: int = 1,
    *,
    backend: str | None = None,
    timeout: timedelta | None = None,
) -> ParallelContext:
    """Set up vLLM's process groups in a trainer.

    Every process of the job calls this once. torchrun starts the processes, or another
    launcher that sets torchrun's environment variables. A process without these
    variables is a job of one process. Processes that tensor and pipeline parallelism
    do not use form the data-parallel groups. The ranks of a tensor-parallel group are
    adjacent.

    If the groups already exist with the same sizes, the function returns their context.

    Args:
        tensor_parallel_size: Number of tensor-parallel ranks.
        pipeline_parallel_size: Number of pipeline stages.
        backend: torch.distributed backend; that of vLLM's platform if None ("nccl"
            on CUDA, "gloo" on CPU).
        timeout: Time that a collective waits for the other processes before it raises,
            in whole seconds; torch's default for the backend if None. Choose it longer
            than one process can be ahead of another.

    Returns:
        The context for layers and model builders, on device cuda:local_rank or cpu.

    Raises:
        ValueError: The sizes do not divide the number of processes, or the timeout is
            invalid.
        RuntimeError: The groups exist with other sizes, or the launcher's
            environment variables are incomplete.
    """
    for name, size in (
        ("tensor_parallel_size", tensor_parallel_size),
        ("pipeline_parallel_size", pipeline_parallel_size),
    ):
        if not isinstance(size, int) or size < 1:
            raise ValueError(f"{name}={size!r} must be an integer of at least 1.")
    _check_timeout(timeout)
    if vllm_internals.model_parallel_is_initialized():
        return _existing(tensor_parallel_size, pipeline_parallel_size)

    launch = _read_launch()
    model_size = tensor_parallel_size * pipeline_parallel_size
    if launch.world_size % model_size:
        raise ValueError(
            f"tensor_parallel_size={tensor_parallel_size} times "
            f"pipeline_parallel_size={pipeline_parallel_size} is {model_size}, which "
            f"does not divide the world of {launch.world_size} process(es). Start a "
            f"multiple of {model_size} processes, e.g. torchrun --nproc-per-node "
            f"{model_size}, or choose smaller sizes."
        )
    platform = vllm_internals.current_platform
    backend = backend or platform.dist_backend
    if platform.is_cuda_alike():
        torch.cuda.set_device(launch.local_rank)
    _start_torch_distributed(launch, backend, timeout)
    with _kept_environment():
        _start_vllm_groups(
            launch, backend, tensor_parallel_size, pipeline_parallel_size, timeout
        )
    context = ParallelContext.current()
    logger.info("Parallel training groups: %s", context)
    return context


def destroy_parallel() -> None:
    """Destroy the process groups of `initialize_parallel` and of torch.distributed.

    Contexts and layers that use the groups can no longer communicate. Without groups
    the function does nothing.
    """
    vllm_internals.destroy_model_parallel()
    vllm_internals.destroy_distributed_environment()


def _existing(
    tensor_parallel_size: int, pipeline_parallel_size: int
) -> ParallelContext:
    context = ParallelContext.current()
    if (context.tp_size, context.pp_size) != (
        tensor_parallel_size,
        pipeline_parallel_size,
    ):
        raise RuntimeError(
            "vLLM's process groups exist in this process with "
            f"tensor_parallel_size={context.tp_size} and "
            f"pipeline_parallel_size={context.pp_size}; "
            f"{tensor_parallel_size} and {pipeline_parallel_size} were asked for. "
            "Call vllm.training.destroy_parallel() first, in every process."
        )
    return context


def _read_launch() -> _Launch:
    if dist.is_initialized():
        rank = dist.get_rank()
        local_rank = int(os.environ.get("LOCAL_RANK", rank))
        return _Launch(rank, dist.get_world_size(), local_rank)
    found = [name for name in _LAUNCHER_VARIABLES if name in os.environ]
    if "RANK" not in found and "WORLD_SIZE" not in found:
        return _Launch(0, 1, int(os.environ.get("LOCAL_RANK", 0)))
    missing = sorted(set(_LAUNCHER_VARIABLES) - set(found))
    if missing:
        raise RuntimeError(
            f"The environment has {', '.join(found)} but not {', '.join(missing)}; "
            "torchrun sets all of them. Start the script with torchrun, or unset "
            "them to run a single process."
        )
    rank = int(os.environ["RANK"])
    return _Launch(
        rank,
        int(os.environ["WORLD_SIZE"]),
        int(os.environ.get("LOCAL_RANK", rank)),
    )


def _check_timeout(timeout: timedelta | None) -> None:
    if timeout is None:
        return
    second = timedelta(seconds=1)
    if not isinstance(timeout, timedelta) or timeout < second or timeout % second:
        raise ValueError(
            f"timeout={timeout!r} must be a datetime.timedelta of whole seconds, at "
            "least one."
        )


def _start_torch_distributed(
    launch: _Launch, backend: str, timeout: timedelta | None
) -> None:
    if dist.is_initialized():
        return
    store: dist.Store
    if launch.world_size == 1:
        store = dist.HashStore()
    else:
        # The launcher's store outlives the groups, and torchrun's the processes that
        # it restarts; it keeps their keys, so groups that are made again need names
        # of their own. All ranks count alike.
        attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
        generation = f"vllm_training/{attempt}/{next(_generations)}"
        store = dist.PrefixStore(generation, _launcher_store(launch))
    dist.init_process_group(
        backend,
        store=store,
        rank=launch.rank,
        world_size=launch.world_size,
        timeout=timeout,
    )


@cache
def _launcher_store(launch: _Launch) -> dist.Store:
    """The store at MASTER_ADDR and MASTER_PORT, one for the process's life."""
    store, _, _ = next(rendezvous("env://", launch.rank, launch.world_size))
    return store


def _start_vllm_groups(
    launch: _Launch,
    backend: str,
    tp_size: int,
    pp_size: int,
    timeout: timedelta | None,
) -> None:
    config = vllm_internals.VllmConfig()
    if timeout is not None:
        seconds = int(timeout.total_seconds())
        config.parallel_config.distributed_timeout_seconds = seconds
        config.parallel_config.cpu_distributed_timeout_seconds = seconds
    with vllm_internals.set_current_vllm_config(config):
        vllm_internals.init_distributed_environment(
            world_size=launch.world_size,
            rank=launch.rank,
            distributed_init_method="env://",
            local_rank=launch.local_rank,
            backend=backend,
        )
        # vLLM's CPU communicator names its shared memory after this variable.
        ident = [f"training-{uuid.uuid4().hex}"]
        dist.broadcast_object_list(ident, src=0)
        os.environ["VLLM_DIST_IDENT"] = ident[0]
        # Set only now: before, it would make vLLM renumber the ranks.
        config.parallel_config.data_parallel_size = launch.world_size // (
            tp_size * pp_size
        )
        vllm_internals.initialize_model_parallel(tp_size, pp_size, backend=backend)


@contextmanager
def _kept_environment() -> Iterator[None]:
    """Undo the environment variables that building a vLLM config sets.

    They prepare an engine's worker processes (LD_PRELOAD, LOCAL_WORLD_SIZE and
    others) and would reach every child of the trainer.
    """
    saved = dict(os.environ)
    try:
        yield
    finally:
        for name in set(os.environ) - set(saved):
            del os.environ[name]
        os.environ.update(saved)
