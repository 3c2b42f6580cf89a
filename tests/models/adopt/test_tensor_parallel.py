# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""How adopted models are sharded across tensor-parallel ranks."""

import copy

import pytest
import torch

from tests.models.adopt.families import make
from vllm import training
from vllm.model_executor.parallel_context import ParallelContext

RANKS = [ParallelContext(tp_rank=rank, tp_size=2) for rank in range(2)]


@pytest.fixture(scope="module")
def model():
    return make("qwen3")


def test_shards_make_up_the_weights(model):
    ranks = [
        training.adopt(copy.deepcopy(model), parallel_context=rank) for rank in RANKS
    ]
    weights = [each.state_dict() for each in ranks]
    for name, whole in model.state_dict().items():
        first, second = (each[name] for each in weights)
        if first.shape == whole.shape:
            assert torch.equal(first, whole)
            continue
        dim = next(d for d in range(2) if first.shape[d] != whole.shape[d])
        shards = torch.cat([first, second], dim).narrow(dim, 0, whole.shape[dim])
        assert torch.equal(shards, whole), name
    attention = ranks[0].model.layers[0].self_attn
    assert attention.trainable_attention.num_heads == 2
    assert attention.trainable_attention.num_kv_heads == 1
    assert attention.q_norm.sequence_parallel  # its gradient is a sum over the ranks
    sharded = training.sharding(ranks[1])["model.layers.0.mlp.down_proj.weight"]
    assert sharded.shards[0].offsets == (0, 48)


def test_a_plan_of_ones_own(model):
    plan = {
        "model.layers.*.mlp.gate_proj": "colwise",
        "model.layers.*.mlp.up_proj": "colwise",
        "model.layers.*.mlp.down_proj": "rowwise",
    }
    adopted = training.adopt(
        copy.deepcopy(model), tp_plan=plan, parallel_context=RANKS[0]
    )
    layer = adopted.model.layers[0]
    assert layer.mlp.up_proj.weight.shape == (48, 64)
    assert layer.self_attn.q_proj.weight.shape == (128, 64)
    assert layer.self_attn.trainable_attention.num_heads == 4


def test_a_model_without_a_plan_is_held_whole(caplog_vllm):
    adopted = training.adopt(make("gpt2"), parallel_context=RANKS[0])
    assert "has no tensor-parallel plan" in caplog_vllm.text
    assert adopted.transformer.h[0].attn.trainable_attention.num_heads == 2


@pytest.mark.parametrize(
    ("kind", "plan", "tp_size", "message"),
    [
        ("mixtral", None, 2, "style 'packed_colwise' .* is not supported"),
        ("qwen3", None, 4, "2 key/value heads cannot be sharded across 4 ranks"),
        ("qwen3", {"model.layers.*.mlp.up_proj": "diagonal"}, 2, "'diagonal'"),
        ("qwen3", {"layers.*.mlp.up_proj": "colwise"}, 2, "has no such module"),
    ],
)
def test_what_cannot_be_sharded_is_refused(kind, plan, tp_size, message):
    context = ParallelContext(tp_size=tp_size)
    with pytest.raises(ValueError, match=message):
        training.adopt(make(kind), tp_plan=plan, parallel_context=context)
