# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""The generic transformer as benchmarks build, train and serve it."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from measure import name_of
from torch import nn

from vllm.model_executor.layers.training import token_logprobs
from vllm.model_executor.models.generic_transformer import (
    GenericTransformerConfig,
    GenericTransformerForCausalLM,
)
from vllm.model_executor.parallel_context import ParallelContext

if TYPE_CHECKING:
    from vllm import LLM

# The sizes of examples/demo.py.
DEMO = dict(
    vocab_size=4096,
    hidden_size=256,
    num_hidden_layers=4,
    num_attention_heads=8,
    num_key_value_heads=4,
)
# The layers of an 8B model.
WIDTH_OF_8B = dict(
    hidden_size=4096,
    intermediate_size=14336,
    num_attention_heads=32,
    num_key_value_heads=8,
    max_position_embeddings=4096,
)
SIZES_OF_8B = WIDTH_OF_8B | dict(vocab_size=128256, num_hidden_layers=32)


def count_parameters(config: GenericTransformerConfig) -> int:
    """Of the whole model."""
    with torch.device("meta"):
        model = GenericTransformerForCausalLM(config, ParallelContext.single())
    return sum(p.numel() for p in model.parameters())


def loss_of(model: GenericTransformerForCausalLM, ids: torch.Tensor) -> torch.Tensor:
    """The mean of -logprob; ids: shape = [batch, seq + 1]."""
    hidden_states = model.model(ids[:, :-1])
    return -token_logprobs(hidden_states, model.lm_head, ids[:, 1:]).mean()


def optimizer_step(
    model: nn.Module, loss: Callable[[], torch.Tensor]
) -> Callable[[], None]:
    """A function that runs forward, backward and fused AdamW."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)

    def once() -> None:
        loss().backward()
        optimizer.step()
        optimizer.zero_grad()

    return once


def make_engine(directory: str, dtype: torch.dtype, **options: Any) -> LLM:
    """An engine with random weights of the config in a directory."""
    from vllm import LLM, ModelRegistry

    ModelRegistry.register_model(
        "GenericTransformerForCausalLM", GenericTransformerForCausalLM.build
    )
    return LLM(
        directory,
        load_format="dummy",
        skip_tokenizer_init=True,
        dtype=name_of(dtype),
        max_model_len=2048,
        enable_prefix_caching=False,
        **options,
    )
