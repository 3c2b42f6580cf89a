# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""Checkpoints of models made of training layers: names, loading, saving.

A checkpoint holds whole tensors under the model's parameter names. A parameter in
which a layer keeps several tensors (q, k and v; gate and up) stands in it as those
tensors if the layer names them, and is accepted whole as well.
"""

import json
import os
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn

from vllm.model_executor import upstream
from vllm.model_executor.layers.training.base import TrainingLayer
from vllm.model_executor.layers.training.batch_invariance import is_batch_invariant
from vllm.model_executor.layers.training.sharding import (
    ParameterSharding,
    ShardPart,
    part_slices,
    take_shard,
)
from vllm.training.files import whole_file
from vllm.training.fingerprint import fingerprint

if TYPE_CHECKING:
    from vllm.config import ModelConfig

WEIGHTS_NAME = "model.safetensors"
INDEX_NAME = "model.safetensors.index.json"


@dataclass(frozen=True)
class CheckpointTensor:
    """One tensor of a checkpoint.

    Attributes:
        parameter: Name of the parameter or buffer that holds it.
        shape: Its full, unsharded shape.
        parts: The parts of the parameter's sharding that it consists of: one, or
            all for a fused parameter as a whole.
        dim: The dimension along which the parts lie; None if not sharded.
    """

    parameter: str
    shape: torch.Size
    parts: tuple[ShardPart, ...]
    dim: int | None

    def pieces(self, tensor: torch.Tensor) -> Iterator[tuple[ShardPart, torch.Tensor]]:
        """`tensor` cut into its parts."""
        if len(self.parts) == 1 or self.dim is None:
            yield self.parts[0], tensor
        else:
            sizes = [part.size for part in self.parts]
            yield from zip(self.parts, tensor.split(sizes, dim=self.dim))


@dataclass(frozen=True)
class LocalShard:
    """What this rank holds of a parameter."""

    sharding: ParameterSharding
    tp_rank: int
    tp_size: int

    def put(self, target: torch.Tensor, tensor: torch.Tensor, part: ShardPart) -> None:
        """Copy this rank's piece of a full part into the local parameter."""
        sharding = self.sharding
        shard = take_shard(tensor, sharding, part, self.tp_rank, self.tp_size)
        if sharding.dim is not None:
            place = part_slices(sharding, self.tp_size)[sharding.parts.index(part)]
            target = target.narrow(sharding.dim, place.start, shard.shape[sharding.dim])
        target.copy_(shard)


@dataclass
class CheckpointLayout:
    """The checkpoint tensors of a module.

    Attributes:
        tensors: What a checkpoint of the module holds, by name.
        fused: Whole fused parameters, accepted in place of their named parts.
        aliases: Other names of tied parameters, with the name of the first: accepted
            in its place.
        shards: What this rank holds of each parameter, by parameter name.
    """

    tensors: dict[str, CheckpointTensor] = field(default_factory=dict)
    fused: dict[str, CheckpointTensor] = field(default_factory=dict)
    aliases: dict[str, str] = field(default_factory=dict)
    shards: dict[str, LocalShard] = field(default_factory=dict)

    @classmethod
    def of(cls, module: nn.Module) -> "CheckpointLayout":
        """The layout of `module`, before it is bound to an engine."""
        layout = cls()
        seen: dict[int, str] = {}
        for path, layer in module.named_modules(remove_duplicate=False):
            prefix = f"{path}." if path else ""
            shardings: Mapping[str, ParameterSharding] = {}
            rank, size = 0, 1
            if isinstance(layer, TrainingLayer):
                shardings = layer.parameter_sharding()
                rank, size = layer.tp_rank, layer.tp_size
            for name, tensor in _own_tensors(layer):
                if id(tensor) in seen:
                    layout.aliases[prefix + name] = seen[id(tensor)]
                    continue
                seen[id(tensor)] = prefix + name
                whole = ParameterSharding.replicated(tensor.shape)
                sharding = shardings.get(name, whole)
                layout.shards[prefix + name] = LocalShard(sharding, rank, size)
                layout._add(prefix, name, sharding)
        return layout

    def _add(self, prefix: str, name: str, sharding: ParameterSharding) -> None:
        parameter = prefix + name
        parts, dim = sharding.parts, sharding.dim
        whole = CheckpointTensor(parameter, sharding.shape, parts, dim)
        if dim is None or any(part.name is None for part in parts):
            self.tensors[parameter] = whole
            return
        self.fused[parameter] = whole
        parent = prefix.rstrip(".").rpartition(".")[0]
        for part in parts:
            shape = list(sharding.shape)
            shape[dim] = part.size
            full_name = ".".join(filter(None, (parent, part.name, name)))
            self.tensors[full_name] = CheckpointTensor(
                parameter, torch.Size(shape), (part,), dim
            )


