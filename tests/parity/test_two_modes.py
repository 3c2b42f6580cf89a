# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""The engine eager against compiled, on CUDA with CUDA graphs."""

import pytest

from tests.parity.prompts import LENGTHS, of_lengths
from tests.parity.subjects import SUBJECTS

COMPILED = [subject for subject in SUBJECTS if not subject.eager]


@pytest.mark.parametrize("subject", COMPILED, indirect=True, ids=str)
def test_eager_and_compiled_engines(subject, record):
    prompts = of_lengths(subject.model_name, LENGTHS, 9)

    def values(**options):
        engine = subject.start(**options)
        samples = engine.sample(prompts, 16, temperature=0)
        return samples, engine.prefill([sample.tokens for sample in samples])

    compiled, compiled_prefill = values()
    eager, eager_prefill = values(enforce_eager=True)
    assert [s.completion for s in compiled] == [s.completion for s in eager]
    record(
        "(g) engine = eager engine, decode",
        [sample.logprobs for sample in compiled],
        [sample.logprobs for sample in eager],
    )
    record("(g) engine = eager engine, prefill", compiled_prefill, eager_prefill)
