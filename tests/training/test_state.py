# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""State of a trainer of one process; `test_distributed.py` has the others."""

import shutil

import numpy as np
import pytest
import torch
from torch import nn

from tests.training.killed import killed_at
from vllm import training


def trained(value, optimizer=torch.optim.AdamW, **options):
    """A model whose weights and moments depend on `value`, after a step."""
    model = nn.Linear(3, 2)
    nn.init.constant_(model.weight, value)
    optimizer = optimizer(model.parameters(), lr=0.5, **options)
    model(torch.full((3,), value)).sum().backward()
    optimizer.step()
    return model, optimizer


def assert_resumes(directory, model, optimizer):
    """A new trainer continues as the saved one."""
    other, other_optimizer = trained(9.0, type(optimizer))
    training.load_state(other, other_optimizer, directory)
    assert_equal(other_optimizer.state_dict(), optimizer.state_dict())
    for trainer in ((model, optimizer), (other, other_optimizer)):
        trainer[1].zero_grad()
        trainer[0](torch.ones(3)).sum().backward()
        trainer[1].step()
    assert torch.equal(model.weight, other.weight)


def assert_equal(found, expected):
    if isinstance(expected, torch.Tensor):
        assert torch.equal(found, expected)
    elif isinstance(expected, dict):
        assert found.keys() == expected.keys()
        for key, value in expected.items():
            assert_equal(found[key], value)
    else:
        assert found == expected


@pytest.mark.parametrize(
    ("optimizer", "options"),
    [
        (torch.optim.AdamW, {"betas": (0.8, 0.9), "weight_decay": 0.3}),
        (torch.optim.AdamW, {"amsgrad": True, "maximize": True}),
        (torch.optim.SGD, {}),
        (torch.optim.SGD, {"momentum": 0.5}),
        (torch.optim.Adagrad, {}),
    ],
)
def test_optimizers(tmp_path, optimizer, options):
    trainer = trained(2.0, optimizer, **options)
    training.save_state(*trainer, tmp_path / "state")
    assert_resumes(tmp_path / "state", *trainer)


def test_parameters_that_have_no_state_yet(tmp_path):
    model = nn.ModuleList([nn.Linear(2, 2), nn.Linear(2, 2)])
    model[1].bias.requires_grad_(False)
    optimizer = torch.optim.AdamW(model.parameters())
    model[0](torch.ones(2)).sum().backward()
    optimizer.step()
    training.save_state(model, optimizer, tmp_path / "state")
    other = torch.optim.AdamW(model.parameters())
    training.load_state(model, other, tmp_path / "state")
    assert_equal(other.state_dict(), optimizer.state_dict())
    assert len(other.state) == 2


def test_groups_keep_their_hyperparameters(tmp_path):
    model = nn.Linear(2, 2)

    def groups(*lrs):
        given = zip((model.weight, model.bias), lrs)
        return torch.optim.SGD([{"params": [p], "lr": lr} for p, lr in given])

    training.save_state(model, groups(0.1, 0.2), tmp_path / "state")
    other = groups(1.0, 1.0)
    training.load_state(model, other, tmp_path / "state")
    assert [group["lr"] for group in other.param_groups] == [0.1, 0.2]
    together = torch.optim.SGD(model.parameters(), lr=1.0)
    with pytest.raises(ValueError, match=r"unlike the first of its group \(1\): bias"):
        training.load_state(model, together, tmp_path / "state")


def test_everything_that_does_not_fit_is_named(tmp_path):
    training.save_state(*trained(1.0), tmp_path / "state")
    model = nn.Linear(4, 2, bias=False)
    model.extra = nn.Parameter(torch.zeros(1))
    before = model.weight.clone()
    optimizer = torch.optim.AdamW([model.weight, model.extra])
    with pytest.raises(ValueError) as error:
        training.load_state(model, optimizer, tmp_path / "state")
    needs = "weight is [2, 3], the model needs [2, 4]"
    assert str(error.value) == (
        "The checkpoint does not fit the model. Wrong shape (3): "
        f"model.{needs}; optimizer.exp_avg.{needs}; optimizer.exp_avg_sq.{needs}. "
        "Missing (1): model.extra. "
        "Not trained when it was saved (1): extra. Not in the model (1): model.bias. "
        "Not in the optimizer (1): bias."
    )
    assert torch.equal(model.weight, before) and not optimizer.state


