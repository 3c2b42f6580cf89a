# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""Parameters that are DTensors become real tensors again when weights are reloaded."""

import pytest
import torch
from torch.distributed import HashStore, destroy_process_group, init_process_group
from torch.distributed.tensor import DTensor, Shard, distribute_tensor, init_device_mesh

from vllm.model_executor.model_loader.reload.meta import (
    materialize_meta_tensor,
    to_meta_tensor,
)


@pytest.fixture
def mesh():
    init_process_group("gloo", store=HashStore(), rank=0, world_size=1)
    yield init_device_mesh("cpu", (1,))
    destroy_process_group()


def test_a_dtensor_keeps_placements_and_attributes(mesh) -> None:
    sharded = distribute_tensor(torch.randn(6, 4), mesh, [Shard(0)])
    parameter = torch.nn.Parameter(sharded)
    parameter.weight_loader = "a loader"
    with torch.device("cpu"):
        tensor = materialize_meta_tensor(to_meta_tensor(parameter))
    assert isinstance(tensor, DTensor)
    assert tensor.placements == (Shard(0),) and tensor.shape == (6, 4)
    assert tensor.device.type == "cpu" and tensor.weight_loader == "a loader"
    tensor.copy_(sharded)
    assert torch.equal(tensor.to_local(), sharded.to_local())


def test_a_plain_tensor_is_made_as_before() -> None:
    with torch.device("cpu"):
        tensor = materialize_meta_tensor(
            to_meta_tensor(torch.nn.Parameter(torch.ones(2)))
        )
    assert type(tensor) is torch.nn.Parameter and tensor.device.type == "cpu"
