# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""Saves that are killed at any point leave the old checkpoint or the new one."""

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from tests.training.killed import killed_at
from vllm import training
from vllm.model_executor.model_loader.weight_utils import (
    filter_duplicate_safetensors_files,
)
from vllm.training import checkpoint_files
from vllm.training.checkpoint_files import INDEX_NAME

SIZES = {"one": 2**30, "three": 1000}


def model(value):
    """Three tensors of 400 bytes."""
    module = nn.ParameterDict({n: torch.full((100,), value) for n in "abc"})
    return module.requires_grad_(False)


def content(directory):
    """The value that all tensors have, as this project and vLLM find the files."""
    found = []
    files = checkpoint_files.checkpoint_files(directory)
    globbed = [str(path) for path in directory.glob("[!.]*.safetensors")]
    vllms = filter_duplicate_safetensors_files(globbed, directory, INDEX_NAME)
    for names in (files, vllms):
        tensors = {}
        for name in names:
            for key, tensor in load_file(name).items():
                assert key not in tensors, (key, names)
                tensors[key] = tensor
        assert tensors.keys() == set("abc")
        found += [tensor.unique().item() for tensor in tensors.values()]
    (value,) = set(found)
    return value


def save(directory, value, kind):
    training.save_checkpoint(model(value), directory, SIZES[kind] // 2 + 1)


@pytest.mark.parametrize("old", SIZES)
@pytest.mark.parametrize("new", SIZES)
def test_killed_anywhere(tmp_path, old, new):
    step = kills = 0
    values = set()
    while True:
        step += 1
        directory = tmp_path / str(step)
        save(directory, 1.0, old)
        (directory / "tokenizer.json").write_text("{}")
        if not killed_at(step, save, directory, 2.0, new):
            break
        kills += 1
        values.add(content(directory))
        # The next save clears what was left, whatever its form.
        for kind, count in (("three", 4), ("one", 1), ("three", 4)):
            save(directory, 3.0, kind)
            assert content(directory) == 3
            assert_clean(directory, count)
    assert content(directory) == 2
    assert kills >= 2 and values <= {1.0, 2.0} and 1.0 in values
    assert_clean(directory, 1 if new == "one" else 4)


def assert_clean(directory, count):
    names = {path.name for path in directory.iterdir()} - {"tokenizer.json"}
    assert len(names) == count, names
