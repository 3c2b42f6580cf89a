# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""What Ray's executor needs beyond vLLM's own: hosts without GPUs, and a clean end.

On CPU a worker's bundle is one of Ray's CPUs. Workers get the threads that workers of
the multiprocessing executor get, so that both compute the same bits.
"""

from __future__ import annotations

import functools
import os
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from vllm.logger import init_logger
from vllm.utils.ompmultiprocessing import OMPProcessManager

if TYPE_CHECKING:
    from vllm.config import ParallelConfig, VllmConfig

logger = init_logger(__name__)

CPU = "CPU"
RESOURCE_WAIT_SECONDS = 20
"""How long CPUs that are in use may take to become free."""

_THREAD_VARIABLES = (
    "GOMP_CPU_AFFINITY",
    "KMP_AFFINITY",
    "KMP_BLOCKTIME",
    "KMP_TPAUSE",
    "LD_PRELOAD",
    "OMP_NUM_THREADS",
    "OMP_PLACES",
    "OMP_PROC_BIND",
)


def check_cluster(parallel_config: ParallelConfig, device_key: str) -> None:
    """Called before bundles are asked for; does nothing for GPUs.

    Upstream waits half an hour for GPUs that an autoscaler may bring.

    Raises:
        ValueError: The cluster has fewer CPUs than the engine needs, or others use
            them.
        NotImplementedError: The executor is the one that is chosen with
            VLLM_USE_RAY_V2_EXECUTOR_BACKEND=0, which needs GPUs.
    """
    if device_key != CPU:
        return
    import ray

    from vllm import envs

    if not envs.VLLM_USE_RAY_V2_EXECUTOR_BACKEND:
        raise NotImplementedError(
            "VLLM_USE_RAY_V2_EXECUTOR_BACKEND=0 chooses an executor that needs GPUs. "
            "On CPU leave it unset."
        )
    if parallel_config.placement_group or ray.util.get_current_placement_group():
        return
    needed = parallel_config.world_size
    sizes = (
        f"tensor_parallel_size={parallel_config.tensor_parallel_size} x "
        f"pipeline_parallel_size={parallel_config.pipeline_parallel_size} needs "
        f"{needed} of Ray's CPUs, one for each worker"
    )
    total = ray.cluster_resources().get(CPU, 0)
    if total < needed:
        raise ValueError(
            f"{sizes}, and the Ray cluster has {total:g}. Start Ray with more, as in "
            f"ray.init(num_cpus={needed}) or `ray start --num-cpus`, or use smaller "
            "sizes."
        )
    deadline = time.monotonic() + RESOURCE_WAIT_SECONDS
    while (free := ray.available_resources().get(CPU, 0)) < needed:
        if time.monotonic() > deadline:
            raise ValueError(
                f"{sizes}; of the Ray cluster's {total:g} only {free:g} are free, and "
                f"no more became free in {RESOURCE_WAIT_SECONDS} s. End what uses "
                "them (`ray status`), or start Ray with more."
            )
        time.sleep(0.2)


def worker_runtime_env(
    runtime_env: dict[str, Any],
    vllm_config: VllmConfig,
    rank: int,
    one_node: bool,
) -> dict[str, Any]:
    """The runtime environment of one worker: on CPU with its threads.

    Args:
        runtime_env: The one that all workers have.
        vllm_config: The engine's config.
        rank: The worker's rank, by which VLLM_CPU_OMP_THREADS_BIND counts.
        one_node: Whether all workers run on the host of this process, whose cores
            are known. Over several hosts Ray chooses the number of threads.
    """
    from vllm.platforms import current_platform

    if not current_platform.is_cpu() or not one_node:
        return runtime_env
    with OMPProcessManager(vllm_config).configure_omp_envs(rank, rank):
        threads = {n: os.environ[n] for n in _THREAD_VARIABLES if n in os.environ}
    return runtime_env | {"env_vars": runtime_env.get("env_vars", {}) | threads}


def shut_down_on_failure(init: Callable[[Any], None]) -> Callable[[Any], None]:
    """Decorator of an executor's start: what fails leaves no worker behind."""

    @functools.wraps(init)
    def start(executor: Any) -> None:
        import ray

        given = executor.parallel_config.placement_group
        if given is None and ray.is_initialized():
            given = ray.util.get_current_placement_group()
        executor.has_own_placement_group = given is None
        try:
            init(executor)
        except BaseException:
            executor.shutdown()
            release(executor)
            raise

    return start


def release(executor: Any) -> None:
    """Give the bundles back that the executor asked for; called by its shutdown."""
    import ray

    group = executor.parallel_config.placement_group
    owned = getattr(executor, "has_own_placement_group", False)
    if group is not None and owned and ray.is_initialized():
        executor.parallel_config.placement_group = None
        ray.util.remove_placement_group(group)
