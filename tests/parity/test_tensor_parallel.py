# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""Trainer and engine of one and two tensor-parallel ranks, all pairs but 1 and 1."""

import pytest
import torch

from tests.parity import trainer
from tests.parity.prompts import of_lengths
from tests.parity.subjects import IMPLEMENTATIONS, TENSOR_PARALLEL, TWO_DEVICES


def engine_values(samples):
    """All tokens' logprobs but the first's."""
    return [torch.cat([s.prompt_logprobs, s.logprobs]) for s in samples]


@pytest.mark.parametrize("engine_tp", [1, 2] if TWO_DEVICES else [1])
@pytest.mark.parametrize("subject", TENSOR_PARALLEL, indirect=True, ids=str)
def test_trainer_and_engine(subject, engine_tp, request, record):
    """Where the sizes differ, tp_reduction_shards names the larger."""
    if engine_tp == 2:
        engine = subject.start_pair()
    else:
        engine = subject.start(additional_config={"tp_reduction_shards": 2})
    prompts = of_lengths(subject.model_name, (1, 2, 8, 33, 131, 700), 7)
    samples = engine.sample(prompts, 16, prompt_logprobs=0)
    sequences = [sample.tokens for sample in samples]
    shards = subject.load_trainer(tp_reduction_shards=2)
    record(
        f"(e) trainer TP=1 with 2 shards = engine TP={engine_tp}",
        engine_values(samples),
        trainer.score(shards, sequences),
    )
    if TWO_DEVICES:
        ranks = request.getfixturevalue("two_ranks")
        model = (subject.model_name, subject.dtype, IMPLEMENTATIONS[subject.backend])
        record(
            f"({'d' if engine_tp == 2 else 'e'}) trainer TP=2 = engine TP={engine_tp}",
            engine_values(samples),
            ranks.score(subject.directory, model, sequences),
        )
