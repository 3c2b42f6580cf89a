# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""Weights of models made of training layers: sharding, loading, saving."""

import math
import os
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import nn

from vllm.model_executor import upstream
from vllm.model_executor.layers.training.batch_invariance import is_batch_invariant
from vllm.training.checkpoint_files import (
    CheckpointWriter,
    check_files,
    checkpoint_files,
    opened,
)
from vllm.training.fingerprint import fingerprint
from vllm.training.gather import Gatherer, GatherPlan
from vllm.training.layout import (
    CheckpointLayout,
    CheckpointTensor,
    LayoutCheck,
    refuse_meta,
    tensors_of,
)
from vllm.training.ranks import on_rank_0
from vllm.training.shards import ShardedParameter, held
from vllm.training.state_dict_hooks import refuse_changing_hooks
from vllm.training.wrappers import (
    join,
    named_modules,
    named_tensors,
    names_without_wrappers,
    own_tensors,
)

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
        self._paths = {
            name: path for path, name in names_without_wrappers(model).items()
        }
        _add_weight_loaders(model, layout)

    def load(self, weights: Iterable[tuple[str, torch.Tensor]]) -> set[str]:
        """Load whole tensors, of which every rank keeps its shard.

        Args:
            weights: Checkpoint names and full tensors, in any order. A later load
                reads all of them before it changes anything.

        Returns:
            The names of the parameters that were loaded, as `model` has them.

        Raises:
            ValueError: Names all tensors that are missing, extra, given twice, or of
                another shape or dtype, or the file that is damaged.
            TypeError: What was given is no tensor, as in an engine that is in another
                process than the tensors.
        """
        if not self.complete:
            return self._reload(weights)
        check = LayoutCheck(self.layout)
        loaded = self._put(check, self._read(weights))
        check.finish(check.missing())
        self.complete = False
        return loaded

    def _reload(self, weights: Iterable[tuple[str, torch.Tensor]]) -> set[str]:
        """Load after all has been checked; what fails leaves the engine as it was."""
        try:
            given = list(self._read(weights))
            check = LayoutCheck(self.layout)
            by_name = dict(given)
            for name, tensor in given:
                check.match(name, tensor.shape, tensor.dtype)
            for name, first in check.repeated.items():
                self._compare(check, first, by_name[first], name, by_name[name])
            check.finish(check.missing_beside_found())
            self._expect_only(check)
            return self._put(LayoutCheck(self.layout), given)
        except Exception:
            self._abandon_reload()
            raise

    def _read(
        self, weights: Iterable[tuple[str, torch.Tensor]]
    ) -> Iterator[tuple[str, torch.Tensor]]:
        """`weights`, once it is known that their files, if any, are in order."""
        if upstream.reads_model_files(weights) and self.model_config is not None:
            directory = Path(self.model_config.model)
            if directory.is_absolute() or directory.is_dir():  # else it is of a hub
                check_files(directory)
        for pair in weights:
            _check_pair(pair)
            yield pair

    def _compare(
        self,
        check: LayoutCheck,
        first: str,
        first_tensor: torch.Tensor,
        name: str,
        tensor: torch.Tensor,
    ) -> None:
        """Note a tied parameter's two tensors if they are loaded as different ones."""
        entry = self.layout.tensor(name)
        assert entry is not None, "it was matched"
        dtype = entry.dtype
        if not same_bits(first_tensor.to(dtype), tensor.to(first_tensor.device, dtype)):
            check.different.append((first, name))

    def _expect_only(self, check: LayoutCheck) -> None:
        """Tell vLLM's reloading which modules get weights.

        It warns of every other one that has parameters or buffers, such as rotary
        tables and modules that are left as they are on purpose, and restores them.
        """
        entries = self.layout.tensors | self.layout.fused
        parameters = {entries[name].parameter for name in check.found}
        for name, _, module in named_modules(self.model):
            own = (join(name, own_name) for own_name, _ in own_tensors(module))
            if parameters.isdisjoint(self.layout.aliases.get(n, n) for n in own):
                upstream.expect_no_weights(module)

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
        targets = dict(named_tensors(self.model, persistent=False))
        tied = defaultdict(list)
        for alias, first in self.layout.aliases.items():
            tied[first].append(alias)
        loaded = set()
        first_of_tied: dict[str, torch.Tensor] = {}
        for name, tensor in weights:
            entry = check.match(name, tensor.shape, tensor.dtype)
            if name in check.repeated:
                first = check.repeated[name]
                if first in first_of_tied:
                    self._compare(check, first, first_of_tied[first], name, tensor)
            if entry is None:
                continue
            if entry.parameter in tied:
                first_of_tied[name] = tensor
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
        return {self._paths.get(name, name) for name in loaded}

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
            loaded = _narrowed(piece.to(target.dtype), entry.dtype)
            self.fingerprints[name] = fingerprint(loaded, device)

    def _abandon_reload(self) -> None:
        """Give the modules back the weights they had before vLLM began to reload."""
        parameters = self.model.parameters()
        if any(parameter.device.type == "meta" for parameter in parameters):
            for module in self.model.modules():
                upstream.expect_no_weights(module)
            upstream.finalize_layerwise_reload(self.model, self.model_config)


