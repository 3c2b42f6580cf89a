# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""Adopted models in a real engine."""

from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from tests.models.adopt.families import make
from tests.models.adopt.inputs import PROMPTS, assert_greedy_tokens
from vllm import ModelRegistry, training
from vllm.training import parity

CUDA = torch.cuda.is_available()
DEVICE = "cuda" if CUDA else "cpu"
# On CUDA these need the backend that is batch-invariant with windows.
WITH_WINDOWS = ("gemma2", "gemma3", "gpt_oss")


def build(config):
    return training.adopt(AutoModelForCausalLM.from_config(config))


@pytest.mark.parametrize("eager", [True, False] if CUDA else [True])
def test_same_bits(make_llm, tmp_path, monkeypatch, family_and_dtype, eager):
    family, dtype = family_and_dtype
    monkeypatch.setenv("VLLM_BATCH_INVARIANT", "1")
    original = make(family, getattr(torch, dtype)).to(DEVICE)
    original.save_pretrained(tmp_path)
    options: dict[str, Any] = {}
    implementation = None
    if family == "llama":  # without code
        builder = "vllm.model_executor.models.builder.adopt:causal_lm"
        options["model_class_overrides"] = {type(original).__name__: builder}
    else:
        ModelRegistry.register_model(type(original).__name__, build)
    if CUDA and (dtype == "float32" or family in WITH_WINDOWS):
        options["attention_config"] = {"backend": "TRITON_ATTN"}
        implementation = "vllm_triton"
    llm = make_llm(
        tmp_path, dtype=dtype, max_model_len=64, enforce_eager=eager, **options
    )

    def logits(ids):
        return original(ids.to(DEVICE), use_cache=False).logits

    assert_greedy_tokens(logits, llm, 1e-4 if dtype == "float32" else 0.06)
    trainer = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=dtype).eval()
    trainer = training.adopt(trainer.to(DEVICE), implementation=implementation)
    report = parity.check(llm, trainer, PROMPTS, max_tokens=12)
    assert report.all_equal, report


def test_another_dtype_than_the_checkpoints(make_llm, tmp_path, monkeypatch):
    monkeypatch.setenv("VLLM_BATCH_INVARIANT", "1")
    original = make("llama", torch.float32)
    original.save_pretrained(tmp_path)
    ModelRegistry.register_model(type(original).__name__, build)
    llm = make_llm(tmp_path, dtype="bfloat16", max_model_len=64, enforce_eager=True)
    trainer = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16)
    trainer = training.adopt(trainer.to(DEVICE).eval())
    assert parity.check(llm, trainer, PROMPTS, max_tokens=4).all_equal


def test_a_builder_that_ignores_the_dtype_is_refused(make_llm, tmp_path):
    original = make("llama", torch.float32)
    original.save_pretrained(tmp_path)

    def build(config):
        config.dtype = torch.float32
        return training.adopt(AutoModelForCausalLM.from_config(config))

    ModelRegistry.register_model(type(original).__name__, build)
    message = "called with torch.float32 in an engine of torch.bfloat16"
    with pytest.raises(TypeError, match=message):
        make_llm(tmp_path, dtype="bfloat16", max_model_len=64, enforce_eager=True)