def _own_tensors(layer: nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    yield from layer.named_parameters(recurse=False)
    for name, buffer in layer.named_buffers(recurse=False):
        if name not in layer._non_persistent_buffers_set:
            yield name, buffer


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
        report = ["The checkpoint does not fit the model."]
        for title, names in (
            ("Missing", missing),
            ("Not in the model", self.extra),
            ("Wrong shape", self.misshapen),
        ):
            if names:
                report.append(f"{title} ({len(names)}): {'; '.join(sorted(names))}.")
        if len(report) > 1:
            raise ValueError(" ".join(report))


def _module_of(parameter: str) -> str:
    return parameter.rpartition(".")[0]


class EngineLoader:
    """`load_weights` of a model whose layers are bound to the engine.

    The first load has to bring every tensor, unless the engine started with dummy
    weights. Later loads, inside vLLM's reloading, may bring whole modules: vLLM
    rebuilds every module it touches from what it is given. A later load that does not
    fit leaves the engine with the weights it had.

    Args:
        model: The bound model.
        layout: The layout from before binding, over all pipeline stages; names are
            the same. Each stage checks all tensors and keeps its own.
        model_config: The engine's; None outside of an engine.
        complete: Whether the first load has to bring every tensor.

    Attributes:
        fingerprints: Of each tensor that was loaded in batch-invariant mode, in its
            parameter's dtype, by its name in the layout; for `vllm.training.parity`.
    """

    def __init__(
        self,
        model: nn.Module,
        layout: CheckpointLayout,
        model_config: "ModelConfig | None",
        complete: bool = True,
    ) -> None:
        self.model = model
        self.layout = layout
        self.model_config = model_config
        self.complete = complete
        self.fingerprints: dict[str, str] = {}
        self._names = {
            (tensor.parameter, tensor.parts[0]): name
            for name, tensor in layout.tensors.items()
        }
        _add_weight_loaders(model, layout)

    def load(self, weights: Iterable[tuple[str, torch.Tensor]]) -> set[str]:
        """Load whole tensors, of which every rank keeps its shard.

        Args:
            weights: Checkpoint names and full tensors, in any order. A later load
                reads all of them before it changes anything.

        Returns:
            The names of the parameters that were loaded.

        Raises:
            ValueError: Names all missing, extra and wrongly shaped tensors.
        """
        check = LayoutCheck(self.layout)
        if self.complete:
            loaded = self._put(check, weights)
            check.finish(check.missing())
            self.complete = False
            return loaded
        weights = list(weights)
        for name, tensor in weights:
            check.match(name, tensor.shape)
        try:
            check.finish(check.missing_beside_found())
        except ValueError:
            self._abandon_reload()
            raise
        return self._put(LayoutCheck(self.layout), weights)

    def never_loaded(self) -> list[str]:
        """Names of this stage's tensors that no load has brought."""
        return [
            name
            for name, tensor in self.layout.tensors.items()
            if tensor.parameter in self.layout.shards and name not in self.fingerprints
        ]

    def _put(
        self, check: LayoutCheck, weights: Iterable[tuple[str, torch.Tensor]]
    ) -> set[str]:
        """Load every tensor that `check` matches."""
        targets: dict[str, torch.Tensor] = {
            **dict(self.model.named_parameters(remove_duplicate=False)),
            **dict(self.model.named_buffers(remove_duplicate=False)),
        }
        tied = defaultdict(list)
        for alias, first in self.layout.aliases.items():
            tied[first].append(alias)
        loaded = set()
        for name, tensor in weights:
            entry = check.match(name, tensor.shape)
            if entry is None:
                continue
            places = {
                id(target): target
                for place in (entry.parameter, *tied[entry.parameter])
                if (target := targets.get(place)) is not None
            }
            if not places:
                continue
            for target in places.values():
                load: Callable[..., None] = getattr(target, "weight_loader", _copy)
                for part, piece in entry.pieces(tensor):
                    shard_id = () if part.shard_id is None else (part.shard_id,)
                    load(target, piece, *shard_id)
            if is_batch_invariant() and entry.parameter in targets:
                self._record(entry, tensor, targets[entry.parameter])
            loaded.add(entry.parameter)
        return loaded

    def _record(
        self, entry: CheckpointTensor, tensor: torch.Tensor, target: torch.Tensor
    ) -> None:
        """Note the fingerprints of what was loaded into a parameter."""
        device = None if target.is_meta else target.device
        named = {entry.parameter: tensor}
        if entry.parameter in self.layout.fused:
            parts = entry.pieces(tensor)
            named = {self._names[entry.parameter, part]: piece for part, piece in parts}
        for name, piece in named.items():
            self.fingerprints[name] = fingerprint(piece.to(target.dtype), device)

    def _abandon_reload(self) -> None:
        """Give the modules back the weights they had before vLLM began to reload."""
        parameters = self.model.parameters()
        if any(parameter.device.type == "meta" for parameter in parameters):
            upstream.finalize_layerwise_reload(self.model, self.model_config)


def _copy(target: torch.Tensor, tensor: torch.Tensor) -> None:
    target.data.copy_(tensor)


def _add_weight_loaders(model: nn.Module, layout: CheckpointLayout) -> None:
    """Give sharded parameters that have no `weight_loader` one that takes the shard."""
    for name, parameter in model.named_parameters():
        shard = layout.shards.get(name)
        if shard is not None and not hasattr(parameter, "weight_loader"):
            cast(Any, parameter).weight_loader = _shard_loader(shard)


def _shard_loader(shard: LocalShard) -> Callable[..., None]:
    parts = {part.shard_id: part for part in shard.sharding.parts}

    # vLLM's reloading replays the call and knows its arguments by these names.
    def load_shard(
        param: torch.Tensor,
        loaded_weight: torch.Tensor,
        loaded_shard_id: str | int | None = None,
    ) -> None:
        shard.put(param.data, loaded_weight, parts[loaded_shard_id])

    return load_shard


def load_checkpoint(module: nn.Module, directory: str | os.PathLike) -> None:
    """Load a model directory's safetensors into a training module.

    Nothing is written to the module unless the whole checkpoint fits.

    Args:
        module: Built with the `ParallelContext` of this process; each rank takes
            its shard.
        directory: Holds `model.safetensors`, or several files and their index.

    Raises:
        FileNotFoundError: There are no safetensors.
        ValueError: Names all missing, extra and wrongly shaped tensors.
    """
    layout = CheckpointLayout.of(module)
    with ExitStack() as stack:
        source: dict[str, Any] = {}
        for path in checkpoint_files(Path(directory)):
            handle = stack.enter_context(safe_open(path, framework="pt"))
            source |= dict.fromkeys(handle.keys(), handle)
        check = LayoutCheck(layout)
        matched = {
            name: check.match(name, handle.get_slice(name).get_shape())
            for name, handle in source.items()
        }
        check.finish(check.missing())
        targets = dict(module.named_parameters()) | dict(module.named_buffers())
        with torch.no_grad():
            for name, entry in matched.items():
                if entry is None:
                    continue
                shard, target = layout.shards[entry.parameter], targets[entry.parameter]
                for part, piece in entry.pieces(source[name].get_tensor(name)):
                    shard.put(target, piece, part)


def checkpoint_files(directory: Path) -> list[Path]:
    """The safetensors files of a model directory."""
    index = directory / INDEX_NAME
    if index.is_file():
        names = json.loads(index.read_text())["weight_map"].values()
        return [directory / name for name in sorted(set(names))]
    single = directory / WEIGHTS_NAME
    if not single.is_file():
        raise FileNotFoundError(
            f"{directory} holds no {WEIGHTS_NAME} and no {INDEX_NAME}."
        )
    return [single]


def checkpoint_tensors(module: nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    """The tensors of a checkpoint of `module`, detached, in the layout's order.

    They can be given to an engine as they are:
    `llm.collective_rpc("reload_weights", kwargs={"weights_iterator": list(...)})`.

    Raises:
        ValueError: The module is sharded over several tensor-parallel ranks.
    """
    layout = CheckpointLayout.of(module)
    tensors = dict(module.named_parameters()) | dict(module.named_buffers())
    for name, entry in layout.tensors.items():
        tensor, shard = (
            tensors[entry.parameter].detach(),
            layout.shards[entry.parameter],
        )
        if shard.tp_size > 1:
            raise ValueError(
                f"{name} is sharded: this rank holds {list(tensor.shape)} of "
                f"{list(entry.shape)}. Saving is supported with tensor_parallel_size=1."
            )
        sharding = shard.sharding
        if sharding.dim is not None:
            index = sharding.parts.index(entry.parts[0])
            start = part_slices(sharding, 1)[index].start
            tensor = tensor.narrow(sharding.dim, start, entry.shape[sharding.dim])
        yield name, tensor


def save_checkpoint(module: nn.Module, directory: str | os.PathLike) -> None:
    """Write `model.safetensors`, whole or not at all.

    Args:
        module: A training module with tensor_parallel_size 1.
        directory: Made if it does not exist.
    """
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    tensors = {
        name: tensor.contiguous().cpu() for name, tensor in checkpoint_tensors(module)
    }
    with whole_file(directory / WEIGHTS_NAME) as path:
        save_file(tensors, path, metadata={"format": "pt"})
