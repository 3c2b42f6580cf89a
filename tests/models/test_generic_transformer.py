# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""Configs of the generic transformer, and its initial weights."""

import pytest
import torch
from transformers import LlamaConfig

from vllm.model_executor.models.generic_transformer import (
    GenericTransformerConfig,
    GenericTransformerForCausalLM,
)
from vllm.model_executor.parallel_context import ParallelContext


def test_sizes_from_another_config():
    llama = LlamaConfig(
        vocab_size=50,
        hidden_size=64,
        intermediate_size=80,
        num_hidden_layers=1,
        num_attention_heads=2,
        rope_parameters={"rope_type": "default", "rope_theta": 5e5},
        rms_norm_eps=1e-5,
    )
    config = GenericTransformerForCausalLM(llama).config
    assert type(config) is GenericTransformerConfig
    assert (config.rope_theta, config.rms_norm_eps) == (5e5, 1e-5)
    assert (config.hidden_size, config.intermediate_size) == (64, 80)
    assert config.architectures == ["GenericTransformerForCausalLM"]


@pytest.mark.parametrize(
    "fields",
    [
        {"rope_parameters": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e4}},
        {"hidden_act": "gelu"},
        {"attention_bias": True},
    ],
)
def test_what_the_model_does_not_have_is_refused(fields):
    name = "rope_type" if "rope_parameters" in fields else next(iter(fields))
    with pytest.raises(ValueError, match=f"LlamaConfig: it asks for .*'{name}'"):
        GenericTransformerConfig.of(LlamaConfig(**fields))


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ({"hidden_size": 100, "num_attention_heads": 3}, "100 is not divisible by"),
        ({"num_key_value_heads": 3}, "8 is not a multiple of num_key_value_heads 3"),
        ({"num_attention_heads": 0}, "'num_attention_heads': 0.*at least 1"),
        ({"num_key_value_heads": 0}, "'num_key_value_heads': 0.*at least 1"),
    ],
)
def test_sizes_that_no_model_has(sizes, message):
    with pytest.raises(ValueError, match=message):
        GenericTransformerConfig(**sizes)


def test_ranks_draw_shards_of_the_weights_that_one_would_draw():
    config = GenericTransformerConfig(
        vocab_size=128, hidden_size=64, num_hidden_layers=1, num_attention_heads=2
    )
    models = []
    for context in [
        ParallelContext.single(),
        *(ParallelContext(tp_rank=rank, tp_size=2) for rank in range(2)),
    ]:
        torch.manual_seed(0)
        models.append(GenericTransformerForCausalLM(config, context))
    whole, *shards = (model.model.layers[0].mlp.down_proj.weight for model in models)
    assert torch.equal(whole, torch.cat(shards, dim=1))
    assert abs(whole.std().item() - config.initializer_range) < 2e-3
