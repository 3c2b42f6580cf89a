# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""Models in torch's wrappers have the names and checkpoints of plain ones."""

import math

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import (
    checkpoint_wrapper,
    offload_wrapper,
)
from torch.distributed.fsdp import FullyShardedDataParallel, ShardingStrategy
from torch.nn.parallel import DataParallel, DistributedDataParallel

from vllm import training
from vllm.model_executor.checkpoint.layout import CheckpointLayout
from vllm.model_executor.checkpoint.save import checkpoint_tensors
from vllm.model_executor.checkpoint.specification import ParameterSharding
from vllm.model_executor.layers.training import ColumnParallelLinear
from vllm.model_executor.models.builder import PipelineLayers
from vllm.model_executor.models.builder.loader import EngineLoader
from vllm.model_executor.parallel_context import ParallelContext


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        # Names that wrappers use too.
        self.module = nn.Linear(3, 3)
        self._orig_mod = nn.Linear(3, 3, bias=False)
        self.register_buffer("scale", torch.ones(2))

    def forward(self, x):
        return self._orig_mod(self.module(x))


class Model(nn.Module):
    def __init__(self, seed):
        super().__init__()
        torch.manual_seed(seed)
        context = ParallelContext.single()
        self.layers = PipelineLayers(2, lambda _: Block(), context)

    def forward(self, x):
        for layer in self.layers:
            x = layer(x)
        return x


NAMES = [
    f"layers.{index}.{name}"
    for index in range(2)
    for name in ("scale", "module.weight", "module.bias", "_orig_mod.weight")
]


def fsdp1(module, **options):
    options = {"use_orig_params": True, "device_id": torch.device("cpu")} | options
    strategy = ShardingStrategy.NO_SHARD
    return FullyShardedDataParallel(module, sharding_strategy=strategy, **options)


BLOCK_WRAPPERS = {
    "checkpoint": checkpoint_wrapper,
    "offload": offload_wrapper,
    "compile": torch.compile,
    "compiled checkpoint": lambda block: torch.compile(checkpoint_wrapper(block)),
    "fsdp1": fsdp1,
}
MODEL_WRAPPERS = {
    "compile": torch.compile,
    "DataParallel": DataParallel,
    "DDP": DistributedDataParallel,
    "compiled DDP": lambda model: torch.compile(DistributedDataParallel(model)),
    "fsdp1": fsdp1,
}


@pytest.fixture
def one_process():
    dist.init_process_group("gloo", rank=0, world_size=1, store=dist.HashStore())
    yield
    dist.destroy_process_group()


def wrapped(seed, blocks, root):
    model = Model(seed)
    if blocks is not None:
        for index in range(2):
            model.layers[index] = BLOCK_WRAPPERS[blocks](model.layers[index])
    return model if root is None else MODEL_WRAPPERS[root](model)


def stepped(model):
    """An optimizer that has moments of every parameter."""
    optimizer = torch.optim.AdamW(model.parameters())
    for parameter in model.parameters():
        parameter.grad = parameter.detach().clone()
    optimizer.step()
    return optimizer


def assert_same(model, other):
    tensors = dict(checkpoint_tensors(other))
    for name, tensor in checkpoint_tensors(model):
        assert torch.equal(tensor, tensors[name]), name


@pytest.mark.parametrize(
    ("blocks", "root"),
    [
        *((name, None) for name in BLOCK_WRAPPERS),
        *((None, name) for name in MODEL_WRAPPERS),
        ("compiled checkpoint", "compiled DDP"),
    ],
)
def test_a_wrapped_model_is_the_plain_one(tmp_path, one_process, blocks, root):
    model, plain = wrapped(0, blocks, root), Model(1)
    assert sorted(training.sharding(model)) == sorted(NAMES)
    assert sorted(name for name, _ in checkpoint_tensors(model)) == sorted(NAMES)

    training.save_checkpoint(model, tmp_path / "wrapped")
    assert load_file(tmp_path / "wrapped" / "model.safetensors").keys() == set(NAMES)
    training.load_checkpoint(plain, tmp_path / "wrapped")
    assert_same(model, plain)
    training.save_checkpoint(Model(2), tmp_path / "plain")
    training.load_checkpoint(model, tmp_path / "plain")
    assert_same(model, Model(2))

    optimizer = stepped(model)
    training.save_state(model, optimizer, tmp_path / "state")
    plain = Model(1)
    plain_optimizer = torch.optim.AdamW(plain.parameters())
    training.load_state(plain, plain_optimizer, tmp_path / "state")
    assert_same(model, plain)
    moments = [s["exp_avg"] for s in optimizer.state.values()]
    plain_moments = [s["exp_avg"] for s in plain_optimizer.state.values()]
    assert len(moments) == 6 and all(map(torch.equal, moments, plain_moments))

    single = ParallelContext.single()
    for part in (model, plain):
        for parameter in part.parameters():
            parameter.grad = parameter.detach().clone()
    norms = [training.clip_grad_norm_(m, math.inf, single) for m in (model, plain)]
    assert torch.equal(*norms) and norms[0] > 0


@pytest.mark.parametrize("kind", ["checkpoint", "compile", "compiled checkpoint"])
def test_an_engine_loads_a_plain_checkpoint_into_wrapped_blocks(kind):
    """And names what it has loaded as vLLM, which counts it, does."""
    model, plain = wrapped(0, kind, None), Model(1)
    loader = EngineLoader(model, CheckpointLayout.of(model), None)
    loaded = loader.load(checkpoint_tensors(plain))
    named = nn.Module.named_parameters(model)
    assert {name for name, _ in named} <= loaded and len(loaded) == len(NAMES)
    assert_same(model, plain)
    part = [(n, t + 1) for n, t in checkpoint_tensors(plain) if "1.module" in n]
    assert len(loader.load(part)) == 2
    assert torch.equal(dict(checkpoint_tensors(model))[part[0][0]], part[0][1])


@pytest.mark.parametrize("kind", [checkpoint_wrapper, torch.compile])
def test_a_sharding_is_declared_for_what_is_wrapped(kind):
    context = ParallelContext(tp_rank=1, tp_size=2)

    class Declares(nn.Module):
        def __init__(self):
            super().__init__()
            self.parallel_context = context
            self.fc = kind(nn.Linear(3, 2))
            self.column = kind(ColumnParallelLinear(3, 4, parallel_context=context))

        def parameter_sharding(self):
            return {
                name: ParameterSharding.from_local(p.shape, 0, 2)
                for name, p in self.named_parameters()
                if name.startswith("fc")
            }

    held = training.sharding(nn.ModuleDict({"a": kind(Declares())}))
    assert held["a.fc.weight"].shape == (4, 3)
    assert held["a.column.weight"].shape == (4, 3)


def test_flattened_parameters_are_refused(one_process):
    model = nn.Sequential(
        nn.Linear(2, 2), fsdp1(nn.Linear(2, 2), use_orig_params=False)
    )
    with pytest.raises(ValueError, match="FSDP1. at '1' has flattened.*fully_shard"):
        training.sharding(model)
