# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""Configs of the generic transformer, and its initial weights."""

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

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
        {"hidden_act": "gelu"},
        {"attention_bias": True},
    ],
)
def test_what_the_model_does_not_have_is_refused(fields):
    name = next(iter(fields))
    with pytest.raises(ValueError, match=f"LlamaConfig: it asks for .*'{name}'"):
        GenericTransformerConfig.of(LlamaConfig(**fields))


@pytest.mark.parametrize(
    "rope",
    [
        {"rope_type": "linear", "factor": 8.0},
        {
            "rope_type": "llama3",
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 32,
        },
        {
            "rope_type": "yarn",
            "factor": 4.0,
            "original_max_position_embeddings": 32,
        },
    ],
    ids=lambda rope: rope["rope_type"],
)
def test_scaled_positions_are_those_of_transformers(rope, tmp_path):
    torch.manual_seed(0)
    llama = LlamaConfig(
        vocab_size=64,
        hidden_size=64,
        intermediate_size=80,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=128,
        rope_parameters={"rope_theta": 1e4, **rope},
        initializer_range=0.2,
    )
    theirs = LlamaForCausalLM(llama)
    theirs.save_pretrained(tmp_path)
    theirs = theirs.double()
    ours = GenericTransformerForCausalLM.from_pretrained(tmp_path).double()
    ids = torch.randint(64, (2, 100))
    expected = theirs(ids).logits
    # Both round the cosines to fp32, and transformers its five norms; each layer
    # multiplies an error a few times. A wrong frequency is off by 0.1 and more.
    tolerance = 20 * torch.finfo(torch.float32).eps * expected.abs().max().item()
    torch.testing.assert_close(ours(ids), expected, rtol=0, atol=tolerance)


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
