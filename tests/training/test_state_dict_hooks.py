# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""Hooks that change what a state dict holds are refused, others are not."""

import functools

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import save_file
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import (
    checkpoint_wrapper,
)
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.utils.parametrizations import orthogonal, weight_norm

from vllm import training
from vllm.model_executor.checkpoint.save import checkpoint_tensors
from vllm.model_executor.checkpoint.state_dict_hooks import refuse_changing_hooks


def split(module, state, prefix, metadata):
    for part, tensor in zip("qk", state.pop(prefix + "weight").chunk(2)):
        state[prefix + part] = tensor


def scale(module, state, prefix, metadata):
    state[prefix + "weight"] = state[prefix + "weight"] * 2


def scale_in_place(module, state, prefix, metadata):
    state[prefix + "weight"].mul_(2)


def drop(module, state, prefix, metadata):
    del state[prefix + "bias"]


def merge(module, state, prefix, *rest):
    if prefix + "q" in state:
        parts = [state.pop(prefix + part) for part in "qk"]
        state[prefix + "weight"] = torch.cat(parts)


def permute(module, state, prefix, *rest):
    state[prefix + "weight"] = state[prefix + "weight"].flip(0)


def permute_in_place(module, state, prefix, *rest):
    state[prefix + "weight"].mul_(-1)


def needs_data(module, state, prefix, *rest):
    assert state[prefix + "weight"].sum().item() >= 0


def rename(module, state, prefix, *rest):
    state[prefix + "other"] = state.pop(prefix + "weight")


class Saves(nn.Linear):
    def _save_to_state_dict(self, destination, prefix, keep_vars):
        super()._save_to_state_dict(destination, prefix, keep_vars)
        destination[prefix + "version"] = torch.ones(1)


class StateDict(nn.Linear):
    def state_dict(self, *args, **kwargs):
        state = super().state_dict(*args, **kwargs)
        return {name: tensor.half() for name, tensor in state.items()}


class Loads(nn.Linear):
    def _load_from_state_dict(self, state, prefix, *rest):
        with torch.no_grad():
            self.weight.copy_(state[prefix + "weight"].t())
            self.bias.copy_(state[prefix + "bias"])


class KeepsMore(nn.Linear):
    def get_extra_state(self):
        return {"calls": 3}

    def set_extra_state(self, state):
        pass


CHANGING = {
    "split": lambda m: m._register_state_dict_hook(split),
    "scale": lambda m: m._register_state_dict_hook(scale),
    "scale in place": lambda m: m._register_state_dict_hook(scale_in_place),
    "drop": lambda m: m.register_state_dict_post_hook(drop),
    "permute": lambda m: m.register_load_state_dict_pre_hook(permute),
    "permute_in_place": lambda m: m._register_load_state_dict_pre_hook(
        functools.partial(permute_in_place, m)
    ),
    "needs_data": lambda m: m.register_load_state_dict_pre_hook(needs_data),
    "rename": lambda m: m.register_load_state_dict_pre_hook(rename),
    "post": lambda m: m.register_load_state_dict_post_hook(lambda *given: None),
    "Saves": Saves,
    "StateDict": StateDict,
    "Loads": Loads,
    "KeepsMore": KeepsMore,
}


def model_with(change):
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    if isinstance(change, type):
        model[1] = change(4, 4)
    else:
        change(model[1])
    return model


@pytest.mark.parametrize("name", CHANGING)
def test_what_changes_a_state_dict_is_refused_by_name(tmp_path, name):
    model = model_with(CHANGING[name])
    before = [parameter.clone() for parameter in model.parameters()]
    kind = type(model[1]).__name__
    message = (
        rf"{kind} at '1' has .*state.*\(tests\.?.*test_state_dict_hooks\..*not run"
    )
    plain = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    training.save_checkpoint(plain, tmp_path)
    for call in (
        lambda: training.load_checkpoint(model, tmp_path),
        lambda: training.save_checkpoint(model, tmp_path / "new"),
        lambda: list(checkpoint_tensors(model)),
    ):
        with pytest.raises(ValueError, match=message):
            call()
    changed = name == "scale in place"  # by each call of state_dict()
    assert all(map(torch.equal, before, model.parameters())) is not changed


