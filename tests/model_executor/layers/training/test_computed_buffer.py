# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""Rotary tables and ALiBi slopes of models that are built on the meta device."""

import copy

import pytest
import torch
from torch import nn

from vllm.model_executor.layers.training import (
    RotaryEmbedding,
    TrainableAttention,
    VLLMFlashAttention,
)

pytestmark = pytest.mark.usefixtures("on_device")

TABLES = {"rotary_emb.cos_sin_cache", "attn.alibi_slopes"}


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        # No bias: their state dicts are empty, so nothing of them is assigned.
        self.rotary_emb = RotaryEmbedding(32, max_position_embeddings=64)
        self.attn = TrainableAttention(2, 32, alibi_slopes=[0.5, 0.25])
        self.weight = nn.Parameter(torch.ones(64))

    def forward(self, positions, x):
        q, k = self.rotary_emb(positions, x * self.weight, x)
        return self.attn(q, k, x)


@pytest.fixture
def inputs():
    return torch.arange(5), torch.randn(5, 64)


def tables(module):
    buffers = dict(module.named_buffers())
    assert buffers.keys() == TABLES
    return buffers


def on_meta():
    with torch.device("meta"):
        return Block()


def test_weights_that_are_assigned_are_enough(inputs, device, assert_equal):
    expected = Block()
    module = on_meta()
    module.load_state_dict(expected.state_dict(), assign=True)
    if device.type != "cpu":
        with pytest.raises(ValueError, match="cos_sin_cache is on cpu.*to.'cuda"):
            module(*inputs)
        module.to(device)
    output = module(*inputs)
    assert_equal("output", output, expected(*inputs))
    output.sum().backward()
    with torch._dynamo.config.patch(disable=False):
        compiled = torch.compile(module, fullgraph=True, backend="eager")
        assert_equal("compiled", compiled(*inputs), output)


@pytest.mark.parametrize(
    "move",
    [
        lambda module, device: module.to_empty(device=device),
        lambda module, device: module.to("meta").to_empty(device=device),
        lambda module, device: copy.deepcopy(module).to_empty(device=device),
        lambda module, device: module.bfloat16().float().to_empty(device=device),
    ],
    ids=["to_empty", "meta again", "deepcopy", "cast"],
)
def test_tables_are_where_the_module_is(move, inputs, device, assert_equal):
    expected = Block()
    module = move(on_meta(), device)
    module.load_state_dict(expected.state_dict())
    wanted = tables(expected)
    for name, table in tables(module).items():
        assert table.device.type == device.type
        assert_equal(name, table, wanted[name])
    assert_equal("output", module(*inputs), expected(*inputs))


def test_tables_that_others_put_on_meta_come_back(inputs, device, assert_equal):
    module, expected = Block(), Block()
    for name in TABLES:
        owner, _, buffer = name.rpartition(".")
        owner = module.get_submodule(owner)
        owner._buffers[buffer] = owner._buffers[buffer].to("meta")
    for layer in (module.rotary_emb, module.attn):
        first = (inputs[0],) if layer is module.rotary_emb else (inputs[1],)
        with pytest.raises(ValueError, match=rf"is on meta, but .*\.to\('{device}"):
            layer(*first, inputs[1], inputs[1])
    module.to(device)
    assert_equal("output", module(*inputs), expected(*inputs))


def test_shapes_alone():
    with torch.device("meta"):
        block = VLLMFlashAttention(
            64, 2, rotary=RotaryEmbedding(32), alibi_slopes=[0.5, 0.25]
        )
        output = block(torch.empty(5, 64), torch.arange(5))
    assert output.is_meta and output.shape == (5, 64)
