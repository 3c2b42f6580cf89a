# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""Hooks, replaced forwards and `__call__` of layers and of the head in an engine."""

import json

import pytest
import torch
from safetensors.torch import save_file
from torch import nn
from transformers import PreTrainedConfig

from tests.models.builder.models import assert_trainer_agrees, greedy
from vllm import ModelRegistry
from vllm.model_executor.layers import training as layers

FIELDS = {
    "architectures": ["Altered"],
    "vocab_size": 96,
    "hidden_size": 64,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "max_position_embeddings": 256,
}
PROMPTS = [[1, 2, 3], list(range(20, 60)), [7]]


class HalvedNorm(layers.RMSNorm):
    def __call__(self, x):
        return super().__call__(x) / 2


def add_adapter(layer, scale):
    """As libraries of adapters do it: the instance gets a forward of its own."""
    forward = layer.forward
    layer.forward = lambda x: forward(x) + scale * x.mean(-1, keepdim=True)


def double_output(layer):
    layer.register_forward_hook(lambda module, args, output: output * 2)


def double_input(layer):
    layer.register_forward_pre_hook(lambda module, args: (args[0] * 2,))


class Altered(nn.Module):
    def __init__(self, config):
        super().__init__()
        hidden, vocab = config.hidden_size, config.vocab_size
        self.tokens = layers.VocabParallelEmbedding(vocab, hidden)
        self.norm = HalvedNorm(hidden)
        rotary = layers.RotaryEmbedding(hidden // 2)
        self.attention = layers.VLLMFlashAttention(hidden, 2, rotary=rotary)
        self.up = layers.MergedColumnParallelLinear(hidden, [96, 96], bias=False)
        self.activation = layers.SiluAndMul()
        self.down = layers.RowParallelLinear(96, hidden)
        self.out_norm = layers.LayerNorm(hidden)
        self.lm_head = layers.ParallelLMHead(vocab, hidden, bias=True)
        double_output(self.tokens)
        double_output(self.attention.attn)
        add_adapter(self.up, 0.5)
        double_input(self.activation)
        add_adapter(self.down, 0.5)
        double_output(self.out_norm)
        add_adapter(self.lm_head, 0.5)
        double_input(self.lm_head)
        self.lm_head.register_forward_hook(
            lambda module, args, output: 15 * torch.tanh(output / 15)
        )

    def forward(self, input_ids, positions):
        x = self.tokens(input_ids)
        x = x + self.attention(self.norm(x), positions)
        x = x + self.down(self.activation(self.up(x)))
        return self.lm_head(self.out_norm(x))


@pytest.mark.parametrize("eager", [True, False])
def test_what_changes_a_layer_runs_in_the_engine(make_llm, tmp_path, eager):
    torch.manual_seed(0)
    model = Altered(PreTrainedConfig(**FIELDS))
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.3)
    save_file(model.state_dict(), tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps(FIELDS))
    ModelRegistry.register_model("Altered", lambda config: Altered(config))
    completions = greedy(make_llm(tmp_path, enforce_eager=eager), PROMPTS)
    assert_trainer_agrees(model, PROMPTS, completions)
