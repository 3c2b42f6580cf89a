# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""Speculative decoding and pipeline stages, of which logprobs know nothing, on CPU."""

import pytest

from tests.parity import in_engine, trainer
from tests.parity.engine import of_completions
from tests.parity.prompts import of_lengths
from tests.parity.subjects import DEVICE, Subject

# This alone is among the subjects of a short run.
DEMO = Subject("demo", "float32", "CPU_ATTN", True)
OTHERS = [
    Subject("GPT-2", "float32", "CPU_ATTN", True),
    Subject("window", "bfloat16", "CPU_ATTN", True),
]
# vLLM takes no draft models with windows, nor of types that transformers does not know.
DRAFTED = Subject("demo", "bfloat16", "CPU_ATTN", True)


@pytest.mark.parametrize("subject", [DEMO], indirect=True, ids=str)
def test_check_of_pipeline_stages(subject, apart, record):
    """`parity.check` compares weights, tokens and modules of all stages."""
    engine = subject.start_apart(apart, pipeline_parallel_size=2)
    of_trainer = (subject.directory, subject.model_name, subject.dtype, DEVICE, None)
    prompts = of_lengths(subject.model_name, (1, 9, 140), 14)
    options = {"max_tokens": 8, "localise": True}
    report = engine.process.call(in_engine.check, of_trainer, prompts, options)
    assert report["all_equal"] and report["tokens"] == 24
    assert report["weights_compared"]
    record(
        "(a) trainer prefill = prefill of two pipeline stages",
        engine.prefill(prompts),
        trainer.score(subject.trainer, prompts),
    )


def speculate(subject, engine):
    """Logprobs of an engine whose drafts are accepted and rejected, and the trainer's.

    Greedy requests alone have drafts that are accepted. Beside requests that are
    sampled, vLLM's CPU engine rejects nearly all of them.
    """
    prompts = of_lengths(subject.model_name, (1, 2, 9, 33, 140, 300), 12)
    few = {"allowed_token_ids": [3, 5, 8]}
    params = [few, {"temperature": 0}, few | {"n": 2}, {"top_p": 0.9}]
    params += [few | {"presence_penalty": 0.5}, {"temperature": 0.7}]
    samples = []
    for each in ([{"temperature": 0}] * len(params), params):
        every = [one | {"max_tokens": 32} for one in each]
        samples += engine.sample_each(prompts, every)
    accepted = engine.counter("spec_decode_num_accepted_tokens")
    assert 0 < accepted < engine.counter("spec_decode_num_draft_tokens")
    scores = trainer.score(subject.trainer, [sample.tokens for sample in samples])
    return [sample.logprobs for sample in samples], of_completions(scores, samples)


@pytest.mark.parametrize("subject", OTHERS, indirect=True, ids=str)
def test_ngram(subject, apart, record):
    ngram = {"method": "ngram", "num_speculative_tokens": 3, "prompt_lookup_max": 3}
    ngram |= {"prompt_lookup_min": 1}
    engine = subject.start_apart(apart, speculative_config=ngram)
    record("(c) trainer = speculation by ngram", *speculate(subject, engine))


@pytest.mark.parametrize("subject", [DRAFTED], indirect=True, ids=str)
def test_draft_model(subject, record):
    """The model drafts for itself."""
    draft = {"method": "draft_model", "model": str(subject.directory)}
    draft |= {"num_speculative_tokens": 3}
    engine = subject.start(speculative_config=draft)
    record("(c) trainer = speculation by a draft model", *speculate(subject, engine))
