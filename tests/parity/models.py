# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""The models whose logprobs are compared, written once for trainer and engine."""

import json
from pathlib import Path

import torch
from torch import nn
from transformers import PreTrainedConfig

from tests.parity import random_models
from vllm.model_executor.checkpoint.load import load_checkpoint
from vllm.model_executor.checkpoint.save import save_checkpoint
from vllm.model_executor.layers.training import (
    ColumnParallelLinear,
    Gelu,
    LayerNorm,
    ParallelLMHead,
    RotaryEmbedding,
    RowParallelLinear,
    TrainableAttention,
    VLLMFlashAttention,
    VocabParallelEmbedding,
)
from vllm.model_executor.layers.training.base import TrainingLayer
from vllm.model_executor.models.builder import model_builder
from vllm.model_executor.models.generic_transformer import (
    GenericTransformerConfig,
    GenericTransformerForCausalLM,
    default_positions,
)
from vllm.model_executor.parallel_context import ParallelContext

MAX_LENGTH = 2048

# The demo's sizes, for longer prompts.
DEMO = {
    "architectures": ["GenericTransformerForCausalLM"],
    "model_type": GenericTransformerConfig.model_type,
    "vocab_size": 4096,
    "hidden_size": 256,
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "max_position_embeddings": MAX_LENGTH,
    # Tokens depend on those before them.
    "initializer_range": 0.1,
}
GPT2 = {
    "architectures": ["ParityGPT2"],
    "vocab_size": 1000,
    "hidden_size": 256,
    "num_hidden_layers": 3,
    # Of 64, for which FlashAttention 3 has a kernel of its own for decoding.
    "num_attention_heads": 4,
    "max_position_embeddings": MAX_LENGTH,
}
WINDOW = DEMO | {
    "architectures": ["ParityWindow"],
    "vocab_size": 1000,
    "hidden_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 1,
    "head_dim": 128,
}
LARGE = DEMO | {
    "vocab_size": 32000,
    "hidden_size": 2048,
    "intermediate_size": 5632,
    "num_hidden_layers": 24,
    "num_attention_heads": 16,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "initializer_range": 0.03,
}
CONFIGS = {"demo": DEMO, "GPT-2": GPT2, "window": WINDOW, "large": LARGE}
CONFIGS |= {
    f"random-{seed}": random_models.draw_config(seed)
    for seed in range(random_models.COUNT)
}


class GPT2Block(nn.Module):
    def __init__(self, config: PreTrainedConfig, context: ParallelContext) -> None:
        super().__init__()
        hidden = config.hidden_size
        self.ln_1 = LayerNorm(hidden)
        self.attn = VLLMFlashAttention(
            hidden, config.num_attention_heads, bias=True, parallel_context=context
        )
        self.ln_2 = LayerNorm(hidden)
        self.c_fc = ColumnParallelLinear(
            hidden, 4 * hidden, bias=True, parallel_context=context
        )
        self.act = Gelu("tanh")
        self.c_proj = RowParallelLinear(
            4 * hidden, hidden, bias=True, parallel_context=context
        )

    def forward(
        self, x: torch.Tensor, cu_seqlens: torch.Tensor | None = None
    ) -> torch.Tensor:
        x = x + self.attn(self.ln_1(x), cu_seqlens=cu_seqlens)
        return x + self.c_proj(self.act(self.c_fc(self.ln_2(x))))


class GPT2Body(nn.Module):
    def __init__(self, config: PreTrainedConfig, context: ParallelContext) -> None:
        super().__init__()
        hidden = config.hidden_size
        self.wte = VocabParallelEmbedding(
            config.vocab_size, hidden, parallel_context=context
        )
        self.wpe = nn.Embedding(config.max_position_embeddings, hidden)
        self.h = nn.ModuleList(
            GPT2Block(config, context) for _ in range(config.num_hidden_layers)
        )
        self.ln_f = LayerNorm(hidden)

    def forward(
        self,
        input_ids: torch.Tensor,
        positions: torch.Tensor | None = None,
        cu_seqlens: torch.Tensor | None = None,
    ) -> torch.Tensor:
        if positions is None:
            positions = default_positions(input_ids, cu_seqlens)
        x = self.wte(input_ids) + self.wpe(positions)
        for block in self.h:
            x = block(x, cu_seqlens)
        return self.ln_f(x)


