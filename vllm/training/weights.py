# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""Weights of models made of training layers: sharding, loading, saving."""

import os
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from safetensors import safe_open
from torch import nn

from vllm.model_executor import upstream
from vllm.model_executor.layers.training.batch_invariance import is_batch_invariant
from vllm.training.checkpoint_files import CheckpointWriter, checkpoint_files
from vllm.training.fingerprint import fingerprint
from vllm.training.gather import Gatherer, GatherPlan
from vllm.training.layout import (
    CheckpointLayout,
    CheckpointTensor,
    LayoutCheck,
    tensors_of,
    unwrapped,
)
from vllm.training.ranks import on_rank_0
from vllm.training.shards import ShardedParameter, held

if TYPE_CHECKING:
    from vllm.config import ModelConfig


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
            if tensor.parameter in self.layout.parameters
            and name not in self.fingerprints
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
        sharded = layout.parameters.get(name)
        if sharded is not None and not hasattr(parameter, "weight_loader"):
            cast(Any, parameter).weight_loader = _shard_loader(sharded)


def _shard_loader(sharded: ShardedParameter) -> Callable[..., None]:
    shards = {shard.part: shard for shard in sharded.shards}

    # vLLM's reloading replays the call and knows its arguments by these names.
    def load_shard(
        param: torch.Tensor,
        loaded_weight: torch.Tensor,
        loaded_shard_id: str | int | None = None,
    ) -> None:
        shard = shards[loaded_shard_id]
        piece = loaded_weight[sharded.source(shard, shard.part_start)]
        sharded.put(held(param.data), shard, piece)

    return load_shard


def sharding(model: nn.Module) -> dict[str, ShardedParameter]:
    """How every parameter and persistent buffer of a model is sharded.

    Args:
        model: a trainer's model, built with the `ParallelContext` of this process, also
            under DistributedDataParallel or FSDP2. An engine is asked by
            `llm.collective_rpc("call_training", args=("sharding",))`.

    Returns:
        What this rank holds, by parameter name. Tied parameters stand under the first
        of their names.
    """
    return CheckpointLayout.of(unwrapped(model)).parameters


def load_checkpoint(module: nn.Module, directory: str | os.PathLike) -> None:
    """Load a model directory's safetensors into a training module.

    Each rank reads its pieces alone. Nothing is written to the module unless the whole
    checkpoint fits.

    Args:
        module: Built with the `ParallelContext` of this process, also under
            DistributedDataParallel or FSDP2.
        directory: Holds `model.safetensors`, or several files and their index.

    Raises:
        FileNotFoundError: There are no safetensors.
        ValueError: Names all missing, extra and wrongly shaped tensors.
    """
    module = unwrapped(module)
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
        targets = tensors_of(module)
        for name, entry in matched.items():
            if entry is None:
                continue
            sharded = layout.parameters[entry.parameter]
            target = held(targets[entry.parameter])
            parts = {part.shard_id for part in entry.parts}
            for shard in sharded.shards:
                if shard.part in parts:
                    box = sharded.source(shard, entry.origin)
                    sharded.put(target, shard, _read(source[name], name, box))


def _read(file: Any, name: str, box: tuple[slice, ...]) -> torch.Tensor:
    """A box of a tensor in a safetensors file; a file has no boxes of a scalar."""
    return file.get_slice(name)[box] if box else file.get_tensor(name)


def checkpoint_tensors(module: nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    """The whole tensors of a checkpoint of `module`, detached, on every rank.

    They can be given to an engine as they are:
    `llm.collective_rpc("reload_weights", kwargs={"weights_iterator": list(...)})`.

    The processes of a job that shards the module iterate together, to the end: pieces
    are gathered, one tensor at a time. Of a module that is not sharded each process has
    the tensors alone.

    Raises:
        RuntimeError: The processes together do not hold the module.
    """
    gatherer = Gatherer(unwrapped(module), alone=True)
    for name in gatherer.plans:
        yield name, gatherer.gather(name)


def save_checkpoint(
    module: nn.Module,
    directory: str | os.PathLike,
    max_shard_size: int = 5 * 2**30,
) -> None:
    """Write a module's tensors as one checkpoint of safetensors, whole or not at all.

    Where there are several processes all of them call it, and it returns when the
    checkpoint is written. Rank 0 writes; it holds one file's tensors at a time, the
    others one tensor. The old checkpoint stays until the new one is complete.

    Args:
        module: A training module, sharded or not, also under DistributedDataParallel
            or FSDP2.
        directory: Made if it does not exist.
        max_shard_size: Size of a file in bytes: a larger checkpoint becomes several
            files and `model.safetensors.index.json`.

    Raises:
        RuntimeError: The processes together do not hold the module, or rank 0 could
            not write; the message says why.
    """
    gatherer = Gatherer(unwrapped(module), alone=False)
    groups = _file_groups(gatherer.plans, max_shard_size)
    writer = CheckpointWriter(Path(directory), len(groups))
    try:
        on_rank_0(writer.begin)
        for names in groups:
            tensors = {}
            for name in names:
                whole = gatherer.gather(name)
                if gatherer.rank == 0:
                    tensors[name] = whole.contiguous().cpu()
                del whole
            on_rank_0(partial(writer.add, tensors))
        on_rank_0(writer.commit)
    finally:
        if gatherer.rank == 0:
            writer.discard()


def _file_groups(plans: Mapping[str, GatherPlan], limit: int) -> list[list[str]]:
    """The tensors of each file: in order, up to `limit` bytes, at least one."""
    if not isinstance(limit, int) or limit < 1:
        raise ValueError(f"max_shard_size={limit!r} must be a number of bytes above 0.")
    groups: list[list[str]] = [[]]
    room = limit
    for name, plan in plans.items():
        if groups[-1] and plan.num_bytes > room:
            groups.append([])
            room = limit
        groups[-1].append(name)
        room -= plan.num_bytes
    return groups