class Legacy(nn.Linear):
    def _load_from_state_dict(self, state, prefix, *rest):
        if prefix + "kernel" in state:
            state[prefix + "weight"] = state.pop(prefix + "kernel").t()
        super()._load_from_state_dict(state, prefix, *rest)


class NoExtraState(nn.Linear):
    def __init__(self, *sizes):
        super().__init__(*sizes)
        self._register_load_state_dict_pre_hook(
            lambda state, prefix, *rest: state.setdefault(f"{prefix}_extra_state")
        )

    def get_extra_state(self):
        return None

    def set_extra_state(self, state):
        pass


class Tied(nn.Linear):
    """Leaves the second name of one parameter out."""

    def __init__(self, *sizes):
        super().__init__(*sizes)
        self.other = nn.Linear(*sizes, bias=False)
        self.other.weight = self.weight
        self._register_state_dict_hook(Tied.leave_out)

    @staticmethod
    def leave_out(module, state, prefix, metadata):
        del state[f"{prefix}other.weight"]


@pytest.mark.parametrize(
    "change",
    [
        Legacy,
        NoExtraState,
        Tied,
        lambda m: m.register_load_state_dict_pre_hook(merge),
        lambda m: m.register_load_state_dict_pre_hook(lambda *given: None),
        weight_norm,
        orthogonal,
    ],
)
def test_what_leaves_it_as_it_is_is_not_refused(tmp_path, change):
    model, other = model_with(change), model_with(change)
    training.save_checkpoint(model, tmp_path)
    training.load_checkpoint(other, tmp_path)
    assert all(map(torch.equal, model.parameters(), other.parameters()))


def test_torchs_own_wrappers_are_not_refused():
    dist.init_process_group("gloo", rank=0, world_size=1, store=dist.HashStore())
    try:
        model = model_with(Legacy)
        model[0] = torch.compile(checkpoint_wrapper(model[0]))
        model[1] = checkpoint_wrapper(model[1])
        mesh = init_device_mesh("cpu", (1,), mesh_dim_names=("dp",))
        fully_shard(model[1], mesh=mesh)
        fully_shard(model, mesh=mesh)
        refuse_changing_hooks(model)
        model[1]._checkpoint_wrapped_module._register_state_dict_hook(split)
        with pytest.raises(ValueError, match="Legacy at '1' has a state_dict hook"):
            refuse_changing_hooks(model)
    finally:
        dist.destroy_process_group()


def test_a_checkpoint_that_a_hook_would_mend(tmp_path):
    """The error says that it is not run."""
    model = model_with(lambda m: m.register_load_state_dict_pre_hook(merge))
    tensors = {name: t.clone() for name, t in model.state_dict().items()}
    weight = tensors.pop("1.weight")
    tensors |= {f"1.{n}": t.clone() for n, t in zip("qk", weight.chunk(2))}
    save_file(tensors, tmp_path / "model.safetensors")
    message = (
        r"Hooks on .* are not run: Linear at '1' has a load.* pre-hook .*\.merge\)"
    )
    with pytest.raises(ValueError, match=message):
        training.load_checkpoint(model, tmp_path)


def test_a_states_extra_state_is_refused(tmp_path):
    model = model_with(KeepsMore)
    optimizer = torch.optim.SGD(model.parameters())
    with pytest.raises(ValueError, match="KeepsMore at '1' has get_extra_state"):
        training.save_state(model, optimizer, tmp_path / "state")
    model = model_with(CHANGING["split"])  # weights are stored as they are
    optimizer = torch.optim.SGD(model.parameters())
    training.save_state(model, optimizer, tmp_path / "state")
    other = model_with(CHANGING["split"])
    optimizer = torch.optim.SGD(other.parameters())
    training.load_state(other, optimizer, tmp_path / "state")
    assert all(map(torch.equal, model.parameters(), other.parameters()))


def test_the_roots_own_load_state_dict_is_refused():
    class Model(nn.Linear):
        def load_state_dict(self, state, *args, **kwargs):
            return super().load_state_dict({"weight": -state["weight"]}, *args)

    refuse_changing_hooks(nn.Sequential(Model(2, 2)))  # torch does not call it there
    with pytest.raises(
        ValueError, match="Model at the top has its own load_state_dict"
    ):
        refuse_changing_hooks(Model(2, 2))
