# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""Ray's executor on CPU, with a Ray that is made up; a real one is in other tests."""

import sys
from types import SimpleNamespace

import pytest

from vllm.v1.executor import ray_support


@pytest.fixture
def ray(monkeypatch):
    """A cluster of four CPUs, of which one is free, that records what it takes back."""
    fake = SimpleNamespace(
        removed=[],
        is_initialized=lambda: True,
        cluster_resources=lambda: {"CPU": 4.0},
        available_resources=lambda: {"CPU": 1.0},
    )
    fake.util = SimpleNamespace(
        get_current_placement_group=lambda: None,
        remove_placement_group=fake.removed.append,
    )
    monkeypatch.setitem(sys.modules, "ray", fake)
    monkeypatch.setattr(ray_support, "RESOURCE_WAIT_SECONDS", 0)
    return fake


def sizes(tensor, pipeline):
    return SimpleNamespace(
        tensor_parallel_size=tensor,
        pipeline_parallel_size=pipeline,
        world_size=tensor * pipeline,
        placement_group=None,
    )


def test_too_few_cpus_are_an_error_at_once(ray) -> None:
    ray_support.check_cluster(sizes(1, 1), "CPU")
    with pytest.raises(ValueError, match="needs 2 of Ray's CPUs.* only 1 are free"):
        ray_support.check_cluster(sizes(2, 1), "CPU")
    with pytest.raises(ValueError, match="=2 x .*=4 needs 8 .* cluster has 4"):
        ray_support.check_cluster(sizes(2, 4), "CPU")
    ray_support.check_cluster(sizes(2, 4), "GPU")


@pytest.mark.parametrize("given", [None, "the user's"])
def test_a_start_that_fails_gives_its_own_bundles_back(ray, given) -> None:
    config, ended = SimpleNamespace(placement_group=given), []
    executor = SimpleNamespace(parallel_config=config, shutdown=lambda: ended.append(1))

    @ray_support.shut_down_on_failure
    def start(executor):
        executor.parallel_config.placement_group = given or "its own"
        raise KeyError("a worker failed")

    with pytest.raises(KeyError, match="a worker failed"):
        start(executor)
    assert ended == [1]
    assert ray.removed == ([] if given else ["its own"])
    assert config.placement_group == given
    # A second shutdown gives nothing back twice.
    ray_support.release(executor)
    assert len(ray.removed) <= 1
