# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""Which linear layers a module calls with the same tensor."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

from vllm.model_executor.models.builder.merged_linears import LinearGroup

# Of one forward of a module: each call of a child, with its input. The tensor is kept,
# so that no other has its id; its version tells whether it was changed in place.
_Calls = list[tuple[str, torch.Tensor, int]]


class LinearCalls:
    """Records a forward's calls of linear layers.

    Args:
        module: Whose forward runs.
        contiguous: Leave the layers' results as they are. Otherwise they have the
            strides of columns of a wider matrix, as those of a merged layer.
    """

    def __init__(self, module: nn.Module, contiguous: bool) -> None:
        self.module, self.contiguous = module, contiguous
        # Read here, where no mode takes the reading of `ndim` for a use.
        self.linears = {layer for layer in module.modules() if _is_linear(layer)}
        self.forwards: dict[nn.Module, list[_Calls]] = {}
        self.parameters: dict[int, nn.Module] = {}
        # Layers whose parameters are used by others' code.
        self.used: set[nn.Module] = set()

    def enter(self, module: nn.Module, caller: nn.Module | None, args: Any) -> None:
        """Note that `caller` calls `module` with positional arguments."""
        if module is self.module:
            self.parameters = {
                id(parameter): layer
                for layer in self.linears
                for parameter in layer.parameters()
            }
        self.forwards.setdefault(module, []).append([])
        if caller is None or module not in self.linears:
            return
        calls = self.forwards[caller][-1]
        for name, child in caller._modules.items():
            if child is module:
                x = args[0] if len(args) == 1 else None
                x = x if isinstance(x, torch.Tensor) else torch.empty(0)
                calls.append((name, x, x._version))

    def leave(self, module: nn.Module, output: Any) -> Any:
        """What is to take the place of a module's output; None: nothing."""
        if self.contiguous or module not in self.linears:
            return None
        if not isinstance(output, torch.Tensor) or output.ndim < 2:
            return None
        columns = output.shape[-1]
        return torch.cat((output, output), -1)[..., :columns]

    def use(self, running: nn.Module, args: Iterable[Any]) -> None:
        """Note a function's arguments."""
        for arg in args:
            layer = self.parameters.get(id(arg))
            if layer is not None and layer is not running:
                self.used.add(layer)

    def groups(self) -> dict[nn.Module, list[LinearGroup]]:
        """By module, the children that each of its forwards calls with one tensor."""
        groups = {}
        for module, forwards in self.forwards.items():
            first, *others = [self._groups_of(module, calls) for calls in forwards]
            if first and all(other == first for other in others):
                groups[module] = first
        return groups

    def _groups_of(self, module: nn.Module, calls: _Calls) -> list[LinearGroup]:
        count = Counter(name for name, _, _ in calls)
        by_input: dict[tuple[int, int], list[str]] = {}
        for name, x, version in calls:
            if count[name] == 1 and module._modules[name] not in self.used:
                by_input.setdefault((id(x), version), []).append(name)
        return [
            LinearGroup(tuple(names), self.contiguous)
            for names in by_input.values()
            if len(names) > 1
        ]


def _is_linear(module: nn.Module) -> bool:
    weight = module._parameters.get("weight")
    is_matrix = weight is not None and weight.ndim == 2
    return is_matrix and not isinstance(module, nn.Embedding)
