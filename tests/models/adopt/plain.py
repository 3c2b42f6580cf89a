# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""Models as people write them, in one file of plain PyTorch."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn


@dataclass
class NanoConfig:
    vocab_size: int = 128
    hidden_size: int = 64
    num_hidden_layers: int = 2
    num_attention_heads: int = 2
    max_position_embeddings: int = 96
    tie_word_embeddings: bool = True


class NanoAttention(nn.Module):
    """One fused projection, torch's attention."""

    def __init__(self, config: NanoConfig) -> None:
        super().__init__()
        self.c_attn = nn.Linear(config.hidden_size, 3 * config.hidden_size)
        self.c_proj = nn.Linear(config.hidden_size, config.hidden_size)
        self.n_head = config.num_attention_heads

    def forward(self, x):
        batch, seq, width = x.shape
        q, k, v = self.c_attn(x).split(width, dim=2)
        q, k, v = (
            t.view(batch, seq, self.n_head, width // self.n_head).transpose(1, 2)
            for t in (q, k, v)
        )
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.c_proj(y.transpose(1, 2).contiguous().view(batch, seq, width))


class NanoBlock(nn.Module):
    def __init__(self, config: NanoConfig) -> None:
        super().__init__()
        self.ln_1 = nn.LayerNorm(config.hidden_size)
        self.attn = NanoAttention(config)
        self.ln_2 = nn.LayerNorm(config.hidden_size, bias=False)
        self.c_fc = nn.Linear(config.hidden_size, 4 * config.hidden_size)
        self.gelu = nn.GELU()
        self.c_proj = nn.Linear(4 * config.hidden_size, config.hidden_size)

    def forward(self, x):
        x = x + self.attn(self.ln_1(x))
        return x + self.c_proj(self.gelu(self.c_fc(self.ln_2(x))))


class NanoGPT(nn.Module):
    """Learned positions, a tied head, logits and a loss."""

    def __init__(self, config: NanoConfig) -> None:
        super().__init__()
        self.wte = nn.Embedding(config.vocab_size, config.hidden_size)
        self.wpe = nn.Embedding(config.max_position_embeddings, config.hidden_size)
        self.h = nn.ModuleList(
            NanoBlock(config) for _ in range(config.num_hidden_layers)
        )
        self.ln_f = nn.LayerNorm(config.hidden_size)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.lm_head.weight = self.wte.weight

    def forward(self, idx, pos=None, targets=None):
        if pos is None:
            pos = torch.arange(idx.shape[1], device=idx.device)
        x = self.wte(idx) + self.wpe(pos)
        for block in self.h:
            x = block(x)
        logits = self.lm_head(self.ln_f(x))
        if targets is None:
            return logits, None
        return logits, F.cross_entropy(logits.flatten(0, 1), targets.flatten())


def nano_with(attention: type[NanoAttention]) -> NanoGPT:
    """A model whose layers have another attention, in evaluation mode."""
    config = NanoConfig()
    torch.manual_seed(0)
    model = NanoGPT(config)
    for block in model.h:
        block.attn = attention(config)
    return model.eval()


class RMS(nn.Module):
    """A norm of one's own, in the order of roundings of Gemma's."""

    def __init__(self, size: int, tiny: float = 1e-5) -> None:
        super().__init__()
        self.tiny = tiny
        self.weight = nn.Parameter(torch.ones(size))

    def forward(self, x):
        wide = x.float()
        wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + self.tiny)
        return (wide * self.weight.float()).type_as(x)


class ComplexAttention(nn.Module):
    """Grouped heads, complex rotary embedding, a mask from a buffer."""

    def __init__(self, config: NanoConfig) -> None:
        super().__init__()
        width = config.hidden_size
        self.wq = nn.Linear(width, width, bias=False)
        self.wk = nn.Linear(width, 32, bias=False)
        self.wv = nn.Linear(width, 32, bias=False)
        self.wo = nn.Linear(width, width, bias=False)
        size = config.max_position_embeddings
        mask = torch.ones(size, size, dtype=torch.bool).tril()
        self.register_buffer("mask", mask, persistent=False)

    def forward(self, x, freqs):
        batch, seq, _ = x.shape
        q = self.wq(x).view(batch, seq, 2, 32)
        k = self.wk(x).view(batch, seq, 1, 32)
        v = self.wv(x).view(batch, seq, 1, 32)
        q, k = _rotate(q, freqs), _rotate(k, freqs)
        q, k, v = (t.transpose(1, 2) for t in (q, k, v))
        y = F.scaled_dot_product_attention(
            q, k, v, attn_mask=self.mask[:seq, :seq], enable_gqa=True, scale=0.2
        )
        return self.wo(y.transpose(1, 2).reshape(batch, seq, -1))


def _rotate(x, freqs):
    pairs = torch.view_as_complex(x.float().unflatten(-1, (-1, 2)))
    return torch.view_as_real(pairs * freqs[:, :, None]).flatten(-2).type_as(x)


class FeedForward(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.w1 = nn.Linear(width, 96, bias=False)
        self.w2 = nn.Linear(96, width, bias=False)
        self.w3 = nn.Linear(width, 96, bias=False)

    def forward(self, x):
        return self.w2(F.silu(self.w1(x)) * self.w3(x))


class RotaryBlock(nn.Module):
    def __init__(self, config: NanoConfig) -> None:
        super().__init__()
        self.attention = ComplexAttention(config)
        self.feed_forward = FeedForward(config.hidden_size)
        self.attention_norm = RMS(config.hidden_size)
        self.ffn_norm = RMS(config.hidden_size)

    def forward(self, x, freqs):
        x = x + self.attention(self.attention_norm(x), freqs)
        return x + self.feed_forward(self.ffn_norm(x))


class RotaryGPT(nn.Module):
    """Llama's architecture, with a scaled embedding and capped logits."""

    def __init__(self, config: NanoConfig) -> None:
        super().__init__()
        self.tok_embeddings = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleDict(
            {str(i): RotaryBlock(config) for i in range(config.num_hidden_layers)}
        )
        self.norm = RMS(config.hidden_size)
        self.output = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        inverse = 1.0 / 10000.0 ** (torch.arange(0, 32, 2) / 32)
        angles = torch.outer(torch.arange(config.max_position_embeddings), inverse)
        freqs = torch.polar(torch.ones_like(angles), angles)
        self.register_buffer("freqs_cis", freqs, persistent=False)

    def forward(self, tokens, positions):
        x = self.tok_embeddings(tokens) * math.sqrt(self.norm.weight.shape[0])
        freqs = self.freqs_cis[positions]
        for layer in self.layers.values():
            x = layer(x, freqs)
        return 20.0 * torch.tanh(self.output(self.norm(x)) / 20.0)
