# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""Trainer and engine of one tensor-parallel rank: the numerics contract."""

import pytest
import torch

from tests.parity import trainer
from tests.parity.engine import of_completions
from tests.parity.prompts import LENGTHS, crowd, of_lengths
from vllm.model_executor.checkpoint.save import save_checkpoint


@pytest.fixture
def engine(subject):
    return subject.start()


@pytest.fixture
def prompts(subject):
    return of_lengths(subject.model_name, LENGTHS, 0)


def test_trainer_prefill_is_engine_prefill(subject, engine, prompts, record):
    found = engine.prefill(prompts)
    record(
        "(a) trainer prefill = engine prefill",
        found,
        trainer.score(subject.trainer, prompts),
    )


def test_engine_decode_is_engine_prefill_and_trainer(subject, engine, prompts, record):
    samples = engine.sample(prompts, 24)
    decoded = [sample.logprobs for sample in samples]
    sequences = [sample.tokens for sample in samples]
    prefilled = of_completions(engine.prefill(sequences), samples)
    record("(b) engine decode = engine prefill", decoded, prefilled)
    trained = of_completions(trainer.score(subject.trainer, sequences), samples)
    record("(a, b) trainer = engine decode", decoded, trained)


def test_alone_and_in_a_crowd(subject, engine, record):
    """64 requests at a time, some of which are preempted and computed again."""
    prompts = crowd(subject.model_name)
    before = engine.counter("num_preemptions")
    together = engine.sample(prompts, 24, temperature=0)
    assert engine.counter("num_preemptions") > before, "no request was preempted"
    picked = [0, 1, 2, 32, 60, 63]
    alone = [engine.sample([prompts[i]], 24, temperature=0)[0] for i in picked]
    assert [together[i].completion for i in picked] == [s.completion for s in alone]
    record(
        "(c) alone = among 64 requests",
        [sample.logprobs for sample in alone],
        [together[i].logprobs for i in picked],
    )
    trained = trainer.score(subject.trainer, [sample.tokens for sample in together])
    record(
        "(c) trainer = 64 requests, some preempted",
        [sample.logprobs for sample in together],
        of_completions(trained, together),
    )


def test_prefix_cache(subject, engine, record):
    shared, *tails = of_lengths(subject.model_name, (411, 1, 2, 31, 77), 3)
    prompts = [shared + tail for tail in tails]
    engine.sample([shared], 1)
    samples = engine.sample(prompts, 16)
    assert all(sample.cached > 0 for sample in samples)
    trained = trainer.score(subject.trainer, [sample.tokens for sample in samples])
    record(
        "(c) trainer = prefix taken from the cache",
        [sample.logprobs for sample in samples],
        of_completions(trained, samples),
    )


def test_layouts_of_the_trainer(subject, record):
    prompts = of_lengths(subject.model_name, (2, 3, 8, 33, 64, 131, 333), 5)
    packed = trainer.score(subject.trainer, prompts)
    for layout in (trainer.padded, trainer.singly):
        other = trainer.score(subject.trainer, prompts, layout)
        record(f"(g) trainer packed = {layout.__name__}", other, packed)


def test_train_sync_sample(subject, engine, record):
    """Several steps; after each the engine has the trainer's new weights."""
    model = subject.trainer
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    prompts = of_lengths(subject.model_name, (1, 5, 32, 97), 6)
    decoded, trained = [], []
    samples = engine.sample(prompts, 12)
    for _ in range(3):
        loss = -torch.cat(trainer.logprobs(model, [s.tokens for s in samples])).mean()
        optimizer.zero_grad()
        loss.backward()
        for name, parameter in model.named_parameters():
            assert parameter.grad is not None and parameter.grad.any(), name
        optimizer.step()
        save_checkpoint(model, subject.directory)
        engine.reload_weights()
        samples = engine.sample(prompts, 12)
        scores = trainer.score(model, [sample.tokens for sample in samples])
        decoded += [sample.logprobs for sample in samples]
        trained += of_completions(scores, samples)
    record("(g) train, synchronise, sample, 3 times", decoded, trained)
