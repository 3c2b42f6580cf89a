# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""Random models in random engines; collected on CPU, whose kernels take all of them."""

import pytest

from tests.parity import trainer
from tests.parity.engine import of_completions
from tests.parity.prompts import of_lengths
from tests.parity.random_models import draw_engine
from tests.parity.subjects import RANDOM

LENGTHS = (1, 2, 9, 33, 64, 100, 251)


@pytest.mark.parametrize("subject", RANDOM, indirect=True, ids=str)
def test_random_model(subject, record):
    """Prefill in chunks, then decoding from what the prefix cache has kept of it."""
    seed = int(subject.model_name.partition("-")[2])
    engine = subject.start(**draw_engine(seed))
    prompts = of_lengths(subject.model_name, LENGTHS, seed)
    prefilled = engine.prefill(prompts)
    samples = engine.sample(prompts, 16)
    model = subject.trainer
    decoded = trainer.score(model, [sample.tokens for sample in samples])
    record(
        "(a, b, c) a random model in a random engine",
        prefilled + [sample.logprobs for sample in samples],
        trainer.score(model, prompts) + of_completions(decoded, samples),
    )
