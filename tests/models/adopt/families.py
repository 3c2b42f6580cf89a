# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""Small models of many families, as their libraries define them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import transformers
from torch import nn

VOCABULARY = 128
_SIZES: dict[str, Any] = dict(
    vocab_size=VOCABULARY,
    hidden_size=64,
    intermediate_size=96,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=32,
    max_position_embeddings=128,
    bos_token_id=1,
    eos_token_id=2,
    pad_token_id=0,
)
_GEMMA = _SIZES | dict(query_pre_attn_scalar=32, sliding_window=4)
_EXPERTS = dict(num_experts_per_tok=2, moe_intermediate_size=32)


def _config(name: str, **sizes: Any) -> transformers.PreTrainedConfig:
    return getattr(transformers, f"{name}Config")(**sizes)


def _without(sizes: dict[str, Any], *names: str) -> dict[str, Any]:
    return {name: size for name, size in sizes.items() if name not in names}


# transformers' configs, by the name of a family.
CONFIGS: dict[str, Callable[[], transformers.PreTrainedConfig]] = {
    "llama": lambda: _config("Llama", **_SIZES),
    "qwen3": lambda: _config("Qwen3", **_SIZES),
    "gemma2": lambda: _config("Gemma2", **_GEMMA),
    "gemma3": lambda: _config(
        "Gemma3Text",
        layer_types=["sliding_attention", "full_attention"],
        tie_word_embeddings=True,
        **_GEMMA,
    ),
    "gpt2": lambda: _config(
        "GPT2",
        vocab_size=VOCABULARY,
        n_embd=64,
        n_head=2,
        n_layer=2,
        n_positions=128,
        attn_pdrop=0.0,
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        bos_token_id=1,
        eos_token_id=2,
    ),
    "phi3": lambda: _config("Phi3", **_SIZES),
    "olmo2": lambda: _config("Olmo2", **_SIZES),
    "mixtral": lambda: _config("Mixtral", num_local_experts=4, **_SIZES),
    "qwen3_moe": lambda: _config("Qwen3Moe", num_experts=4, **_EXPERTS, **_SIZES),
    "deepseek_v3": lambda: _config(
        "DeepseekV3",
        num_key_value_heads=4,
        n_routed_experts=4,
        n_group=2,
        topk_group=1,
        n_shared_experts=1,
        first_k_dense_replace=1,
        q_lora_rank=32,
        kv_lora_rank=16,
        qk_rope_head_dim=16,
        qk_nope_head_dim=16,
        v_head_dim=16,
        **_EXPERTS,
        **_without(_SIZES, "head_dim", "num_key_value_heads"),
    ),
    "gpt_oss": lambda: _config(
        "GptOss",
        num_local_experts=4,
        sliding_window=4,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
        **_SIZES,
    ),
}


def make(family: str, dtype: torch.dtype = torch.float32) -> nn.Module:
    """A model with random weights, in evaluation mode, as its library computes it.

    transformers' own eager attention has every feature.
    """
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(
        CONFIGS[family](), attn_implementation="eager"
    )
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    return model.to(dtype).eval()


TINY: dict[str, Any] = {
    "vocab_size": 99,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "max_position_embeddings": 64,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}


def make_class(name: str, **sizes: Any) -> transformers.PreTrainedModel:
    """A model of any class, in evaluation mode; sizes: of its config, over `TINY`."""
    cls = getattr(transformers, name)
    torch.manual_seed(0)
    return cls(cls.config_class(**TINY | sizes)).eval()
