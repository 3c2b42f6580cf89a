# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""Windows that transformers' models tell to a mask, and not to attention."""

import copy

import pytest
import torch

from tests.models.adopt.families import make_class
from tests.models.adopt.inputs import token_ids
from vllm import training
from vllm.model_executor.models.builder.adopt.attention import AdoptedAttention

EXPERTS = {"num_experts": 2, "num_local_experts": 2, "num_experts_per_tok": 2}
SMALL_EXPERTS = dict.fromkeys(
    ("moe_intermediate_size", "shared_expert_intermediate_size"), 32
)
MIXED = {"layer_types": ["sliding_attention", "full_attention"]}
# By the model: what its layers' windows are.
WINDOWS = {
    "PhimoeForCausalLM": (EXPERTS, [4, 4]),
    "Qwen2MoeForCausalLM": (EXPERTS | SMALL_EXPERTS | MIXED, [4, None]),
    "MistralForCausalLM": ({}, [4, 4]),
    "Cohere2ForCausalLM": (MIXED, [4, None]),
}


@pytest.mark.parametrize("name", WINDOWS)
def test_a_window(name):
    sizes, windows = WINDOWS[name]
    model = make_class(
        name, num_key_value_heads=2, sliding_window=4, use_sliding_window=True, **sizes
    )
    adopted = training.adopt(copy.deepcopy(model))
    sites = [m.site for m in adopted.modules() if isinstance(m, AdoptedAttention)]
    assert [site.sliding_window for site in sites] == windows
    ids = token_ids(2, 16, first=3, vocabulary=99)
    expected = model(ids, use_cache=False).logits
    # fp32 sums in another order, through two layers.
    torch.testing.assert_close(
        adopted(ids, use_cache=False).logits, expected, rtol=1e-4, atol=1e-5
    )


def test_chunks_are_refused():
    sizes = EXPERTS | {"intermediate_size_mlp": 96, "head_dim": 32}
    model = make_class(
        "Llama4ForCausalLM", num_key_value_heads=2, attention_chunk_size=8, **sizes
    )
    with pytest.raises(ValueError, match="in chunks of 8 tokens.*layer_types"):
        training.adopt(model)


def test_a_call_and_a_mask_that_differ_are_refused():
    model = make_class("MistralForCausalLM", num_key_value_heads=2, sliding_window=4)
    for layer in model.model.layers:
        layer.self_attn.forward = with_window(layer.self_attn, 5)
    with pytest.raises(ValueError, match="sliding_window=5 and with a mask of a win"):
        training.adopt(model)


def with_window(attention, window):
    """The module's forward under a config with another window."""
    forward = attention.forward
    config = copy.deepcopy(attention.config)
    config.sliding_window = window

    def other(*args, **kwargs):
        config._attn_implementation = attention.config._attn_implementation
        before, attention.config = attention.config, config
        try:
            return forward(*args, **kwargs)
        finally:
            attention.config = before

    return other
