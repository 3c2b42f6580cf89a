# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""initialize_parallel in one process, and in two through torchrun."""

import os
from datetime import timedelta
from pathlib import Path

import pytest
import torch.distributed as dist

from tests.forks import run_python
from tests.models.gpus import skip_without_gpus
from vllm import training
from vllm.model_executor.parallel_context import ParallelContext

CHECKS = Path(__file__).with_name("parallel_checks.py")


@pytest.fixture(autouse=True)
def no_groups_left():
    yield
    training.destroy_parallel()
    assert not dist.is_initialized()


def test_one_process_without_a_launcher():
    before = dict(os.environ)
    context = training.initialize_parallel()
    assert dict(os.environ) == before
    assert context == ParallelContext.current()
    assert context == ParallelContext.single(context.device)
    assert training.initialize_parallel() == context
    assert dist.get_world_size() == 1
    mesh = context.device_mesh()
    assert mesh.mesh_dim_names == ("dp", "pp", "tp") and mesh.shape == (1, 1, 1)


def test_groups_can_be_made_again():
    first = training.initialize_parallel()
    training.destroy_parallel()
    training.destroy_parallel()
    with pytest.raises(RuntimeError, match="has none"):
        ParallelContext.current()
    assert training.initialize_parallel() == first


def test_torch_distributed_of_the_caller_is_used():
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    context = training.initialize_parallel()
    assert context == ParallelContext.single(context.device)


def test_sizes_are_checked(monkeypatch):
    with pytest.raises(ValueError, match="tensor_parallel_size=2.*world of 1 process"):
        training.initialize_parallel(2)
    with pytest.raises(ValueError, match="tensor_parallel_size=0 must be an integer"):
        training.initialize_parallel(0)
    with pytest.raises(ValueError, match="pipeline_parallel_size='2' must be an integ"):
        training.initialize_parallel(1, "2")
    for timeout in (30, timedelta(0), timedelta(seconds=1.5)):
        with pytest.raises(ValueError, match="must be a datetime.timedelta of whole s"):
            training.initialize_parallel(timeout=timeout)
    assert not dist.is_initialized()
    training.initialize_parallel()
    with pytest.raises(RuntimeError, match="tensor_parallel_size=1.*destroy_parallel"):
        training.initialize_parallel(2)


def test_an_incomplete_environment_is_refused(monkeypatch):
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(
        RuntimeError, match="RANK, WORLD_SIZE but not MASTER_ADDR, MAST"
    ):
        training.initialize_parallel()


def test_two_processes():
    skip_without_gpus(2)
    torchrun = ["-m", "torch.distributed.run", "--standalone"]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    command = [*torchrun, "--nproc-per-node", 2, CHECKS]
    result = run_python(command, timeout=300, env=environment)
    report = result.stdout + result.stderr
    assert result.returncode == 0, report
    assert report.count("all checks passed") == 2, report
