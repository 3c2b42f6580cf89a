# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""Models that the tests of builders serve, and how they are saved."""

import copy
import json
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import nn

from vllm.model_executor.layers.training import TrainableAttention
from vllm.model_executor.models.builder import PipelineLayers, model_builder
from vllm.model_executor.models.generic_transformer import (
    GenericTransformerConfig,
    GenericTransformerForCausalLM,
)

GENERIC = "GenericTransformerForCausalLM"
PLAIN = "PlainGPT"
PLAIN_FIELDS = {
    "architectures": [PLAIN],
    "vocab_size": 300,
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "max_position_embeddings": 256,
}


class PlainBlock(nn.Module):
    def __init__(self, hidden: int, heads: int):
        super().__init__()
        self.heads = heads
        self.norms = nn.ModuleList(nn.LayerNorm(hidden) for _ in range(2))
        self.qkv = nn.Linear(hidden, 3 * hidden)
        self.attention = TrainableAttention(heads, hidden // heads)
        self.out = nn.Linear(hidden, hidden)
        self.mlp = nn.Sequential(
            nn.Linear(hidden, 4 * hidden), nn.GELU(), nn.Linear(4 * hidden, hidden)
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        batch, seq, hidden = x.shape
        q, k, v = (
            part.view(batch, seq, self.heads, -1)
            for part in self.qkv(self.norms[0](x)).chunk(3, -1)
        )
        x = x + self.out(self.attention(q, k, v).reshape(batch, seq, hidden))
        return x + self.mlp(self.norms[1](x))


class PlainGPT(nn.Module):
    """GPT-2 in plain PyTorch but for attention; written for `[batch, seq]`."""

    def __init__(self, config):
        super().__init__()
        hidden = config.hidden_size
        self.tokens = nn.Embedding(config.vocab_size, hidden)
        self.places = nn.Embedding(config.max_position_embeddings, hidden)
        self.blocks = nn.ModuleList(
            PlainBlock(hidden, config.num_attention_heads)
            for _ in range(config.num_hidden_layers)
        )
        self.norm = nn.LayerNorm(hidden)
        self.to_vocab = nn.Linear(hidden, config.vocab_size, bias=False)

    def forward(self, input_ids: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        x = self.tokens(input_ids) + self.places(positions)
        for block in self.blocks:
            x = block(x)
        return self.to_vocab(self.norm(x))


class StagedGPT(nn.Module):
    """One pipeline stage of a `PlainGPT`."""

    def __init__(self, config, context):
        super().__init__()
        hidden = config.hidden_size
        self.tokens = self.places = self.norm = self.to_vocab = None
        if context.is_first_stage:
            self.tokens = nn.Embedding(config.vocab_size, hidden)
            self.places = nn.Embedding(config.max_position_embeddings, hidden)
        self.blocks = PipelineLayers(
            config.num_hidden_layers,
            lambda index: PlainBlock(hidden, config.num_attention_heads),
            context,
        )
        if context.is_last_stage:
            self.norm = nn.LayerNorm(hidden)
            self.to_vocab = nn.Linear(hidden, config.vocab_size, bias=False)

    def forward(self, input_ids, positions, hidden_states=None):
        x = hidden_states
        if x is None:
            x = self.tokens(input_ids) + self.places(positions)
        for block in self.blocks:
            x = block(x)
        return x if self.to_vocab is None else self.to_vocab(self.norm(x))


@model_builder(supports_pp=True)
def build_staged(config, parallel_context):
    return StagedGPT(config, parallel_context)


def build_plain(config):
    return PlainGPT(config)


def build_generic(config, parallel_context):
    return GenericTransformerForCausalLM(config, parallel_context)


class BiasedGPT(PlainGPT):
    """Does something to the logits after the head."""

    def __init__(self, config):
        super().__init__(config)
        self.register_buffer("bias", torch.linspace(-1, 1, config.vocab_size), False)

    def forward(self, idx, targets=None, pos=None):
        logits = (super().forward(idx, pos) + self.bias).float()
        return 5 * torch.tanh(logits / 5), None


def build_biased(config):
    return BiasedGPT(config)


class SoftmaxGPT(PlainGPT):
    """Returns something else than logits."""

    def forward(self, input_ids, positions):
        return super().forward(input_ids, positions).softmax(-1)


@model_builder(head="to_vocab", batched=True)
def build_softmax(config):
    return SoftmaxGPT(config)


class CappedGPT(PlainGPT):
    """Caps its logits, and says itself what comes before."""

    def hidden_states(self, input_ids, positions):
        x = self.tokens(input_ids) + self.places(positions)
        for block in self.blocks:
            x = block(x)
        return self.norm(x)

    def logits(self, hidden_states):
        return 3 * torch.tanh(self.to_vocab(hidden_states) / 3)

    def forward(self, input_ids, positions):
        return self.logits(self.hidden_states(input_ids, positions))


def build_capped(config):
    return CappedGPT(config)


def attend_with_layers(model) -> None:
    """Let a model of transformers attend with `TrainableAttention`."""
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    def attend(module, q, k, v, attention_mask, **kwargs):
        return module.trained(*(x.transpose(1, 2) for x in (q, k, v))), None

    config = model.config
    for layer in model.model.layers:
        attention = layer.self_attn
        attention.trained = TrainableAttention(
            config.num_attention_heads,
            attention.head_dim,
            attention.scaling,
            config.num_key_value_heads,
            sliding_window=getattr(attention, "sliding_window", None),
        )
    ALL_ATTENTION_FUNCTIONS.register("trained", attend)
    model.set_attn_implementation("trained")


def build_gemma(config):
    """As transformers defines it, but for attention."""
    from transformers import Gemma2ForCausalLM

    model = Gemma2ForCausalLM(config)
    attend_with_layers(model)
    return model


class ShiftedBlock(PlainBlock):
    """Adds to each token the one before it."""

    def forward(self, x):
        return super().forward(x + nn.functional.pad(x, (0, 0, 1, -1)))


def build_shifted(config):
    model = PlainGPT(config)
    model.blocks[1] = ShiftedBlock(config.hidden_size, config.num_attention_heads)
    return model


def save_plain(directory: Path, **fields) -> PlainGPT:
    """A `PlainGPT` in a model directory without tokenizer or `model_type`."""
    from transformers import PreTrainedConfig

    fields = PLAIN_FIELDS | fields
    torch.manual_seed(0)
    model = PlainGPT(PreTrainedConfig(**fields))
    for parameter in model.parameters():
        if parameter.dim() > 1:
            nn.init.normal_(parameter, std=0.3)
    save_file(model.state_dict(), directory / "model.safetensors")
    (directory / "config.json").write_text(json.dumps(fields))
    return model


def save_generic(directory: Path, **sizes) -> GenericTransformerForCausalLM:
    """A `GenericTransformerForCausalLM` whose tokens depend on the prompt."""
    torch.manual_seed(0)
    sizes = {
        "vocab_size": 300,
        "hidden_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 256,
        "initializer_range": 0.3,
    } | sizes
    model = GenericTransformerForCausalLM(GenericTransformerConfig(**sizes))
    model.save_pretrained(directory)
    return model


def greedy(llm, prompts: list[list[int]], max_tokens: int = 8) -> list:
    """Completions of one token at a time, with logprobs."""
    from vllm import SamplingParams

    params = SamplingParams(
        max_tokens=max_tokens, temperature=0, detokenize=False, logprobs=0
    )
    outputs = llm.generate(
        [{"prompt_token_ids": ids} for ids in prompts], params, use_tqdm=False
    )
    return [output.outputs[0] for output in outputs]


@torch.no_grad()
def assert_trainer_agrees(model, prompts, completions) -> None:
    """The training model, on its own, says the same tokens and logprobs."""
    for prompt, completion in zip(prompts, completions, strict=True):
        tokens = list(completion.token_ids)
        ids = torch.tensor([prompt + tokens])
        positions = torch.arange(ids.shape[1])[None]
        logprobs = model(ids, positions).log_softmax(-1)[0, len(prompt) - 1 : -1]
        assert logprobs.argmax(-1).tolist() == tokens
        engine = [
            entry[token].logprob for token, entry in zip(tokens, completion.logprobs)
        ]
        torch.testing.assert_close(
            torch.tensor(engine), logprobs.amax(-1), atol=1e-3, rtol=0
        )


@torch.no_grad()
def assert_logprobs_agree_in_bf16(model, prompts, completions) -> None:
    """The engine's bf16 logprobs are as good as those of the bf16 training model.

    Judged against the same weights in fp32: each rounds in its own places, so the
    engine's error may be three times the trainer's, and one rounding of the logits
    more.
    """
    exact_model = copy.deepcopy(model).float()
    engine, trainer, exact, steps = [], [], [], []
    for prompt, completion in zip(prompts, completions, strict=True):
        tokens = torch.tensor(completion.token_ids)
        ids = torch.tensor(prompt + tokens.tolist())
        for each, found in ((model, trainer), (exact_model, exact)):
            logits = each(ids)[len(prompt) - 1 : -1].float()
            found.append(logits.log_softmax(-1).gather(1, tokens[:, None])[:, 0])
        steps.append(logits.abs().max() * 2**-8)
        engine += [
            entry[token].logprob
            for token, entry in zip(completion.token_ids, completion.logprobs)
        ]
    right = torch.cat(exact)
    error = (torch.tensor(engine) - right).square().mean().sqrt()
    plain_error = (torch.cat(trainer) - right).square().mean().sqrt()
    assert error <= 3 * plain_error + max(steps), (error, plain_error)
