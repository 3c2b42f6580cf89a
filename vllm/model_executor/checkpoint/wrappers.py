# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""Modules and tensors under the names they have without torch's wrappers.

Activation checkpointing, `torch.compile` and data parallelism wrap a module in another
one, which adds a part to the names of all that is inside. Checkpoints do not have these
parts, so a model may be wrapped or not. A wrapper is told by its type: a submodule that
a user calls `module` keeps its name.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import nn
from torch._dynamo.eval_frame import OptimizedModule
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import (
    ActivationWrapper,
)
from torch.distributed.fsdp import FullyShardedDataParallel, ShardingStrategy
from torch.nn.parallel import DataParallel, DistributedDataParallel

WRAPPERS: dict[type[nn.Module], str] = {
    ActivationWrapper: "_checkpoint_wrapped_module",
    OptimizedModule: "_orig_mod",
    FullyShardedDataParallel: "_fsdp_wrapped_module",
    DistributedDataParallel: "module",
    DataParallel: "module",
}
"""Where each wrapper keeps the module that it wraps."""


class NamedModule(NamedTuple):
    """A module that is no wrapper.

    Attributes:
        name: its path without wrappers.
        path: its path with them, as `nn.Module.named_modules` gives it.
        module: the module.
    """

    name: str
    path: str
    module: nn.Module


def unwrapped(module: nn.Module) -> nn.Module:
    """The module inside the wrappers that are outermost, if there are any."""
    return next(named_modules(module)).module


def named_modules(root: nn.Module) -> Iterator[NamedModule]:
    """All modules but the wrappers; one that stands in several places, in each.

    Raises:
        ValueError: FullyShardedDataParallel has flattened parameters.
    """
    yield from _walk(NamedModule("", "", root))


def named_tensors(
    root: nn.Module, persistent: bool = True
) -> Iterator[tuple[str, torch.Tensor]]:
    """Parameters and buffers; one that stands in several places, in each.

    Args:
        root: the module.
        persistent: leave out the buffers that are not part of the state dict.
    """
    for name, _, module in named_modules(root):
        for own_name, tensor in own_tensors(module, persistent):
            yield join(name, own_name), tensor


def own_tensors(
    module: nn.Module, persistent: bool = True
) -> Iterator[tuple[str, torch.Tensor]]:
    """The parameters and buffers of a module itself; see `named_tensors`."""
    yield from module.named_parameters(recurse=False)
    for name, buffer in module.named_buffers(recurse=False):
        if not (persistent and name in module._non_persistent_buffers_set):
            yield name, buffer


def names_without_wrappers(root: nn.Module) -> dict[str, str]:
    """The name without wrappers by the name with them, of parameters and buffers."""
    return {
        join(path, own_name): join(name, own_name)
        for name, path, module in named_modules(root)
        for own_name, _ in own_tensors(module, persistent=False)
    }


def join(*names: str) -> str:
    """A path of the parts that are not empty."""
    return ".".join(filter(None, names))


def _walk(place: NamedModule) -> Iterator[NamedModule]:
    name, path, module = place
    for wrapper, attribute in WRAPPERS.items():
        if isinstance(module, wrapper):
            inner = module._modules[attribute]
            assert inner is not None, "a wrapper wraps a module"
            _refuse_flattened(module, inner, name)
            yield from _walk(NamedModule(name, join(path, attribute), inner))
            return
    yield place
    for child_name, child in module._modules.items():
        if child is not None:
            yield from _walk(
                NamedModule(join(name, child_name), join(path, child_name), child)
            )


def _refuse_flattened(wrapper: nn.Module, inner: nn.Module, name: str) -> None:
    """Refuse FSDP1 where it has changed the shapes of parameters."""
    if isinstance(wrapper, FullyShardedDataParallel) and (
        wrapper.sharding_strategy != ShardingStrategy.NO_SHARD
        or "_flat_param" in inner._parameters
    ):
        raise ValueError(
            f"FullyShardedDataParallel (FSDP1) at {name or 'the top'!r} has flattened "
            "the parameters inside, so their shapes and shards are not known. Use "
            "FSDP2, torch.distributed.fsdp.fully_shard, which keeps both."
        )
