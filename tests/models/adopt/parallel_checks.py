# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""Adopted models under DDP and FSDP2, on two ranks.

Run by `test_trainers.py`:
`torchrun --nproc-per-node 2 parallel_checks.py FOLDER FAMILY...`.
"""

import copy
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
)
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel
from transformers import AutoModelForCausalLM

from tests.models.adopt.families import VOCABULARY, make
from vllm import training

# Of the gradients' largest element: fp32 sums in another order, through two layers.
TOLERANCE = 1e-4


def shard(model):
    """FSDP2 of each layer and of the rest."""
    layers = next(m for m in model.modules() if isinstance(m, nn.ModuleList))
    for layer in layers:
        fully_shard(layer)
    return fully_shard(model)


def step(model, ids):
    """A step of SGD of which each rank computes its rows."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    loss = model(ids, labels=ids, use_cache=False).loss
    loss.backward()
    gradients = [whole(p.grad) for p in model.parameters()]
    optimizer.step()
    return loss.detach(), gradients


def whole(tensor):
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor.clone()


def check_step(kind, family):
    """Gradients of all rows are those of the unmodified model in one process."""
    original = make(family).train()
    model = training.adopt(copy.deepcopy(original))
    model.gradient_checkpointing_enable()
    wrapped = DistributedDataParallel(model) if kind == "ddp" else shard(model)
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(3, VOCABULARY, (4, 11), generator=generator)
    loss, gradients = step(wrapped, ids.chunk(2)[dist.get_rank()])
    dist.all_reduce(loss)
    expected, whole_gradients = step(original, ids)
    torch.testing.assert_close(loss / 2, expected, rtol=1e-5, atol=0)
    names = [name for name, _ in original.named_parameters()]
    for name, gradient, exact in zip(names, gradients, whole_gradients, strict=True):
        error = (gradient - exact).abs().max()
        assert error <= TOLERANCE * (exact.abs().max() + 1e-6), (kind, name, error)
    return model


def check_checkpoint(model, folder):
    """What is saved is what `from_pretrained` reads."""
    options = StateDictOptions(full_state_dict=True, cpu_offload=True)
    state = get_model_state_dict(model, options=options)
    if dist.get_rank() == 0:
        model.save_pretrained(folder, state_dict=state)
    dist.barrier()
    weights = {name: whole(p.detach()) for name, p in model.named_parameters()}
    loaded = AutoModelForCausalLM.from_pretrained(folder)
    for name, parameter in loaded.named_parameters():
        assert torch.equal(parameter, weights[name]), name


def main(folder, *families):
    dist.init_process_group("gloo")
    for family in families:
        for kind in ("ddp", "fsdp"):
            model = check_step(kind, family)
            check_checkpoint(model, Path(folder, f"{family}-{kind}"))
    print(f"passed on rank {dist.get_rank()}")
    dist.destroy_process_group()


if __name__ == "__main__":
    main(*sys.argv[1:])
