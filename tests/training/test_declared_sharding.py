# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""Shardings that modules of any library declare, and those of DTensors."""

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import save_file
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.testing._internal.distributed.fake_pg import FakeStore

from vllm.model_executor.checkpoint.layout import CheckpointLayout
from vllm.model_executor.checkpoint.load import load_checkpoint
from vllm.model_executor.checkpoint.specification import ParameterSharding
from vllm.model_executor.layers.training import ColumnParallelLinear
from vllm.model_executor.parallel_context import ParallelContext

RANK_1_OF_2 = ParallelContext(tp_rank=1, tp_size=2)


class GatedLinear(nn.Module):
    """Gate and up projection in one weight, of which this rank holds half of each."""

    def __init__(self, context=RANK_1_OF_2):
        super().__init__()
        self.fc = nn.Linear(3, 8 // context.tp_size)
        self.norm = nn.LayerNorm(3)
        self.parallel_context = context

    def parameter_sharding(self):
        ranks = self.parallel_context.tp_size
        return {
            f"fc.{name}": ParameterSharding.from_local(p.shape, 0, ranks, parts=2)
            for name, p in self.fc.named_parameters()
        }


def test_a_module_declares_for_what_is_inside_it(tmp_path):
    model = nn.Sequential(GatedLinear(), nn.Linear(2, 2))
    layout = CheckpointLayout.of(model)
    assert layout.tensors["0.fc.weight"].shape == (8, 3)
    assert layout.tensors["0.norm.weight"].shape == (3,)
    assert layout.tensors["1.weight"].shape == (2, 2)
    whole = {name: torch.rand(entry.shape) for name, entry in layout.tensors.items()}
    save_file(whole, tmp_path / "model.safetensors")
    load_checkpoint(model, tmp_path)
    for name, parameter in model.named_parameters():
        expected = whole[name]
        if ".fc." in name:  # the second half of the gate, and of the up projection
            expected = torch.cat((expected[2:4], expected[6:8]))
        assert torch.equal(parameter, expected), name


def test_the_module_nearest_to_a_parameter_declares_it():
    class Outer(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = ColumnParallelLinear(4, 6, parallel_context=RANK_1_OF_2)
            self.parallel_context = RANK_1_OF_2

        def parameter_sharding(self):
            return {"inner.weight": ParameterSharding.from_local((3, 4), 1, 2)}

    tensors = CheckpointLayout.of(Outer()).tensors
    assert tensors["inner.weight"].shape == (6, 4)


@pytest.mark.parametrize(
    ("declared", "message"),
    [
        ({"fc.wieght": (4, 3)}, "'0'.*names 'fc.wieght', which is no parameter.*fc.we"),
        ({"fc.weight": (2, 3)}, r"each of 2 ranks holds \(2, 3\); this one has \(4, 3"),
    ],
)
def test_what_does_not_fit_is_refused(monkeypatch, declared, message):
    shardings = {
        name: ParameterSharding.from_local(shape, 0, 2)
        for name, shape in declared.items()
    }
    monkeypatch.setattr(GatedLinear, "parameter_sharding", lambda self: shardings)
    with pytest.raises(ValueError, match=message):
        CheckpointLayout.of(nn.Sequential(GatedLinear()))


def test_a_module_without_context_is_refused():
    module = GatedLinear()
    del module.parallel_context
    with pytest.raises(TypeError, match="GatedLinear at 'the top'.*parallel_context"):
        CheckpointLayout.of(module)


def test_parts_have_to_divide_the_local_shape():
    with pytest.raises(ValueError, match="2 parts do not divide dim 0 of .*3, 4"):
        ParameterSharding.from_local((3, 4), 0, 2, parts=2)


@pytest.fixture
def mesh():
    """Of rank 1 among two, with a group that communicates nothing."""
    dist.init_process_group("fake", rank=1, world_size=2, store=FakeStore())
    yield init_device_mesh("cpu", (2,), mesh_dim_names=("tp",))
    dist.destroy_process_group()


def dtensor_linear(mesh, placement, shape=(2, 6)):
    layer = nn.Linear(1, 1, bias=False)
    tensor = DTensor.from_local(torch.zeros(shape), mesh, [placement], run_check=False)
    layer.weight = nn.Parameter(tensor)
    return layer


@pytest.mark.parametrize(
    ("placement", "full", "rows"),
    [
        (Shard(0), (4, 6), (slice(2, 4), slice(None))),
        (Shard(-1), (2, 12), (slice(None), slice(6, 12))),
        (Replicate(), (2, 6), (slice(None), slice(None))),
    ],
)
def test_a_dtensor_says_itself(mesh, tmp_path, placement, full, rows):
    layer = dtensor_linear(mesh, placement)
    assert CheckpointLayout.of(layer).tensors["weight"].shape == full
    whole = torch.rand(full)
    save_file({"weight": whole}, tmp_path / "model.safetensors")
    load_checkpoint(layer, tmp_path)
    assert torch.equal(layer.weight.to_local(), whole[rows])
