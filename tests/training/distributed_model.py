# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""The model that the distributed checks train, and its parts put together again."""

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from vllm import training
from vllm.model_executor.checkpoint.shards import local_tensor
from vllm.model_executor.layers.training import token_logprobs
from vllm.model_executor.models.generic_transformer import (
    GenericTransformerConfig,
    GenericTransformerForCausalLM,
)

VOCAB, BATCH, SEQ = 61, 8, 9
# On four tensor-parallel ranks two hold each KV head; the vocabulary is padded to 64.
SIZES = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "initializer_range": 0.2,
}


class Trainable(nn.Module):
    """The loss as the forward of one module, as DDP and FSDP2 want it."""

    def __init__(self, context, tied=False, dtype=torch.float32):
        super().__init__()
        torch.manual_seed(0)
        config = GenericTransformerConfig(**SIZES, tie_word_embeddings=tied)
        self.lm = GenericTransformerForCausalLM(config, context)
        self.to(context.device, dtype)

    def forward(self, ids):
        hidden_states = self.lm.model(ids[:, :-1])
        return -token_logprobs(hidden_states, self.lm.lm_head, ids[:, 1:]).mean()


def batch(step):
    """Token ids of a whole step, over all data-parallel ranks."""
    generator = torch.Generator().manual_seed(step)
    return torch.randint(VOCAB, (BATCH, SEQ + 1), generator=generator)


def optimizer_of(model):
    # Of this eps the update is as well conditioned as the gradient.
    return torch.optim.AdamW(model.parameters(), lr=0.01, eps=0.01)


def parallelized(context, kind, tied=False):
    """The module to call, over the data-parallel ranks, and its optimizer."""
    model = Trainable(context, tied)
    if kind == "fsdp":
        mesh = context.device_mesh()["dp"]
        for layer in model.lm.model.layers:
            fully_shard(layer, mesh=mesh)
        fully_shard(model, mesh=mesh)
    elif kind == "ddp":
        model = DistributedDataParallel(model, process_group=context.dp_group)
    return model, optimizer_of(model)


def train(model, optimizer, steps, context):
    """Steps on this rank's part of each batch; the last gradients stay."""
    for step in steps:
        optimizer.zero_grad()
        ids = batch(step).chunk(context.dp_size)[context.dp_rank]
        model(ids.to(context.device)).backward()
        optimizer.step()


def assembled(model, values):
    """Whole tensors of what is sharded as the model's parameters are.

    Args:
        model: the model.
        values: by parameter name, such as gradients.
    """
    own = []
    for name, parameter in training.sharding(model).items():
        local = local_tensor(values[name])
        assert tuple(local.shape) == parameter.local_shape, name
        for shard in parameter.shards:
            piece = shard.local(local).cpu().clone()
            assert tuple(piece.shape) == shard.sizes, name
            own.append((shard.tensor, shard.shape, shard.offsets, piece))
    everyone = [own]
    if dist.is_initialized():
        everyone = [None] * dist.get_world_size()
        dist.all_gather_object(everyone, own)
    whole = {}
    for name, shape, offsets, piece in (entry for own in everyone for entry in own):
        if name not in whole:
            whole[name] = torch.full(shape, torch.nan, dtype=piece.dtype)
        box = tuple(slice(a, a + n) for a, n in zip(offsets, piece.shape))
        place = whole[name][box]
        # Replicas have equal bits.
        assert place.isnan().all() or torch.equal(place, piece), name
        place.copy_(piece)
    assert not any(tensor.isnan().any() for tensor in whole.values())
    return whole


def parameters_of(model):
    module = model.module if isinstance(model, DistributedDataParallel) else model
    return dict(module.named_parameters())


def assert_padding_is_zero(model):
    """Of the vocabulary; returns how many rows of it this rank holds."""
    count, parameters = 0, parameters_of(model)
    for name, parameter in training.sharding(model).items():
        for shard in parameter.shards:
            start = shard.local_offsets[0] + shard.sizes[0] if shard.padding else 0
            rows = local_tensor(parameters[name]).narrow(0, start, shard.padding)
            assert rows.eq(0).all(), name
            count += shard.padding
    return count


def gradients(model):
    return assembled(model, {n: p.grad for n, p in parameters_of(model).items()})


def weights(model):
    return assembled(model, parameters_of(model))


def moments(model, optimizer):
    """What AdamW keeps, by its name and the tensor's; the steps must all be equal."""
    found = {}
    parameters = parameters_of(model)
    for key in ("exp_avg", "exp_avg_sq"):
        values = {n: optimizer.state[p][key] for n, p in parameters.items()}
        whole = assembled(model, values)
        found |= {f"{key} {name}": tensor for name, tensor in whole.items()}
    (step,) = {float(state["step"]) for state in optimizer.state.values()}
    return found | {"step": torch.tensor(step)}
