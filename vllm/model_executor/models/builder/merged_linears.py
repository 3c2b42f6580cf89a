# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""Linear layers of one input as one product in the engine.

A model that is adopted has a layer each for queries, keys and values, and for gate and
up. A step of few tokens takes as long as reading the weights, and one large product
reads them faster than several small ones. So the engine multiplies by all of them at
once. The first of the layers that is called computes the product; each returns its
columns. The layers' places, and the names of a checkpoint's tensors, stay.

vLLM's Transformers backend merges such layers by rewriting the source of a class, for
one group of a class and a source that it can parse. Here the model's code runs as it
is, so no code is out of reach, and what was called with another input than when the
model was adopted is refused.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from itertools import accumulate
from typing import Any, NamedTuple

import torch
from torch import nn

from vllm.model_executor.layers.training import (
    ColumnParallelLinear,
    LatentKVLinear,
    MergedColumnParallelLinear,
)
from vllm.model_executor.layers.training.base import runs_own_forward, skip_init

_GROUPS = "linears_of_one_input"
_MERGED = (ColumnParallelLinear, LatentKVLinear)


class LinearGroup(NamedTuple):
    """Children of one module that are called with the same tensor.

    Attributes:
        names: The children's, in the order of their calls.
        contiguous: The module's code needs results that are contiguous.
    """

    names: tuple[str, ...]
    contiguous: bool = False

    @property
    def merged_name(self) -> str:
        """The child that computes the product."""
        return "_".join(self.names)


def may_merge(owner: nn.Module, names: Sequence[str]) -> bool:
    """Whether some children of a module can be one linear layer."""
    layers = [owner._modules.get(name) for name in names]
    kinds = []
    for layer in layers:
        if not isinstance(layer, ColumnParallelLinear):
            return False
        if type(layer) not in _MERGED or runs_own_forward(layer):
            return False
        # Gathered outputs would not be in the order of the layers.
        if (layer.gather_output and layer.tp_size > 1) or layer.return_bias:
            return False
        kinds.append(
            (
                layer.input_size,
                layer.has_bias,
                layer.weight.dtype,
                layer.sequence_parallel,
                layer.parallel_context,
            )
        )
    return (
        all(kind == kinds[0] for kind in kinds)
        and len(set(map(id, layers))) == len(layers) > 1
        and not hasattr(owner, LinearGroup(tuple(names)).merged_name)
    )


def declare(owner: nn.Module, groups: Iterable[LinearGroup]) -> None:
    """Note which children of a module the engine may merge."""
    vars(owner)[_GROUPS] = tuple(groups)


def merge_linears(module: nn.Module) -> None:
    """Merge what has been declared, in place, before the engine binds its layers.

    The merged layer is a `MergedColumnParallelLinear` whose parts are named after the
    layers, so a checkpoint's tensors are loaded into it as into any such layer. It is
    not initialised.

    Args:
        module: Built inside an engine process.
    """
    places = Counter(id(p) for _, p in module.named_parameters(remove_duplicate=False))
    for owner in list(module.modules()):
        for group in vars(owner).get(_GROUPS, ()):
            if may_merge(owner, group.names) and all(
                places[id(parameter)] == 1
                for name in group.names
                for parameter in owner.get_submodule(name).parameters()
            ):
                _merge(owner, group)


def _merge(owner: nn.Module, group: LinearGroup) -> None:
    layers: list[Any] = [owner.get_submodule(name) for name in group.names]
    first = layers[0]
    with skip_init(), first.weight.device:
        merged = MergedColumnParallelLinear(
            first.input_size,
            [layer.output_size for layer in layers],
            first.has_bias,
            part_names=group.names,
            params_dtype=first.weight.dtype,
            sequence_parallel=first.sequence_parallel,
            parallel_context=first.parallel_context,
        )
    product = _Product(owner, group, merged.output_partition_sizes)
    for index, name in enumerate(group.names):
        setattr(owner, name, LinearSlice(product, index))
    owner.add_module(group.merged_name, merged)


class _Product:
    """The merged layer's output, until each layer has returned its columns.

    Args:
        owner: Has the merged layer.
        group: The layers.
        sizes: Their output features on this rank.
    """

    def __init__(
        self, owner: nn.Module, group: LinearGroup, sizes: Sequence[int]
    ) -> None:
        self.owner, self.group, self.sizes = owner, group, list(sizes)
        self.x: torch.Tensor | None = None
        self.left: tuple[torch.Tensor, ...] = ()

    def take(self, index: int, x: torch.Tensor) -> torch.Tensor:
        """The columns of one layer, shape = [..., sizes[index]]."""
        if index == 0:
            merged = getattr(self.owner, self.group.merged_name)
            self.x, self.left = x, self._columns(merged(x))
        elif x is not self.x or len(self.left) != len(self.sizes) - index:
            names = self.group.names
            raise RuntimeError(
                f"{type(self.owner).__name__}.{names[index]} was called out of turn or "
                f"with another tensor than {names[0]}. When the model was adopted, "
                f"{', '.join(names)} were called in this order with one tensor, so the "
                "engine computes them as one product. Each forward has to make the "
                "same calls."
            )
        output, self.left = self.left[0], self.left[1:]
        if not self.left:
            self.x = None
        return output.contiguous() if self.group.contiguous else output

    def _columns(self, output: torch.Tensor) -> tuple[torch.Tensor, ...]:
        # torch caches no compiled graph with a call of `Tensor.split`, which is Python.
        starts = accumulate(self.sizes, initial=0)
        return tuple(output.narrow(-1, *each) for each in zip(starts, self.sizes))


class LinearSlice(nn.Module):
    """Stands in the place of a linear layer that is part of a merged one."""

    def __init__(self, product: _Product, index: int) -> None:
        super().__init__()
        self.product, self.index = product, index

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.product.take(self.index, x)
