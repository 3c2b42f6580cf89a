# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""Small models of other libraries, as these define them."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.nn.attention.flex_attention import create_block_mask

VOCABULARY, WIDTH, LAYERS, LENGTH = 128, 64, 2, 96
# The model directory's config.json, without the architecture.
SIZES = {
    "vocab_size": VOCABULARY,
    "hidden_size": WIDTH,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 4,
    "head_dim": 32,
    "max_position_embeddings": LENGTH,
}


def _litgpt(name: str, **sizes: int) -> nn.Module:
    from litgpt import GPT, Config

    config = Config.from_name(
        name,
        block_size=LENGTH,
        vocab_size=VOCABULARY,
        padded_vocab_size=VOCABULARY,
        n_layer=LAYERS,
        n_embd=WIDTH,
        n_head=4,
        intermediate_size=96,
        **sizes,
    )
    return GPT(config)


def _torchtitan(family: str, attention: str) -> nn.Module:
    """A model of torchtitan with its FlexAttention, or with torch's SDPA for "sdpa".

    torchtitan's trainer passes a mask. A model that is given none gets a causal one.
    """
    module = importlib.import_module(f"torchtitan.models.{family}")
    common = importlib.import_module("torchtitan.models.common")
    attention_module = importlib.import_module("torchtitan.models.common.attention")
    rope: dict[str, Any] = dict(dim=32, max_seq_len=LENGTH)
    sizes: dict[str, Any] = dict(n_layers=LAYERS, dim=WIDTH, n_heads=4)
    heads: dict[str, Any] = dict(hidden_dim=96, fuse_qkv=False, attn_backend="flex")
    if family == "llama3":
        rotary = common.ComplexRoPE.Config(scaling="llama", **rope)
        sizes["n_heads"] = 2
        layers = module._build_llama3_layers(
            n_kv_heads=1, rope=rotary, **sizes, **heads
        )
        config = module.Llama3Model.Config
    elif family == "qwen3":
        rotary = common.CosSinRoPE.Config(**rope)
        layers = module._build_qwen3_layers(
            n_kv_heads=2, head_dim=32, rope=rotary, **sizes, **heads
        )
        config = module.Qwen3Model.Config
    else:
        rotary = common.ComplexRoPE.Config(dim=16, max_seq_len=LENGTH)
        layers = module._build_dsv3_layers(
            n_dense_layers=1,
            q_lora_rank=32,
            kv_lora_rank=16,
            qk_nope_head_dim=16,
            qk_rope_head_dim=16,
            v_head_dim=16,
            mscale=1.0,
            dense_hidden_dim=96,
            moe_hidden_dim=32,
            num_experts=4,
            num_shared_experts=1,
            router_top_k=2,
            router_score_func="sigmoid",
            router_num_expert_groups=2,
            router_num_limited_groups=1,
            router_route_norm=True,
            attn_backend="flex",
            moe_comm_backend="standard",
            non_blocking_capacity_factor=None,
            rope=rotary,
            **sizes,
        )
        config = module.DeepSeekV3Model.Config
    inner = getattr(
        attention_module,
        "FlexAttention" if attention == "flex" else "ScaledDotProductAttention",
    )
    for layer in layers:
        layer.attention.inner_attention = inner.Config()
    model = config(
        dim=WIDTH,
        vocab_size=VOCABULARY,
        tok_embeddings=common.Embedding.Config(
            num_embeddings=VOCABULARY, embedding_dim=WIDTH
        ),
        norm=common.RMSNorm.Config(normalized_shape=WIDTH),
        lm_head=common.Linear.Config(in_features=WIDTH, out_features=VOCABULARY),
        layers=layers,
    ).build()

    def add_mask(model: nn.Module, args: Any, kwargs: Any) -> Any:
        size = args[0].shape[1]
        mask = create_block_mask(causal, None, None, size, size, args[0].device)
        return args, {"attention_masks": mask, **kwargs}

    if attention == "flex":
        model.register_forward_pre_hook(add_mask, with_kwargs=True)
    return model


def causal(b: Any, h: Any, q_idx: Any, kv_idx: Any) -> Any:
    return q_idx >= kv_idx


# Each library's way to build a model, by name of a family.
FAMILIES: dict[str, Callable[[str], nn.Module]] = {
    "litgpt_gemma2": lambda _: _litgpt(
        "Gemma-2-2b",
        n_query_groups=2,
        head_size=32,
        attention_scores_scalar=32,
        sliding_window_size=4,
    ),
    "litgpt_llama": lambda _: _litgpt("Llama-3.2-1B", n_query_groups=2, head_size=32),
    "litgpt_neox": lambda _: _litgpt("pythia-14m", head_size=32),
    "torchtitan_llama3": partial(_torchtitan, "llama3"),
    "torchtitan_deepseek_v3": partial(_torchtitan, "deepseek_v3"),
    "torchtitan_qwen3": partial(_torchtitan, "qwen3"),
}


def make(
    family: str, dtype: torch.dtype = torch.float32, attention: str = "flex"
) -> nn.Module:
    """A model with random weights, in evaluation mode, as its library computes it.

    It is built under its dtype, as in an engine, so that tables in fp32 stay so.

    Args:
        family: One of `FAMILIES`.
        dtype: Of its weights.
        attention: What torchtitan's models call, "flex" or "sdpa".
    """
    torch.manual_seed(0)
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        model = FAMILIES[family](attention)
    finally:
        torch.set_default_dtype(before)
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape)
            is_norm = parameter.ndim == 1
            parameter.copy_(1 + 0.05 * noise if is_norm else 0.1 * noise)
    return model.eval()
