# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""A model of more than 1B parameters and 256 requests at a time; collected on CUDA."""

from dataclasses import replace

import pytest
import torch

from tests.parity import trainer
from tests.parity.engine import of_completions
from tests.parity.prompts import of_lengths
from tests.parity.subjects import BACKENDS, Subject

REQUESTS = 256
LARGE = [
    Subject("large", "bfloat16", backend, eager)
    for backend in BACKENDS
    for eager in (True, False)
]


@pytest.fixture(scope="module")
def saved(engines, pairs, tmp_path_factory):
    return LARGE[0].made(tmp_path_factory.mktemp("large"), engines, pairs)


@pytest.fixture(params=LARGE, ids=str)
def subject(request, saved):
    return replace(request.param, directory=saved.directory, engine=saved.engine)


@pytest.mark.parametrize("tp_size", [1, 2][: torch.cuda.device_count()])
def test_256_requests(subject, tp_size, record):
    graphs = {"cudagraph_capture_sizes": [*(1 << i for i in range(9))]}
    engine = subject.start(
        tensor_parallel_size=tp_size,
        max_num_seqs=REQUESTS,
        max_num_batched_tokens=4099,
        num_gpu_blocks_override=None,
        kv_cache_memory_bytes=(24 << 30) // tp_size,
        **{} if subject.eager else {"compilation_config": graphs},
    )
    generator = torch.Generator().manual_seed(10)
    lengths = torch.randint(3, 701, (REQUESTS,), generator=generator).tolist()
    prompts = of_lengths("large", lengths, 11)
    samples = engine.sample(prompts, 64)
    engine.stop()
    model = subject.load_trainer(tp_reduction_shards=tp_size)
    assert sum(p.numel() for p in model.parameters()) > 1e9
    scores = trainer.score(model, [sample.tokens for sample in samples])
    record(
        f"(a, b) trainer = {REQUESTS} requests, TP={tp_size}",
        [sample.logprobs for sample in samples],
        of_completions(scores, samples),
    )
