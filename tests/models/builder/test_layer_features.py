# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""Features of the layers mean the same in vLLM's engine as in the trainer."""

import json

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from vllm import ModelRegistry, SamplingParams
from vllm.model_executor.layers.training import (
    ColumnParallelLinear,
    ParallelLMHead,
    RMSNorm,
    RotaryEmbedding,
    RowParallelLinear,
    VLLMFlashAttention,
    VocabParallelEmbedding,
    token_logprobs,
)
from vllm.model_executor.parallel_context import ParallelContext

HIDDEN, VOCAB = 64, 300
FIELDS = {
    "architectures": ["Featured"],
    "vocab_size": VOCAB,
    "hidden_size": HIDDEN,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "max_position_embeddings": 256,
}
FEATURES = {
    "window": {"sliding_window": 7, "is_neox_style": False},
    "soft cap": {"logits_soft_cap": 2.0, "rotary_dim": 16, "num_kv_heads": 1},
    "both": {"sliding_window": 9, "logits_soft_cap": 3, "scale": 0.4, "bias": True},
}
PROMPTS = [[1, 2, 3], list(range(20, 90)), [7], [5, 6] * 20]


class Doubled(ColumnParallelLinear):
    """A subclass with its own forward, which the engine leaves as it is."""

    def forward(self, x):
        return 2 * super().forward(x)


class Featured(nn.Module):
    def __init__(self, context, features):
        super().__init__()
        names = ("is_neox_style", "rotary_dim")
        rotary = {name: features[name] for name in names if name in features}
        others = {name: features[name] for name in features.keys() - rotary.keys()}
        kwargs = {"parallel_context": context}
        self.embedding = VocabParallelEmbedding(VOCAB, HIDDEN, **kwargs)
        self.norm = RMSNorm(HIDDEN, **kwargs)
        self.attention = VLLMFlashAttention(
            HIDDEN,
            2,
            rotary=RotaryEmbedding(32, max_position_embeddings=256, **rotary),
            **others,
            **kwargs,
        )
        self.up = Doubled(HIDDEN, 96, **kwargs)
        self.down = RowParallelLinear(96, HIDDEN, **kwargs)
        self.lm_head = ParallelLMHead(VOCAB, HIDDEN, **kwargs)

    def hidden_states(self, input_ids, positions):
        x = self.embedding(input_ids)
        normed, x = self.norm(self.attention(self.norm(x), positions), x)
        return x + self.down(self.up(normed).relu())

    def forward(self, input_ids, positions):
        return self.lm_head(self.hidden_states(input_ids, positions))


@pytest.mark.parametrize("name", list(FEATURES))
def test_logprobs_agree(name, make_llm, tmp_path):
    features = FEATURES[name]
    torch.manual_seed(0)
    model = Featured(ParallelContext.single(), features)
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.4)
    save_file(model.state_dict(), tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps(FIELDS))
    ModelRegistry.register_model(
        "Featured",
        lambda config, parallel_context: Featured(parallel_context, features),
    )
    params = SamplingParams(max_tokens=12, temperature=1.0, logprobs=0, seed=0)
    params.detokenize = False
    outputs = make_llm(tmp_path, enforce_eager=True).generate(
        [{"prompt_token_ids": ids} for ids in PROMPTS], params, use_tqdm=False
    )

    for prompt, output in zip(PROMPTS, outputs, strict=True):
        (completion,) = output.outputs
        sampled = list(completion.token_ids)
        engine = [
            row[token].logprob for row, token in zip(completion.logprobs, sampled)
        ]
        ids = torch.tensor(prompt + sampled)
        hidden = model.hidden_states(ids[:-1], torch.arange(len(ids) - 1))
        hidden = hidden[len(prompt) - 1 :]
        trainer = token_logprobs(hidden, model.lm_head, ids[len(prompt) :])
        torch.testing.assert_close(
            trainer, torch.tensor(engine), rtol=1e-4, atol=1e-4, msg=lambda m: name + m
        )