class GPT2(nn.Module):
    """Learned positions, LayerNorm, GELU, biases and one key head a query head."""

    def __init__(self, config: PreTrainedConfig, context: ParallelContext) -> None:
        super().__init__()
        self.model = GPT2Body(config, context)
        self.lm_head = ParallelLMHead(
            config.vocab_size, config.hidden_size, parallel_context=context
        )
        for layer in self.modules():
            if isinstance(layer, TrainingLayer):
                for name, parameter in layer.named_parameters(recurse=False):
                    if parameter.dim() > 1:
                        layer.draw(name, lambda t: nn.init.normal_(t, std=0.1))
        nn.init.normal_(self.model.wpe.weight, std=0.3)

    def forward(
        self,
        input_ids: torch.Tensor,
        positions: torch.Tensor | None = None,
        cu_seqlens: torch.Tensor | None = None,
    ) -> torch.Tensor:
        return self.lm_head(self.model(input_ids, positions, cu_seqlens))


class Window(GenericTransformerForCausalLM):
    """Every score is capped, and every other layer sees a sliding window."""

    def __init__(self, config: PreTrainedConfig, context: ParallelContext) -> None:
        super().__init__(config, context)
        for index, block in enumerate(self.model.layers):
            block.self_attn = VLLMFlashAttention(
                self.config.hidden_size,
                self.config.num_attention_heads,
                self.config.num_key_value_heads,
                head_dim=self.config.head_dim,
                rotary=RotaryEmbedding(
                    self.config.head_dim, max_position_embeddings=MAX_LENGTH
                ),
                sliding_window=None if index % 2 else 33,
                logits_soft_cap=5.0,
                parallel_context=context,
            )
        self.reset_parameters()


CLASSES = {
    "GenericTransformerForCausalLM": GenericTransformerForCausalLM,
    "ParityGPT2": GPT2,
    "ParityWindow": Window,
    random_models.ARCHITECTURE: random_models.RandomModel,
}


@model_builder(supports_pp=True)
def build(config: PreTrainedConfig, parallel_context: ParallelContext) -> nn.Module:
    """The builder of all models, for the engine and the trainer.

    Only the generic transformer is served in pipeline stages.
    """
    return CLASSES[config.architectures[0]](config, parallel_context)


def register() -> None:
    """Let this process's engines build the models."""
    from vllm import ModelRegistry

    for architecture in CLASSES:
        ModelRegistry.register_model(architecture, build)


def save_new(directory: Path, name: str, dtype: str, device: str) -> None:
    """Write a model with random weights, drawn on `device`, ready to be served."""
    torch.manual_seed(0)
    model = _build(name, dtype, ParallelContext.single(device), device)
    save_checkpoint(model, directory)
    (directory / "config.json").write_text(json.dumps(CONFIGS[name] | {"dtype": dtype}))


def load(
    directory: Path,
    name: str,
    dtype: str,
    context: ParallelContext,
    device: str,
    implementation: str | None,
) -> nn.Module:
    """The training model of this rank.

    Args:
        directory: what `save_new` wrote.
        name: of `CONFIGS`.
        dtype: such as "float32".
        context: says which shard to load.
        device: where to put it.
        implementation: what computes attention; None: the default.
    """
    model = _build(name, dtype, context, device)
    load_checkpoint(model, directory)
    for layer in model.modules():
        if isinstance(layer, TrainableAttention):
            layer.implementation = implementation
    return model


def _build(name: str, dtype: str, context: ParallelContext, device: str) -> nn.Module:
    fields = CONFIGS[name]
    generic = "model_type" in fields
    config = (GenericTransformerConfig if generic else PreTrainedConfig)(**fields)
    torch.set_default_dtype(getattr(torch, dtype))
    try:
        with torch.device(device):
            return build(config, context)
    finally:
        torch.set_default_dtype(torch.float32)
