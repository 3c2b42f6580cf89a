# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""Loading whole checkpoint tensors into a model whose layers are the engine's."""

from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import nn

from vllm.model_executor import vllm_internals
from vllm.model_executor.checkpoint.files import check_files
from vllm.model_executor.checkpoint.fingerprint import fingerprint, same_bits
from vllm.model_executor.checkpoint.layout import (
    CheckpointLayout,
    CheckpointTensor,
    LayoutComparison,
    refuse_meta,
)
from vllm.model_executor.checkpoint.shards import LocalParameter, local_tensor
from vllm.model_executor.checkpoint.wrappers import (
    join,
    named_modules,
    named_tensors,
    names_without_wrappers,
    own_tensors,
)
from vllm.model_executor.determinism.mode import is_batch_invariant

if TYPE_CHECKING:
    from vllm.config import ModelConfig

Conversion = Callable[
    [Iterable[tuple[str, torch.Tensor]]], Iterator[tuple[str, torch.Tensor]]
]


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
        convert: Turns the names and tensors of a checkpoint into the layout's; None:
            they are the same.

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
        convert: Conversion | None = None,
    ) -> None:
        self.model = model
        self.layout = layout
        self.model_config = model_config
        self.complete = complete
        self.convert = convert
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
        check = LayoutComparison(self.layout)
        loaded = self._put(check, self._read(weights))
        check.finish(check.missing())
        self.complete = False
        return loaded

    def _reload(self, weights: Iterable[tuple[str, torch.Tensor]]) -> set[str]:
        """Load after all has been checked; what fails leaves the engine as it was."""
        try:
            given = list(self._read(weights))
            check = LayoutComparison(self.layout)
            by_name = dict(given)
            for name, tensor in given:
                check.match(name, tensor.shape, tensor.dtype)
            for name, first in check.repeated.items():
                self._compare(check, first, by_name[first], name, by_name[name])
            check.finish(check.missing_beside_found())
            self._expect_only(check)
            return self._put(LayoutComparison(self.layout), given)
        except Exception:
            self._abandon_reload()
            raise

    def _read(
        self, weights: Iterable[tuple[str, torch.Tensor]]
    ) -> Iterator[tuple[str, torch.Tensor]]:
        """`weights`, once it is known that their files, if any, are in order."""
        if vllm_internals.reads_model_files(weights) and self.model_config is not None:
            directory = Path(self.model_config.model)
            if directory.is_absolute() or directory.is_dir():  # else it is of a hub
                check_files(directory)
        checked = (_check_pair(pair) for pair in weights)
        yield from self.convert(checked) if self.convert else checked

    def _compare(
        self,
        check: LayoutComparison,
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

    def _expect_only(self, check: LayoutComparison) -> None:
        """Tell vLLM's reloading which modules get weights.

        It warns of every other one that has parameters or buffers, such as rotary
        tables and modules that are left as they are on purpose, and restores them.
        """
        entries = self.layout.tensors | self.layout.fused
        parameters = {entries[name].parameter for name in check.found}
        for name, _, module in named_modules(self.model):
            own = (join(name, own_name) for own_name, _ in own_tensors(module))
            if parameters.isdisjoint(self.layout.aliases.get(n, n) for n in own):
                vllm_internals.expect_no_weights(module)

    def never_loaded(self) -> list[str]:
        """Names of this stage's tensors that no load has brought."""
        return [
            name
            for name, tensor in self.layout.tensors.items()
            if tensor.parameter in self.layout.parameters
            and name not in self.fingerprints
        ]

    def _put(
        self, check: LayoutComparison, weights: Iterable[tuple[str, torch.Tensor]]
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
                vllm_internals.expect_no_weights(module)
            vllm_internals.finalize_layerwise_reload(self.model, self.model_config)


def _narrowed(tensor: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """In the dtype of the trainer's parameter, unless that changes a value.

    The CPU engine holds sinks of a model in fp16 in fp32.
    """
    narrow = tensor.to(dtype)
    return narrow if torch.equal(narrow.to(tensor.dtype), tensor) else tensor


def _check_pair(pair: Any) -> tuple[str, torch.Tensor]:
    """Refuse what is no name and tensor."""
    is_pair = isinstance(pair, tuple | list) and len(pair) == 2
    if is_pair and isinstance(pair[1], torch.Tensor):
        return pair[0], pair[1]
    given = f"{pair[0]} with a {type(pair[1]).__name__}" if is_pair else repr(pair)
    raise TypeError(
        "The engine loads (name, tensor) pairs, and instead of one "
        f"{given[:200]} arrived. Tensors do not reach an engine in another process: "
        "write them with save_checkpoint(model, directory) and call "
        'llm.collective_rpc("reload_weights", kwargs={"weights_path": directory}), or '
        "start the engine in the trainer's process with "
        "VLLM_ENABLE_V1_MULTIPROCESSING=0. The engine keeps the weights it had."
    )


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


def _shard_loader(sharded: LocalParameter) -> Callable[..., None]:
    shards = {shard.part: shard for shard in sharded.shards}

    # vLLM's reloading replays the call and knows its arguments by these names.
    def load_shard(
        param: torch.Tensor,
        loaded_weight: torch.Tensor,
        loaded_shard_id: str | int | None = None,
    ) -> None:
        shard = shards[loaded_shard_id]
        piece = loaded_weight[sharded.source(shard, shard.part_start)]
        sharded.put(local_tensor(param.data), shard, piece)

    return load_shard
