# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""Small models of other libraries, as these define them."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn

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


# Each library's way to build a model, by name of a family.
FAMILIES: dict[str, Callable[[], nn.Module]] = {
    "litgpt_llama": lambda: _litgpt("Llama-3.2-1B", n_query_groups=2, head_size=32),
    "litgpt_neox": lambda: _litgpt("pythia-14m", head_size=32),
}


def make(family: str, dtype: torch.dtype = torch.float32) -> nn.Module:
    """A model with random weights, in evaluation mode, as its library computes it.

    It is built under its dtype, as in an engine, so that tables in fp32 stay so.
    """
    torch.manual_seed(0)
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        model = FAMILIES[family]()
    finally:
        torch.set_default_dtype(before)
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape)
            is_norm = parameter.ndim == 1
            parameter.copy_(1 + 0.05 * noise if is_norm else 0.1 * noise)
    return model.eval()
