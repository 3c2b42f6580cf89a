# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""Files of a checkpoint: killed saves, damaged files and contradictory indexes."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from tests.training.killed import killed_at
from vllm import training
from vllm.model_executor.checkpoint import files as checkpoint_files
from vllm.model_executor.checkpoint.files import INDEX_NAME
from vllm.model_executor.model_loader.weight_utils import (
    filter_duplicate_safetensors_files,
)

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


def in_two_files(directory, listed):
    """`a` and `b` in one file, `c` in another, and an index."""
    save_file({n: torch.zeros(100) for n in "ab"}, directory / "1.safetensors")
    save_file({"c": torch.zeros(100)}, directory / "2.safetensors")
    index = {"weight_map": listed} if isinstance(listed, dict) else listed
    (directory / INDEX_NAME).write_text(json.dumps(index))


FILES = {"a": "1.safetensors", "b": "1.safetensors", "c": "2.safetensors"}


@pytest.mark.parametrize(
    ("listed", "error", "message"),
    [
        (FILES | {"c": "3.safetensors"}, FileNotFoundError, "lists 3.safetensors, wh"),
        (FILES | {"c": "1.safetensors"}, ValueError, r"c is in 1.saf.*no file has it"),
        (FILES | {"b": "2.safetensors"}, ValueError, "b is in 2.saf.*it is in 1.safe"),
        (FILES | {"d": "2.safetensors"}, ValueError, "d is in 2.safet.*no file has it"),
        ({n: FILES[n] for n in "ac"}, ValueError, "b of 1.safeten.* not in the index"),
        (FILES | {"c": "../c"}, ValueError, "must hold an object with a .weight_map"),
        (FILES | {"c": 3}, ValueError, "must hold an object with a .weight_map"),
        (["a"], ValueError, "must hold an object with a .weight_map"),
    ],
)
def test_an_index_that_does_not_fit_its_files(tmp_path, listed, error, message):
    in_two_files(tmp_path, listed)
    module = model(1.0)
    with pytest.raises(error, match=message):
        training.load_checkpoint(module, tmp_path)
    assert all(tensor.eq(1).all() for tensor in module.parameters())
    with pytest.raises(error, match=message):
        checkpoint_files.check_files(tmp_path)


def test_a_tensor_in_two_files(tmp_path):
    in_two_files(tmp_path, FILES)
    save_file({n: torch.zeros(100) for n in "bc"}, tmp_path / "2.safetensors")
    with pytest.raises(ValueError, match="b is in 1.safetensors and in 2.safetensors"):
        training.load_checkpoint(model(1.0), tmp_path)


def test_an_index_leaves_out_other_files(tmp_path):
    """As a save that is killed leaves them."""
    in_two_files(tmp_path, FILES)
    save_file({"a": torch.ones(7)}, tmp_path / "model.safetensors")
    module = model(1.0)
    training.load_checkpoint(module, tmp_path)
    assert all(tensor.eq(0).all() for tensor in module.parameters())


@pytest.mark.parametrize("damage", ["cut", "empty", "pointer", "longer"])
def test_a_damaged_file_is_named(tmp_path, damage):
    training.save_checkpoint(model(1.0), tmp_path)
    file = tmp_path / "model.safetensors"
    whole = file.read_bytes()
    file.write_bytes(
        {
            "cut": whole[:-1],
            "empty": b"",
            "pointer": b"version https://git-lfs.github.com/spec/v1",
            "longer": whole + b"0",
        }[damage]
    )
    message = r"model.safetensors is not a whole file of safetensors \([0-9]+ bytes\)"
    with pytest.raises(ValueError, match=message):
        training.load_checkpoint(model(0.0), tmp_path)
    with pytest.raises(ValueError, match=message):
        checkpoint_files.check_files(tmp_path)


def test_an_index_that_is_no_json(tmp_path):
    in_two_files(tmp_path, FILES)
    (tmp_path / INDEX_NAME).write_text("{")
    with pytest.raises(ValueError, match=f"{INDEX_NAME} is not valid JSON"):
        training.load_checkpoint(model(0.0), tmp_path)


def test_weights_that_are_no_safetensors(tmp_path):
    torch.save(model(1.0).state_dict(), tmp_path / "pytorch_model.bin")
    message = "no model.saf.* but pytorch_model.bin. .* write it with safetensors.torch"
    with pytest.raises(FileNotFoundError, match=message):
        training.load_checkpoint(model(0.0), tmp_path)
