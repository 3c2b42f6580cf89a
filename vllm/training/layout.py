# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""How a model's parameters and a checkpoint's tensors correspond.

A checkpoint holds whole tensors under the model's parameter names. A parameter in
which a layer keeps several tensors (q, k and v; gate and up) stands in it as those
tensors if the layer names them, and is accepted whole as well.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field

import torch
from torch import nn
from torch.distributed.fsdp import FSDPModule
from torch.nn.parallel import DistributedDataParallel

from vllm.model_executor.layers.training.sharding import ParameterSharding, ShardPart
from vllm.training.declared_sharding import DeclaredSharding, declared_shardings
from vllm.training.shards import PartName, ShardedParameter, shard_parameter


@dataclass(frozen=True)
class CheckpointTensor:
    """One tensor of a checkpoint.

    Attributes:
        parameter: Name of the parameter or buffer that holds it.
        shape: Its full, unsharded shape.
        parts: The parts of the parameter's sharding that it consists of: one, or
            all for a fused parameter as a whole.
        dim: The dimension along which the parts lie; None if not sharded.
        origin: Where the tensor begins in the parameter, along `dim`.
    """

    parameter: str
    shape: torch.Size
    parts: tuple[ShardPart, ...]
    dim: int | None
    origin: int = 0

    def pieces(self, tensor: torch.Tensor) -> Iterator[tuple[ShardPart, torch.Tensor]]:
        """`tensor` cut into its parts."""
        if len(self.parts) == 1 or self.dim is None:
            yield self.parts[0], tensor
        else:
            sizes = [part.size for part in self.parts]
            yield from zip(self.parts, tensor.split(sizes, dim=self.dim))


@dataclass
class CheckpointLayout:
    """The checkpoint tensors of a module.

    Attributes:
        tensors: What a checkpoint of the module holds, by name.
        fused: Whole fused parameters, accepted in place of their named parts.
        aliases: Other names of tied parameters, with the name of the first: accepted
            in its place.
        parameters: What this rank holds of each parameter and persistent buffer, by
            name.
    """

    tensors: dict[str, CheckpointTensor] = field(default_factory=dict)
    fused: dict[str, CheckpointTensor] = field(default_factory=dict)
    aliases: dict[str, str] = field(default_factory=dict)
    parameters: dict[str, ShardedParameter] = field(default_factory=dict)

    @classmethod
    def of(cls, module: nn.Module) -> CheckpointLayout:
        """The layout of `module`, before it is bound to an engine.

        What FSDP2 has gathered for a computation is freed, as the sharded parameters
        are those that stay.
        """
        for layer in module.modules():
            if isinstance(layer, FSDPModule):
                layer.reshard()
        layout = cls()
        seen: dict[int, str] = {}
        declared = declared_shardings(module)
        for path, layer in module.named_modules(remove_duplicate=False):
            prefix = f"{path}." if path else ""
            for name, tensor in _own_tensors(layer):
                full_name = prefix + name
                if id(tensor) in seen:
                    layout.aliases[full_name] = seen[id(tensor)]
                    continue
                seen[id(tensor)] = full_name
                sharding, rank, size = declared.get(full_name) or DeclaredSharding(
                    ParameterSharding.replicated(tensor.shape), 0, 1
                )
                stored = layout._add(prefix, name, sharding)
                layout.parameters[full_name] = shard_parameter(
                    full_name, tensor, sharding, stored, rank, size
                )
        return layout

    def _add(
        self, prefix: str, name: str, sharding: ParameterSharding
    ) -> list[PartName]:
        """Name the tensors of a parameter; returns where each part is stored."""
        parameter = prefix + name
        parts, dim = sharding.parts, sharding.dim
        whole = CheckpointTensor(parameter, sharding.shape, parts, dim)
        if dim is None or any(part.name is None for part in parts):
            self.tensors[parameter] = whole
            return [PartName(parameter, tuple(sharding.shape), 0) for _ in parts]
        self.fused[parameter] = whole
        parent = prefix.rstrip(".").rpartition(".")[0]
        stored, origin = [], 0
        for part in parts:
            shape = list(sharding.shape)
            shape[dim] = part.size
            full_name = ".".join(filter(None, (parent, part.name, name)))
            self.tensors[full_name] = CheckpointTensor(
                parameter, torch.Size(shape), (part,), dim, origin
            )
            stored.append(PartName(full_name, tuple(shape), origin))
            origin += part.size
        return stored


def _own_tensors(layer: nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    yield from layer.named_parameters(recurse=False)
    for name, buffer in layer.named_buffers(recurse=False):
        if name not in layer._non_persistent_buffers_set:
            yield name, buffer


def unwrapped(module: nn.Module) -> nn.Module:
    """The module that is trained, out of DistributedDataParallel."""
    return module.module if isinstance(module, DistributedDataParallel) else module


def tensors_of(module: nn.Module) -> dict[str, torch.Tensor]:
    """The parameters and buffers of a module by the names that a layout has."""
    return dict(module.named_parameters()) | dict(module.named_buffers())


class LayoutCheck:
    """Compares the tensors of a checkpoint with a layout, all of them."""

    def __init__(self, layout: CheckpointLayout) -> None:
        self.layout = layout
        self.found: set[str] = set()
        self.extra: list[str] = []
        self.misshapen: list[str] = []

    def match(self, name: str, shape: Iterable[int]) -> CheckpointTensor | None:
        """The layout's tensor of that name; None if it is not to be loaded."""
        layout = self.layout
        known = layout.aliases.get(name, name)
        tensor = layout.tensors.get(known) or layout.fused.get(known)
        if tensor is None:
            self.extra.append(name)
            return None
        if name in layout.aliases and known in self.found:
            return None
        self.found.add(known)
        if tuple(shape) != tuple(tensor.shape):
            self.misshapen.append(
                f"{name} is {list(shape)}, the model needs {list(tensor.shape)}"
            )
            return None
        return tensor

    def missing(self) -> list[str]:
        """Tensors of the layout that have not been matched."""
        return [
            name
            for name, tensor in self.layout.tensors.items()
            if name not in self.found and tensor.parameter not in self.found
        ]

    def missing_beside_found(self) -> list[str]:
        """Those of `missing` whose module has been matched in part."""
        tensors = self.layout.tensors | self.layout.fused
        touched = {_module_of(tensors[name].parameter) for name in self.found}
        return [
            n for n in self.missing() if _module_of(tensors[n].parameter) in touched
        ]

    def finish(self, missing: list[str]) -> None:
        """Report everything that is wrong.

        Args:
            missing: Names whose absence is an error.

        Raises:
            ValueError: Names every missing, extra and wrongly shaped tensor.
        """
        refuse_misfit(
            {
                "Missing": missing,
                "Not in the model": self.extra,
                "Wrong shape": self.misshapen,
            }
        )


def refuse_misfit(problems: Mapping[str, Iterable[str]]) -> None:
    """Report everything that is wrong with a checkpoint, if anything is.

    Args:
        problems: the names that are concerned, by what is wrong with them.

    Raises:
        ValueError: Names all of them.
    """
    report = ["The checkpoint does not fit the model."]
    for title, found in problems.items():
        names = sorted(found)
        if names:
            report.append(f"{title} ({len(names)}): {'; '.join(names)}.")
    if len(report) > 1:
        raise ValueError(" ".join(report))


def _module_of(parameter: str) -> str:
    return parameter.rpartition(".")[0]
