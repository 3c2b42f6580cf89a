# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""Windows that transformers' models tell to a mask, and not to attention."""

import copy

import pytest
import torch
import transformers

from vllm import training
from vllm.model_executor.models.builder.adopt.attention import AdoptedAttention

SIZES = {
    "vocab_size": 99,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
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


def make(name, **sizes):
    cls = getattr(transformers, name)
    torch.manual_seed(0)
    return cls(cls.config_class(**SIZES | sizes)).eval()


@pytest.mark.parametrize("name", WINDOWS)
def test_a_window(name):
    sizes, windows = WINDOWS[name]
    model = make(name, sliding_window=4, use_sliding_window=True, **sizes)
    adopted = training.adopt(copy.deepcopy(model))
    sites = [m.site for m in adopted.modules() if isinstance(m, AdoptedAttention)]
    assert [site.sliding_window for site in sites] == windows
    ids = torch.randint(3, 99, (2, 16), generator=torch.Generator().manual_seed(1))
    expected = model(ids, use_cache=False).logits
    # fp32 sums in another order, through two layers.
    torch.testing.assert_close(
        adopted(ids, use_cache=False).logits, expected, rtol=1e-4, atol=1e-5
    )


def test_chunks_are_refused():
    sizes = EXPERTS | {"intermediate_size_mlp": 96, "head_dim": 32}
    model = make("Llama4ForCausalLM", attention_chunk_size=8, **sizes)
    with pytest.raises(ValueError, match="in chunks of 8 tokens.*layer_types"):
        training.adopt(model)


def test_a_call_and_a_mask_that_differ_are_refused():
    model = make("MistralForCausalLM", sliding_window=4)
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
