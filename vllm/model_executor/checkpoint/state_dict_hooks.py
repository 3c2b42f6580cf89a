# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""Modules that change what their state dict holds, by hooks or overridden methods.

Checkpoints are read and written by the names and shapes of parameters, a shard at a
time, so hooks on `state_dict()` and `load_state_dict()` are not run. A module whose
hooks rename, split or transform tensors would be loaded wrongly, or not at all, so it
is refused. Hooks of torch itself do nothing of the kind.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import nn

from vllm.model_executor.checkpoint.shards import local_tensor
from vllm.model_executor.checkpoint.wrappers import (
    join,
    named_modules,
    named_tensors,
    names_without_wrappers,
    own_tensors,
)

SAVING = {
    "_state_dict_hooks": "a state_dict hook",
    "_state_dict_pre_hooks": "a state_dict pre-hook",
    "state_dict": "its own state_dict",
    "_save_to_state_dict": "its own _save_to_state_dict",
    "get_extra_state": "get_extra_state",
}
LOADING = {
    "_load_state_dict_pre_hooks": "a load_state_dict pre-hook",
    "_load_from_state_dict": "its own _load_from_state_dict",
}
NOT_TRIED = {"_load_state_dict_post_hooks": "a load_state_dict post-hook"}
OF_THE_ROOT = {"load_state_dict": "its own load_state_dict"}


class Hook(NamedTuple):
    """A hook or an overridden method.

    Attributes:
        name: of its module, without wrappers.
        module: the module.
        attribute: of the module that holds it.
        text: what it is, and where it is defined.
    """

    name: str
    module: nn.Module
    attribute: str
    text: str

    def __str__(self) -> str:
        where = repr(self.name) if self.name else "the top"
        return f"{type(self.module).__name__} at {where} has {self.text}"


def state_dict_hooks(root: nn.Module) -> list[Hook]:
    """All hooks of a module and those in it but torch's and vLLM's."""
    found = []
    for name, _, module in named_modules(root):
        kinds = SAVING | LOADING | NOT_TRIED | ({} if name else OF_THE_ROOT)
        for attribute, kind in kinds.items():
            for function in _functions(module, attribute):
                if _is_foreign(function):
                    text = f"{kind} ({_place(function)})"
                    found.append(Hook(name, module, attribute, text))
    return found


def refuse_changing_hooks(root: nn.Module) -> None:
    """Refuse hooks that change what a state dict holds, or may do so.

    They are tried: `state_dict()` has to give the parameters themselves under their
    names, and loading has to take what stands under these names as it is.

    Raises:
        ValueError: names the modules and their hooks.
    """
    changing = [
        hook
        for hook in state_dict_hooks(root)
        if not (hook.attribute in SAVING and _saves_plainly(hook.module))
        and not (hook.attribute in LOADING and _loads_plainly(hook))
    ]
    if changing:
        raise ValueError(
            f"{'; '.join(map(str, changing[:5]))}. It changes what the state dict "
            "holds, or may do so, and is not run: checkpoints hold parameters under "
            "their own names and as they are, so the model would not be the one that "
            "load_state_dict makes. Remove it in trainer and builder alike, such as by "
            "module._state_dict_hooks.clear() and "
            "module._load_state_dict_pre_hooks.clear(), and write the checkpoint with "
            "vllm.training.save_checkpoint. QKVParallelLinear and "
            "MergedColumnParallelLinear keep a fused weight's parts apart in it, by "
            "part_names=."
        )


def refuse_extra_state(root: nn.Module) -> None:
    """Refuse modules that keep something in a state dict beside their tensors.

    Raises:
        ValueError: names the modules.
    """
    keeping = [
        str(hook)
        for hook in state_dict_hooks(root)
        if hook.attribute == "get_extra_state"
        and hook.module.get_extra_state() is not None
    ]
    if keeping:
        raise ValueError(
            f"{'; '.join(keeping[:5])}. What it gives is not saved: keep it in "
            "buffers, or store it yourself and let get_extra_state return None."
        )


