# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""What the sampler makes of the logits: raw and processed logprobs.

The engine of processed logprobs is also the one of small chunks.
"""

import pytest
import torch

from tests.parity import trainer
from tests.parity.engine import of_completions
from tests.parity.prompts import LENGTHS, of_lengths
from tests.parity.subjects import SUBJECTS
from vllm.model_executor.determinism.log_softmax import (
    log_softmax,
    tempered,
)
from vllm.model_executor.determinism.mode import batch_invariant
from vllm.model_executor.layers.training import full_logprobs, token_logprobs
from vllm.v1.sample.ops import topk_topp_triton
from vllm.v1.sample.ops.topk_topp_sampler import apply_top_k_top_p

TEMPERATURE = 0.7
eager_only = pytest.mark.parametrize(
    "subject",
    [subject for subject in SUBJECTS if subject.eager],
    indirect=True,
    ids=str,
)
# What a request may be sampled with; raw logprobs are to know nothing of it.
PARAMETERS = {
    "temperature, top-k and top-p": {"top_k": 50, "top_p": 0.8},
    "min-p": {"min_p": 0.05},
    "logit bias": {"logit_bias": {3: 5.0, 11: -100.0}},
    "penalties": {
        "repetition_penalty": 1.3,
        "presence_penalty": 0.5,
        "frequency_penalty": 0.5,
    },
    "greedy, penalties": {"temperature": 0, "repetition_penalty": 1.3},
    "n > 1": {"n": 3},
    "min-p and penalties": {"min_p": 0.05, "presence_penalty": 1, "prompt_logprobs": 0},
}
FILTERS = [{"top_k": 20}, {"top_p": 0.9}, {"top_k": 50, "top_p": 0.8}]


@pytest.fixture
def prompts(subject):
    return of_lengths(subject.model_name, (1, 2, 9, 33, 64, 131, 200, 333), 4)


@pytest.fixture
def processed(subject):
    """Prompts are cut into pieces of at most 37 tokens."""
    return subject.start(
        logprobs_mode="processed_logprobs", max_num_batched_tokens=37, max_num_seqs=8
    )


@torch.no_grad()
def of_samples(subject, samples, function):
    """`function(hidden states, tokens)` of each completion."""
    with batch_invariant():
        states = trainer.packed(subject.trainer, [s.tokens for s in samples])
        return [
            function(
                hidden[len(s.prompt) - 1 : -1],
                torch.tensor(s.completion, device=hidden.device),
            ).cpu()
            for hidden, s in zip(states, samples)
        ]


def test_raw_logprobs_are_those_of_the_model(subject, prompts, record):
    """Whatever they are sampled with, each request otherwise than its neighbours."""
    each = [
        {"temperature": TEMPERATURE, "max_tokens": 16} | PARAMETERS[name]
        for name in PARAMETERS
        for _ in prompts
    ]
    samples = subject.start().sample_each(prompts * len(PARAMETERS), each)
    scores = trainer.score(subject.trainer, [sample.tokens for sample in samples])
    expected = of_completions(scores, samples)
    for name, params in PARAMETERS.items():
        count = len(prompts) * params.get("n", 1)
        mine, samples = samples[:count], samples[count:]
        values, scores = scores[:count], scores[count:]
        first, expected = expected[:count], expected[count:]
        record(f"(f) raw logprobs, {name}", [sample.logprobs for sample in mine], first)
        if "prompt_logprobs" in params:
            of_prompts = [s[: len(x.prompt) - 1] for s, x in zip(values, mine)]
            found = [sample.prompt_logprobs for sample in mine]
            record(f"(f) raw logprobs of prompts, {name}", found, of_prompts)


def test_full_vocabulary(subject, prompts, record):
    samples = subject.start().sample(prompts, 6, logprobs=-1)
    head = subject.trainer.lm_head
    rows = of_samples(subject, samples, lambda hidden, _: full_logprobs(hidden, head))
    record("(f) whole vocabulary", [sample.logprobs for sample in samples], rows)


@eager_only
def test_small_chunks(subject, processed, record):
    prompts = of_lengths(subject.model_name, LENGTHS, 8)
    found = processed.prefill(prompts)
    scores = trainer.score(subject.trainer, prompts)
    record("(c) trainer = prefill in chunks of 37", found, scores)


@eager_only
def test_temperature(subject, processed, prompts, record):
    samples = processed.sample(prompts, 16, temperature=TEMPERATURE)

    def of_tokens(hidden, tokens):
        return token_logprobs(
            hidden, subject.trainer.lm_head, tokens, temperature=TEMPERATURE
        )

    record(
        "(f) processed logprobs, temperature",
        [sample.logprobs for sample in samples],
        of_samples(subject, samples, of_tokens),
    )


@eager_only
@pytest.mark.parametrize("filters", FILTERS, ids="-".join)
def test_top_k_and_top_p(subject, filters, processed, prompts, record, monkeypatch):
    """vLLM's own filters of the trainer's logits, over the whole vocabulary."""
    # As in a process that started in the mode.
    monkeypatch.setattr(topk_topp_triton, "_SPLIT_MAX_BATCH", 0)
    params = {"temperature": TEMPERATURE} | filters
    samples = processed.sample(prompts, 6, logprobs=-1, **params)

    def filtered(hidden, _):
        def of_each(value):
            return value and torch.full((len(hidden),), value, device=hidden.device)

        logits = tempered(subject.trainer.lm_head(hidden), of_each(TEMPERATURE))
        top_k, top_p = (of_each(filters.get(name)) for name in ("top_k", "top_p"))
        return log_softmax(apply_top_k_top_p(logits, top_k, top_p))

    rows = of_samples(subject, samples, filtered)
    assert all(row.isinf().any() for row in rows)
    record(
        f"(f) processed logprobs, {' and '.join(filters)}",
        [sample.logprobs for sample in samples],
        rows,
    )
