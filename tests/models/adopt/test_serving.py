# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""Adopted models in a real engine."""

import pytest
import torch
from transformers import AutoModelForCausalLM

from tests.models.adopt.families import CONFIGS, make
from vllm import ModelRegistry, SamplingParams, training
from vllm.training import parity

PROMPTS = [[5, 6, 7, 8, 9], [10, 11, 12], [3 + i % 90 for i in range(40)], [4]]


def build(config):
    return training.adopt(AutoModelForCausalLM.from_config(config))


def assert_greedy_tokens(model, llm, tolerance):
    """Each token has the largest logit of the unmodified model, or nearly so."""
    sampling = SamplingParams(temperature=0, max_tokens=8, detokenize=False)
    prompts = [{"prompt_token_ids": prompt} for prompt in PROMPTS]
    for prompt, output in zip(PROMPTS, llm.generate(prompts, sampling)):
        tokens = prompt + list(output.outputs[0].token_ids)
        with torch.no_grad():
            logits = model(torch.tensor([tokens]), use_cache=False).logits[0].float()
        for place in range(len(prompt), len(tokens)):
            row = logits[place - 1]
            assert row[tokens[place]] >= row.max() - tolerance


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("family", sorted(CONFIGS))
def test_same_bits(make_llm, tmp_path, monkeypatch, family, dtype):
    monkeypatch.setenv("VLLM_BATCH_INVARIANT", "1")
    original = make(family, getattr(torch, dtype))
    original.save_pretrained(tmp_path)
    ModelRegistry.register_model(type(original).__name__, build)
    llm = make_llm(tmp_path, dtype=dtype, max_model_len=64)
    assert_greedy_tokens(original, llm, 1e-4 if dtype == "float32" else 0.06)
    trainer = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=dtype).eval()
    report = parity.check(llm, training.adopt(trainer), PROMPTS, max_tokens=12)
    assert report.all_equal, report
