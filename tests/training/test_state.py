# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""State of a trainer of one process; `test_distributed.py` has the others."""

import pytest
import torch
from torch import nn

from tests.training.distributed_model import moments, parallelized, train, weights
from tests.training.test_checkpoint_files import killed_at
from vllm import training
from vllm.model_executor.parallel_context import ParallelContext

SINGLE = ParallelContext.single()


def trained(steps=1):
    model, optimizer = parallelized(SINGLE, "plain")
    train(model, optimizer, range(steps), SINGLE)
    return model, optimizer


def content(model, optimizer):
    return weights(model) | moments(model, optimizer)


def assert_loads(directory, expected):
    found = content(*training_loaded(directory))
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in found)


def training_loaded(directory):
    model, optimizer = parallelized(SINGLE, "plain")
    training.load_state(model, optimizer, directory)
    return model, optimizer


def test_killed_anywhere(tmp_path):
    model, optimizer = trained()
    old = content(model, optimizer)
    training.save_state(model, optimizer, tmp_path / "old")
    train(model, optimizer, range(1), SINGLE)
    step, kills, new = 1, 0, tmp_path / "new"
    # A save writes hundreds of pieces: early ones, and each of the last changes.
    count = changes_of_a_save(lambda: training.save_state(model, optimizer, new))
    for step in (1, 2, count // 2, *range(count - 4, count + 1)):
        assert killed_at(
            step, lambda: training.save_state(model, optimizer, tmp_path / "new")
        )
        assert not (tmp_path / "new").exists(), step
        kills += 1
    assert_loads(tmp_path / "old", old)
