# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""Attention sinks and ALiBi mean the same in vLLM's engine as in the trainer."""

import json

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from vllm import ModelRegistry, SamplingParams
from vllm.model_executor.layers.training import (
    ParallelLMHead,
    TrainableAttention,
    VLLMFlashAttention,
    VocabParallelEmbedding,
    token_logprobs,
)
from vllm.model_executor.parallel_context import ParallelContext

HIDDEN, VOCAB, HEADS = 64, 300, 2
FIELDS = {
    "architectures": ["Attending"],
    "vocab_size": VOCAB,
    "hidden_size": HIDDEN,
    "num_hidden_layers": 1,
    "num_attention_heads": HEADS,
    "max_position_embeddings": 256,
}
FEATURES = {
    "sinks": {"sinks": True},
    "all": {
        "sinks": True,
        "alibi_slopes": [0.25, 0.0625],
        "sliding_window": 9,
        "logits_soft_cap": 3.0,
    },
}
if torch.cuda.is_available():
    # vLLM's backends for CUDA have no ALiBi beside sinks.
    del FEATURES["all"]["alibi_slopes"]
PROMPTS = [[1, 2, 3], list(range(20, 90)), [7], [5, 6] * 20]


class Attending(nn.Module):
    def __init__(self, context, features):
        super().__init__()
        kwargs = {"parallel_context": context}
        self.embedding = VocabParallelEmbedding(VOCAB, HIDDEN, **kwargs)
        self.attention = VLLMFlashAttention(HIDDEN, HEADS, **features, **kwargs)
        self.lm_head = ParallelLMHead(VOCAB, HIDDEN, **kwargs)

    def hidden_states(self, input_ids, positions):
        x = self.embedding(input_ids)
        return x + self.attention(x, positions)

    def forward(self, input_ids, positions):
        return self.lm_head(self.hidden_states(input_ids, positions))


def draw(model, seed):
    torch.manual_seed(seed)
    for name, parameter in model.named_parameters():
        # Sinks that weigh as much as many keys: one that is left out is seen.
        mean = 2.0 if name.endswith("sinks") else 0.0
        nn.init.normal_(parameter, mean, 0.4)


def check_logprobs(llm, model):
    params = SamplingParams(max_tokens=12, temperature=1.0, logprobs=0, seed=0)
    params.detokenize = False
    prompts = [{"prompt_token_ids": ids} for ids in PROMPTS]
    outputs = llm.generate(prompts, params, use_tqdm=False)
    for prompt, output in zip(PROMPTS, outputs, strict=True):
        (completion,) = output.outputs
        sampled = list(completion.token_ids)
        engine = [
            row[token].logprob
            for row, token in zip(completion.logprobs, sampled, strict=True)
        ]
        ids = torch.tensor(prompt + sampled)
        hidden = model.hidden_states(ids[:-1], torch.arange(len(ids) - 1))
        hidden = hidden[len(prompt) - 1 :]
        trainer = token_logprobs(hidden, model.lm_head, ids[len(prompt) :])
        torch.testing.assert_close(trainer, torch.tensor(engine), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", list(FEATURES))
def test_logprobs_agree_before_and_after_new_weights(name, make_llm, tmp_path):
    features = FEATURES[name]
    model = Attending(ParallelContext.single(), features)
    draw(model, 0)
    save_file(model.state_dict(), tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps(FIELDS))
    ModelRegistry.register_model(
        "Attending",
        lambda config, parallel_context: Attending(parallel_context, features),
    )
    llm = make_llm(tmp_path)
    check_logprobs(llm, model)

    draw(model, 1)
    tensors = list(model.state_dict().items())
    llm.collective_rpc("reload_weights", kwargs={"weights_iterator": tensors})
    llm.reset_prefix_cache()
    check_logprobs(llm, model)


def test_sinks_in_fp16_are_loaded_in_place(make_llm, tmp_path):
    """vLLM's attention reads the parameter that weights are loaded into."""
    features = FEATURES["sinks"]
    model = Attending(ParallelContext.single(), features).half()
    draw(model, 0)
    save_file(model.state_dict(), tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps(FIELDS))
    ModelRegistry.register_model(
        "Attending",
        lambda config, parallel_context: Attending(parallel_context, features),
    )
    # FlashAttention has sinks in bf16 only.
    backend = {"attention_backend": "TRITON_ATTN"} if torch.cuda.is_available() else {}
    llm = make_llm(tmp_path, dtype="float16", **backend)
    prompt = {"prompt_token_ids": PROMPTS[1]}
    params = SamplingParams(max_tokens=1, detokenize=False)
    for seed in (0, 1):
        draw(model, seed)
        tensors = list(model.state_dict().items())
        llm.collective_rpc("reload_weights", kwargs={"weights_iterator": tensors})
        llm.reset_prefix_cache()
        llm.generate(prompt, params, use_tqdm=False)
        (used,) = llm.apply_model(sinks_in_use)
        assert torch.equal(used, model.attention.attn.sinks.float())


def sinks_in_use(model):
    layers = [m for m in model.modules() if isinstance(m, TrainableAttention)]
    return layers[0].engine.impl.sinks.detach().float().cpu()