def test_what_is_tied_and_was_not_is_refused(tmp_path):
    """By name, also where the two are equal: their moments are not."""
    model = nn.ModuleDict({"a": nn.Linear(2, 2), "b": nn.Linear(2, 2)})
    optimizer = torch.optim.SGD(model.parameters())
    training.save_state(model, optimizer, tmp_path / "state")
    model["b"].weight = model["a"].weight
    optimizer = torch.optim.SGD(model.parameters())
    with pytest.raises(ValueError, match="Tied .*: model.b.weight and model.a.weight"):
        training.load_state(model, optimizer, tmp_path / "state")


def test_state_of_other_shapes_is_refused(tmp_path):
    trainer = trained(1.0, torch.optim.Adafactor)
    with pytest.raises(ValueError, match=r"Adafactor keeps row_var of shape \[2, 1\]"):
        training.save_state(*trainer, tmp_path / "state")
    assert not list(tmp_path.iterdir())


def test_state_that_is_no_number_is_refused(tmp_path):
    model, optimizer = trained(1.0)
    optimizer.state[model.weight]["factors"] = [torch.zeros(2)]
    with pytest.raises(ValueError, match="AdamW keeps factors, a list, for weight of"):
        training.save_state(model, optimizer, tmp_path / "state")
    assert not list(tmp_path.iterdir())


def test_hyperparameters_of_numpy(tmp_path):
    model, optimizer = trained(1.0)
    optimizer.param_groups[0]["lr"] = np.float64(0.125)
    training.save_state(model, optimizer, tmp_path / "state")
    training.load_state(model, optimizer, tmp_path / "state")
    assert optimizer.param_groups[0]["lr"] == 0.125


def test_state_keeps_its_dtype(tmp_path):
    """Of fp32 moments of bf16 parameters all bits come back."""
    (model, optimizer), (other, other_optimizer) = trained(1.0), trained(2.0)
    for part, its_optimizer in ((model, optimizer), (other, other_optimizer)):
        part.bfloat16()
        for state in its_optimizer.state.values():
            state["exp_avg"] += 1 / 3
    training.save_state(model, optimizer, tmp_path / "state")
    training.load_state(other, other_optimizer, tmp_path / "state")
    found = other_optimizer.state[other.weight]["exp_avg"]
    assert found.dtype == torch.float32
    assert torch.equal(found, optimizer.state[model.weight]["exp_avg"])


def test_killed_anywhere(tmp_path):
    """The save before it stays, and the killed one is not there or is complete."""
    old, new = trained(1.0), trained(2.0)
    training.save_state(*old, tmp_path / "old")
    unfinished, refused = tmp_path / ".new.unfinished", 0
    step = 1
    while killed_at(step, training.save_state, *new, tmp_path / "new"):
        assert not (tmp_path / "new").exists()
        # What is written last but for the directory's name.
        if not (unfinished / "optimizer.pt").exists():
            with pytest.raises(FileNotFoundError, match="not a complete training st"):
                training.load_state(*old, unfinished)
            refused += 1
        step += 1
    # Six tensors, DCP's index and the record were to come.
    assert refused >= 8 and refused < step - 1
    assert {path.name for path in tmp_path.iterdir()} == {"old", "new"}
    assert_resumes(tmp_path / "old", *old)
    assert_resumes(tmp_path / "new", *new)


def test_half_of_a_directory_is_refused(tmp_path):
    trainer = trained(1.0)
    training.save_state(*trainer, tmp_path / "state")
    files = [path.name for path in (tmp_path / "state").iterdir()]
    assert len(files) == 3
    for name in files:
        broken = tmp_path / f"without-{name}"
        shutil.copytree(tmp_path / "state", broken)
        (broken / name).unlink()
        with pytest.raises(FileNotFoundError, match=f"complete.*{name}"):
            training.load_state(*trainer, broken)
    with (broken / name).open("wb") as file:
        file.write(b"half")
    with pytest.raises(FileNotFoundError, match=f"{name} has 4 of [0-9]+ bytes"):
        training.load_state(*trainer, broken)


def test_every_save_has_a_directory_of_its_own(tmp_path):
    trainer = trained(1.0)
    training.save_state(*trainer, tmp_path / "deep" / "state")
    with pytest.raises(FileExistsError, match="Give each save a directory of its own"):
        training.save_state(*trainer, tmp_path / "deep" / "state")
