# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""Random small models and engines, drawn from a seed, for the CPU's kernels."""

import random
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedConfig

from vllm.model_executor.layers.training import (
    ColumnParallelLinear,
    Gelu,
    GeluAndMul,
    LayerNorm,
    MergedColumnParallelLinear,
    ParallelLMHead,
    RMSNorm,
    RotaryEmbedding,
    RowParallelLinear,
    SiluAndMul,
    VLLMFlashAttention,
    VocabParallelEmbedding,
)
from vllm.model_executor.layers.training.base import TrainingLayer
from vllm.model_executor.models.generic_transformer import default_positions
from vllm.model_executor.parallel_context import ParallelContext

MAX_LENGTH = 320
ARCHITECTURE = "ParityRandom"
COUNT = 24
NORMS = {"rms": RMSNorm, "layer": LayerNorm}
GATED = {"silu": SiluAndMul, "gelu": GeluAndMul}


def draw_config(seed: int) -> dict[str, Any]:
    """The config of a model: every kind of attention, sizes of which few are round."""
    draw = random.Random(seed)
    # Half of the models each, whatever else is drawn.
    dtype = ("float32", "bfloat16")[seed % 2]
    kv_heads = draw.choice((1, 1, 2, 3))
    heads = kv_heads * draw.choice((1, 2, 4, 7))
    head_dim = draw.choice((32, 64, 80, 96, 112, 128))
    positions = draw.choice(("rotary", "partial rotary", "learned", "alibi"))
    layers = draw.choice((1, 2, 3))
    tied = draw.random() < 0.3
    return {
        "architectures": [ARCHITECTURE],
        "dtype": dtype,
        "vocab_size": draw.choice((97, 131, 300, 509, 1000, 1003)),
        "hidden_size": draw.choice((48, 80, 96, 120, 136, 200)),
        "intermediate_size": draw.choice((56, 104, 160, 264)),
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "head_dim": head_dim,
        "max_position_embeddings": MAX_LENGTH,
        "positions": positions,
        "rotary_dim": head_dim if positions == "rotary" else head_dim // 4 * 2,
        "neox": draw.random() < 0.5,
        "windows": [draw.choice((None, 5, 17, 64)) for _ in range(layers)],
        "soft_cap": draw.choice((None, None, 3.0, 30.0)),
        # No model has both.
        "sinks": positions != "alibi" and draw.random() < 0.4,
        "norm": draw.choice(tuple(NORMS)),
        "gate": draw.choice((None, *GATED)),
        "attention_bias": draw.random() < 0.5,
        "mlp_bias": draw.random() < 0.5,
        "head_bias": not tied and draw.random() < 0.5,
        "tie_word_embeddings": tied,
        "parallel_blocks": draw.random() < 0.3,
    }


def draw_engine(seed: int) -> dict[str, Any]:
    """Options of its engine: chunks of prompts, requests at a time, blocks of keys."""
    draw = random.Random(f"engine {seed}")
    requests = draw.choice((2, 3, 8, 16))
    block_size = draw.choice((32, 64))
    return {
        "max_model_len": MAX_LENGTH,
        "max_num_seqs": requests,
        "max_num_batched_tokens": max(requests, draw.choice((7, 19, 37, 128, 333))),
        "block_size": block_size,
        # In some so few that requests of one batch do not all fit.
        "num_gpu_blocks_override": draw.choice((5, 12)) * (MAX_LENGTH // block_size),
        "enable_prefix_caching": draw.random() < 0.7,
    }


class Block(nn.Module):
    def __init__(
        self, config: PreTrainedConfig, index: int, context: ParallelContext
    ) -> None:
        super().__init__()
        hidden, heads = config.hidden_size, config.num_attention_heads
        rotary = None
        if "rotary" in config.positions:
            rotary = RotaryEmbedding(
                config.head_dim,
                config.rotary_dim,
                MAX_LENGTH,
                is_neox_style=config.neox,
            )
        alibi = config.positions == "alibi"
        self.attn = VLLMFlashAttention(
            hidden,
            heads,
            config.num_key_value_heads,
            head_dim=config.head_dim,
            bias=config.attention_bias,
            rotary=rotary,
            sliding_window=config.windows[index],
            logits_soft_cap=config.soft_cap,
            sinks=config.sinks,
            alibi_slopes=[2.0 ** -(i + 1) for i in range(heads)] if alibi else None,
            parallel_context=context,
        )
        self.norm_1 = NORMS[config.norm](hidden)
        self.norm_2 = NORMS[config.norm](hidden)
        size, bias = config.intermediate_size, config.mlp_bias
        if config.gate is None:
            self.up: nn.Module = ColumnParallelLinear(
                hidden, size, bias=bias, parallel_context=context
            )
            self.act: nn.Module = Gelu("tanh")
        else:
            self.up = MergedColumnParallelLinear(
                hidden, [size, size], bias=bias, parallel_context=context
            )
            self.act = GATED[config.gate]()
        self.down = RowParallelLinear(size, hidden, bias=bias, parallel_context=context)
        self.parallel = config.parallel_blocks

    def forward(
        self,
        x: torch.Tensor,
        positions: torch.Tensor,
        cu_seqlens: torch.Tensor | None,
    ) -> torch.Tensor:
        attended = self.attn(self.norm_1(x), positions, cu_seqlens=cu_seqlens)
        if not self.parallel:
            x = x + attended
        y = self.down(self.act(self.up(self.norm_2(x))))
        return x + attended + y if self.parallel else x + y


class Body(nn.Module):
    def __init__(self, config: PreTrainedConfig, context: ParallelContext) -> None:
        super().__init__()
        hidden = config.hidden_size
        self.tokens = VocabParallelEmbedding(
            config.vocab_size, hidden, parallel_context=context
        )
        self.places = None
        if config.positions == "learned":
            self.places = nn.Embedding(MAX_LENGTH, hidden)
        self.layers = nn.ModuleList(
            Block(config, index, context) for index in range(config.num_hidden_layers)
        )
        self.norm = NORMS[config.norm](hidden)

    def forward(
        self,
        input_ids: torch.Tensor,
        positions: torch.Tensor | None = None,
        cu_seqlens: torch.Tensor | None = None,
    ) -> torch.Tensor:
        if positions is None:
            positions = default_positions(input_ids, cu_seqlens)
        x = self.tokens(input_ids)
        if self.places is not None:
            x = x + self.places(positions)
        for layer in self.layers:
            x = layer(x, positions, cu_seqlens)
        return self.norm(x)


class RandomModel(nn.Module):
    """The model of a config that `draw_config` drew, with random weights."""

    def __init__(self, config: PreTrainedConfig, context: ParallelContext) -> None:
        super().__init__()
        self.model = Body(config, context)
        self.lm_head = ParallelLMHead(
            config.vocab_size,
            config.hidden_size,
            config.head_bias,
            parallel_context=context,
        )
        for layer in self.modules():
            if isinstance(layer, TrainingLayer):
                for name, parameter in layer.named_parameters(recurse=False):
                    # Norms stay as they are.
                    if parameter.dim() > 1 or name != "weight":
                        layer.draw(name, lambda t: nn.init.normal_(t, std=0.2))
        if config.tie_word_embeddings:
            self.lm_head.weight = self.model.tokens.weight

    def forward(
        self,
        input_ids: torch.Tensor,
        positions: torch.Tensor | None = None,
        cu_seqlens: torch.Tensor | None = None,
    ) -> torch.Tensor:
        return self.lm_head(self.model(input_ids, positions, cu_seqlens))