def _narrowed(tensor: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """In the dtype of the trainer's parameter, unless that changes a value.

    The CPU engine holds sinks of a model in fp16 in fp32.
    """
    narrow = tensor.to(dtype)
    return narrow if torch.equal(narrow.to(tensor.dtype), tensor) else tensor


def _check_pair(pair: Any) -> None:
    """Refuse what is no name and tensor."""
    is_pair = isinstance(pair, tuple | list) and len(pair) == 2
    if is_pair and isinstance(pair[1], torch.Tensor):
        return
    given = f"{pair[0]} with a {type(pair[1]).__name__}" if is_pair else repr(pair)
    raise TypeError(
        "The engine loads (name, tensor) pairs, and instead of one "
        f"{given[:200]} arrived. Tensors do not reach an engine in another process: "
        "write them with save_checkpoint(model, directory) and call "
        'llm.collective_rpc("reload_weights", kwargs={"weights_path": directory}), or '
        "start the engine in the trainer's process with "
        "VLLM_ENABLE_V1_MULTIPROCESSING=0. The engine keeps the weights it had."
    )


def same_bits(first: torch.Tensor, second: torch.Tensor) -> bool:
    """Whether two tensors of one dtype have the same shape and bits, NaN included."""
    if first.shape != second.shape:
        return False
    views = (
        tensor.contiguous().flatten().view(torch.uint8) for tensor in (first, second)
    )
    return torch.equal(*views)


def _copy(target: torch.Tensor, tensor: torch.Tensor) -> None:
    target.data.copy_(tensor)


def _add_weight_loaders(model: nn.Module, layout: CheckpointLayout) -> None:
    """Give parameters and buffers that have no `weight_loader` one for their shard."""
    plain = {
        name: tensor
        for name, tensor in named_tensors(model)
        if name in layout.parameters and not hasattr(tensor, "weight_loader")
    }
    refuse_meta(plain)
    for name, tensor in plain.items():
        cast(Any, tensor).weight_loader = _shard_loader(layout.parameters[name])


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
    return CheckpointLayout.of(model).parameters


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
    directory = Path(directory)
    layout, targets = CheckpointLayout.of(module), tensors_of(module)
    refuse_meta(targets)
    refuse_changing_hooks(module)
    with opened(directory, checkpoint_files(directory)) as files:
        check = LayoutCheck(layout)
        matched = {
            name: check.match(name, *_shape_and_dtype(file, name))
            for name, file in files.items()
        }
        for name, first in check.repeated.items():
            entry = layout.tensor(name)
            assert entry is not None, "it was matched"
            if not _same_in_files(files, first, name, entry.dtype):
                check.different.append((first, name))
        check.finish(check.missing())
        for name, entry in matched.items():
            if entry is None:
                continue
            sharded = layout.parameters[entry.parameter]
            target = held(targets[entry.parameter])
            parts = {part.shard_id for part in entry.parts}
            for shard in sharded.shards:
                if shard.part in parts:
                    box = sharded.source(shard, entry.origin)
                    sharded.put(target, shard, _read(files[name], name, box))


def _read(file: Any, name: str, box: tuple[slice, ...]) -> torch.Tensor:
    """A box of a tensor in a safetensors file; a file has no boxes of a scalar."""
    return file.get_slice(name)[box] if box else file.get_tensor(name)


def _shape_and_dtype(file: Any, name: str) -> tuple[list[int], torch.dtype | str]:
    """Of a tensor in a safetensors file; a dtype that is not of `_DTYPES` as text."""
    header = file.get_slice(name)
    dtype = header.get_dtype()
    return header.get_shape(), _DTYPES.get(dtype, dtype)


_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "C64": torch.complex64,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}


def _same_in_files(
    files: Mapping[str, Any], first: str, second: str, dtype: torch.dtype
) -> bool:
    """Whether two tensors would be loaded as the same; reads some rows at a time."""
    shape, other_shape = (files[n].get_slice(n).get_shape() for n in (first, second))
    if shape != other_shape:
        return False
    rows = max(1, 2**24 // max(1, math.prod(shape[1:])))
    boxes = [(slice(i, i + rows),) for i in range(0, shape[0], rows)] if shape else [()]
    return all(
        same_bits(*(_read(files[n], n, box).to(dtype) for n in (first, second)))
        for box in boxes
    )


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
    gatherer = Gatherer(module, alone=True)
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
    gatherer = Gatherer(module, alone=False)
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
