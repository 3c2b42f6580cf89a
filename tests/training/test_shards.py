# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""What ranks hold, against cutting the whole parameter."""

from dataclasses import asdict

import pytest
import torch

from vllm.model_executor.checkpoint import shards
from vllm.model_executor.checkpoint.shards import local_parameter
from vllm.model_executor.checkpoint.specification import (
    CheckpointTensor,
    ParameterSharding,
    Part,
    local_from_full,
    part_slices,
    split_parts,
)
from vllm.model_executor.parallel_context import ParallelContext

DTYPE = torch.float32
QKV = (
    Part("q_proj", "q", 24),
    Part("k_proj", "k", 12, replicas=2),
    Part("v_proj", "v", 12, replicas=2),
)
SHARDINGS = {
    "qkv": (ParameterSharding((48, 5), 0, QKV), 4),
    "one rank": (
        ParameterSharding((48, 5), 0, QKV[:1] + (Part("x", "k", 24),)),
        1,
    ),
    "vocabulary": (
        ParameterSharding((10, 3), 0, (Part(None, None, 10, padded_size=32),)),
        4,
    ),
    "row": (ParameterSharding((5, 12), 1, (Part(None, None, 12),)), 3),
    "whole": (ParameterSharding.replicated((7, 2)), 2),
    "vector": (ParameterSharding((48,), 0, QKV), 4),
}


def stored_as(sharding, named):
    """Each part as a tensor of its own, or all in one."""
    if not named or sharding.dim is None:
        whole = CheckpointTensor(
            "w", "w", sharding.shape, DTYPE, sharding.parts, sharding.dim
        )
        return [whole] * len(sharding.parts)
    tensors, origin = [], 0
    for part in sharding.parts:
        shape = list(sharding.shape)
        shape[sharding.dim] = part.size
        tensors.append(
            CheckpointTensor(
                f"{part.name}.w",
                "w",
                torch.Size(shape),
                DTYPE,
                (part,),
                sharding.dim,
                origin,
            )
        )
        origin += part.size
    return tensors


@pytest.mark.parametrize("dp_size", [1, 2, 3, 5])
@pytest.mark.parametrize("named", [False, True])
@pytest.mark.parametrize("case", SHARDINGS)
def test_boxes_are_what_cutting_gives(case, named, dp_size, monkeypatch):
    """Each rank's rows of each tensor-parallel shard, as FSDP2 would cut them."""
    sharding, tp_size = SHARDINGS[case]
    stored = stored_as(sharding, named)
    full = torch.arange(1.0, 1 + sharding.shape.numel()).view(sharding.shape)
    tensors = {"w": full}
    if named and sharding.dim is not None:
        parts = split_parts(full, sharding)
        tensors = {tensor.name: part for tensor, part in zip(stored, parts)}
    covered = {name: torch.zeros_like(tensor) for name, tensor in tensors.items()}
    for tp_rank in range(tp_size):
        whole = local_from_full(full, sharding, tp_rank, tp_size)
        first = 0
        for local in whole.chunk(dp_size):
            box = (first, *[0] * (local.dim() - 1)), tuple(local.shape), {}
            first += len(local)
            monkeypatch.setattr(shards, "_local_box", lambda tensor, box=box: box)
            context = ParallelContext(tp_rank=tp_rank, tp_size=tp_size)
            parameter = local_parameter("w", local, sharding, stored, context)
            assert parameter.local_shape == tuple(local.shape)
            target = torch.full_like(local, torch.nan)
            for shard in parameter.shards:
                tensor = tensors[shard.tensor]
                assert shard.shape == tuple(tensor.shape)
                box = shards.slices(shard.offsets, shard.sizes)
                whole_box = shards.slices(shard.parameter_offsets, shard.sizes)
                assert torch.equal(tensor[box], full[whole_box])
                covered[shard.tensor][box] += 1 / shard.replicas
                parameter.put(target, shard, tensor[box])
                assert torch.equal(shard.local(target), tensor[box])
            assert torch.equal(target, local)
    ranks = tp_size if sharding.dim is None else 1
    assert all(count.eq(ranks).all() for count in covered.values())


def test_the_description_is_plain_values():
    sharding, tp_size = SHARDINGS["qkv"]
    local = torch.zeros(12, 5)
    stored = stored_as(sharding, True)
    context = ParallelContext(tp_rank=2, tp_size=tp_size)
    parameter = local_parameter("qkv.w", local, sharding, stored, context)
    description = asdict(parameter)
    key = {
        "tensor": "k_proj.w",
        "part": "k",
        "part_start": 24,
        "shape": (12, 5),
        "sizes": (6, 5),
        "offsets": (6, 0),
        "parameter_offsets": (30, 0),
        "local_offsets": (6, 0),
        "padding": 0,
        "replicas": 2,
    }
    assert description.pop("shards")[1] == key
    assert description == {
        "name": "qkv.w",
        "shape": (48, 5),
        "local_shape": (12, 5),
        "dim": 0,
        "dims": {"tp": 0},
    }
    assert part_slices(sharding, tp_size)[1].start == key["local_offsets"][0]
