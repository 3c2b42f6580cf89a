# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""A model under DDP, FSDP2 and distributed checkpoints, on two ranks.

Run by `test_composition.py`:
`torchrun --nproc-per-node 2 -m pytest data_parallel_checks.py`.
"""

import copy
import os
import tempfile
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint.state_dict import (
    get_model_state_dict,
    set_model_state_dict,
)
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from vllm.model_executor.layers.training import token_logprobs
from vllm.model_executor.models.generic_transformer import (
    GenericTransformerConfig,
    GenericTransformerForCausalLM,
)
from vllm.model_executor.parallel_context import ParallelContext

VOCAB, BATCH, SEQ = 61, 4, 9
CONFIG = GenericTransformerConfig(
    vocab_size=VOCAB,
    hidden_size=64,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=64,
    initializer_range=0.2,
)


class Trainable(nn.Module):
    """The loss as the forward of one module, as DDP and FSDP2 want it."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.lm = GenericTransformerForCausalLM(CONFIG, ParallelContext.single())

    def forward(self, ids):
        hidden_states = self.lm.model(ids[:, :-1])
        return -token_logprobs(hidden_states, self.lm.lm_head, ids[:, 1:]).mean()


@pytest.fixture(scope="module")
def device():
    """One GPU a rank where there are enough, else the CPU."""
    enough = torch.cuda.device_count() >= 2
    if enough:
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    dist.init_process_group("nccl" if enough else "gloo")
    yield torch.device("cuda" if enough else "cpu")
    dist.destroy_process_group()


@pytest.fixture
def mesh(device):
    return init_device_mesh(device.type, (2,))


@pytest.fixture
def ids(device):
    """Each rank its own batch."""
    generator = torch.Generator().manual_seed(dist.get_rank())
    shape = (BATCH, SEQ + 1)
    return torch.randint(VOCAB, shape, generator=generator).to(device)


def mean_gradients(model, ids):
    """What data parallelism has to give: the mean over ranks of plain gradients."""
    model = copy.deepcopy(model)
    model(ids).backward()
    grads = {}
    for name, parameter in model.named_parameters():
        dist.all_reduce(parameter.grad)
        grads[name] = parameter.grad / 2
    return grads


def shard(model, mesh, **options):
    for layer in model.lm.model.layers:
        fully_shard(layer, mesh=mesh, **options)
    return fully_shard(model, mesh=mesh, **options)


def assert_gradients(model, expected, tolerance):
    for name, parameter in model.named_parameters():
        grad = parameter.grad
        grad = grad.full_tensor() if isinstance(grad, DTensor) else grad
        error = (grad - expected[name]).norm() / expected[name].norm()
        assert error <= tolerance, f"{name}: {error:.2e}"


def test_ddp(device, ids):
    model = Trainable().to(device)
    expected = mean_gradients(model, ids)
    parallel = DistributedDataParallel(model)
    parallel(ids).backward()
    assert_gradients(model, expected, 1e-6)


def test_fsdp2(device, mesh, ids):
    model = Trainable().to(device)
    expected = mean_gradients(model, ids)
    sharded = shard(model, mesh)
    for _ in range(2):
        sharded.zero_grad()
        sharded(ids).backward()
        assert_gradients(sharded, expected, 1e-6)


def test_fsdp2_with_mixed_precision(device, mesh, ids):
    model = Trainable().to(device)
    expected = mean_gradients(model, ids)
    policy = MixedPrecisionPolicy(
        param_dtype=torch.bfloat16, reduce_dtype=torch.float32
    )
    sharded = shard(model, mesh, mp_policy=policy)
    loss = sharded(ids)
    loss.backward()
    assert loss.dtype == torch.float32
    # Two layers of a few roundings of 2^-9 each, and the head.
    assert_gradients(sharded, expected, 32 * 2**-9)
    optimizer = torch.optim.AdamW(sharded.parameters(), lr=1e-2, fused=True)
    optimizer.step()
    assert sharded(ids) < loss


def test_built_on_meta_and_sharded(device, mesh, ids):
    model = Trainable().to(device)
    expected = model(ids)
    state = model.state_dict()
    with torch.device("meta"):
        other = Trainable()
    other = shard(other, mesh)
    other.to_empty(device=device)
    set_model_state_dict(
        other,
        state,
        options=dcp.state_dict.StateDictOptions(full_state_dict=True),
    )
    torch.testing.assert_close(other(ids), expected, rtol=0, atol=0)


def test_a_sharded_head_is_refused(device, mesh, ids):
    model = Trainable().to(device)
    fully_shard(model.lm.lm_head, mesh=mesh)
    with pytest.raises((TypeError, ValueError), match="fully_shard"):
        model(ids)


def test_distributed_checkpoint(device, mesh, ids):
    model = shard(Trainable().to(device), mesh)
    expected = model(ids)
    folder = [tempfile.mkdtemp()] if dist.get_rank() == 0 else [None]
    dist.broadcast_object_list(folder)
    dcp.save(get_model_state_dict(model), checkpoint_id=Path(folder[0]))
    other = Trainable().to(device)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.zero_()
    other = shard(other, mesh)
    state = get_model_state_dict(other)
    dcp.load(state, checkpoint_id=Path(folder[0]))
    set_model_state_dict(other, state)
    torch.testing.assert_close(other(ids), expected, rtol=0, atol=0)