def _functions(module: nn.Module, attribute: str) -> Iterator[Callable]:
    method = getattr(nn.Module, attribute, None)
    if method is None:  # a dict of hooks, which only instances have
        yield from module.__dict__.get(attribute, {}).values()
    elif attribute in module.__dict__:
        yield module.__dict__[attribute]
    elif getattr(type(module), attribute) is not method:
        yield getattr(type(module), attribute)


def _plain(function: Any) -> Any:
    """The function that a partial or a wrapper, such as torch's of hooks, calls."""
    while True:
        if isinstance(function, functools.partial):
            function = function.func
        elif hasattr(function, "__wrapped__"):
            function = function.__wrapped__
        else:
            return function


def _is_foreign(function: Any) -> bool:
    package = str(_plain(function).__module__).partition(".")[0]
    return package not in ("torch", "vllm")


def _place(function: Any) -> str:
    function = _plain(function)
    name = getattr(function, "__qualname__", type(function).__qualname__)
    return f"{function.__module__}.{name}"


@torch.no_grad()
def _saves_plainly(module: nn.Module) -> bool:
    """Whether `state_dict()` gives the module's tensors and nothing else."""
    own = dict(named_tensors(module))
    storages = {name: _storage(tensor) for name, tensor in own.items()}
    versions = {name: tensor._version for name, tensor in own.items()}
    clean = names_without_wrappers(module)
    saved = {
        clean.get(name, name): value
        for name, value in module.state_dict().items()
        if value is not None
    }
    return (
        saved.keys() <= own.keys()
        and all(_storage(value) == storages[name] for name, value in saved.items())
        # A tied tensor may be left out under one of its names.
        and set(storages.values()) == {storages[name] for name in saved}
        and all(tensor._version == versions[name] for name, tensor in own.items())
    )


@torch.no_grad()
def _loads_plainly(hook: Hook) -> bool:
    """Whether loading takes tensors under the module's own names as they are.

    Tried without data: a copy of the module that shares its submodules is given tensors
    on the meta device for its own.
    """
    module = hook.module
    given = {
        join(hook.name, name): torch.empty_like(local_tensor(tensor), device="meta")
        for name, tensor in named_tensors(module)
    }
    state = dict(given)
    problems: tuple[list[str], ...] = ([], [], [])
    try:
        shell = copy.copy(module)
        for kind in ("_parameters", "_buffers"):
            shell.__dict__[kind] = {
                name: tensor if tensor is None else _on_meta(tensor)
                for name, tensor in getattr(module, kind).items()
            }
        prefix = f"{hook.name}." if hook.name else ""
        metadata = {"assign_to_params_buffers": True}
        shell._load_from_state_dict(state, prefix, metadata, True, *problems)
    except Exception:  # of a hook that needs data
        return False
    loaded = {join(hook.name, name): tensor for name, tensor in own_tensors(shell)}
    return (
        not any(problems)
        and all(state.get(name) is tensor for name, tensor in given.items())
        and all(_storage(loaded[n]) == _storage(given[n]) for n in loaded)
        and all(tensor._version == 0 for tensor in given.values())
    )


def _on_meta(tensor: torch.Tensor) -> torch.Tensor:
    meta = torch.empty_like(local_tensor(tensor), device="meta")
    is_parameter = isinstance(tensor, nn.Parameter)
    return nn.Parameter(meta, requires_grad=False) if is_parameter else meta


def _storage(value: Any) -> tuple:
    """Equal for tensors that are the same memory, seen alike."""
    if not isinstance(value, torch.Tensor):
        return (value,)
    tensor = local_tensor(value)
    place = (tensor.storage_offset(), tuple(tensor.stride()), tuple(tensor.shape))
    return (tensor.untyped_storage()._cdata, tensor.dtype, *place)
