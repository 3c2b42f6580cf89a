# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""Saving a trainer's state and resuming it under another sharding and world size.

The directory is a DCP checkpoint of whole tensors under the names of a checkpoint's
layout: `model.NAME`, and `optimizer.KEY.NAME` for what the optimizer keeps of a
parameter's shape. Beside it `optimizer.pt` has the rest of the optimizer's
state, by parameter, and the list of files.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from torch.optim import Optimizer

from vllm.model_executor.checkpoint.files import whole_file
from vllm.model_executor.checkpoint.layout import (
    CheckpointLayout,
    refuse_meta,
    refuse_misfit,
    tensors_of,
)
from vllm.model_executor.checkpoint.ranks import on_all_ranks, on_rank_0
from vllm.model_executor.checkpoint.reshard import (
    Piece,
    pieces_of,
    read_pieces,
    stored_tensors,
    write_pieces,
)
from vllm.model_executor.checkpoint.shards import LocalParameter, local_tensor
from vllm.model_executor.checkpoint.state_dict_hooks import refuse_extra_state

RECORD_NAME = "optimizer.pt"


def save_state(
    model: nn.Module, optimizer: Optimizer, directory: str | os.PathLike
) -> None:
    """Write a trainer's weights and optimizer state, completely or not at all.

    Every process of the job calls this, and each writes a part. The directory gets its
    name when everything is written. If a process is killed before that,
    `.NAME.unfinished` remains. The next save of that name removes it.

    Args:
        model: Built with the `ParallelContext` of this process, also under
            DistributedDataParallel or FSDP2.
        optimizer: An optimizer of the model's parameters. Its state for a parameter
            must have the parameter's shape or be a single number.
        directory: A directory that does not exist, on a file system that all processes
            share.

    Raises:
        FileExistsError: The directory exists.
        ValueError: The optimizer has parameters that are not the model's, or other
            state.
        RuntimeError: Another process failed. The message says why.
    """
    directory = Path(directory)
    unfinished = directory.with_name(f".{directory.name}.unfinished")
    pieces: list[Piece] = []

    def prepare() -> dict[str, Any]:
        trained = _Trained(model, optimizer)
        pieces.extend(trained.weights())
        record = {}
        for name, options in zip(trained.names, trained.options(), strict=True):
            tensors, values = trained.state_of(name)
            for key, tensor in tensors.items():
                pieces.extend(trained.state_pieces(name, key, tensor))
            dtypes = {key: tensor.dtype for key, tensor in tensors.items()}
            record[name] = {"options": options, "tensors": dtypes, "values": values}
        return record

    records = on_all_ranks(prepare)
    on_rank_0(partial(_begin, directory, unfinished))
    write_pieces(unfinished, pieces)
    parameters = {name: entry for record in records for name, entry in record.items()}
    record = {"optimizer": type(optimizer).__name__, "parameters": parameters}
    on_rank_0(partial(_finish, directory, unfinished, record))


def load_state(
    model: nn.Module, optimizer: Optimizer, directory: str | os.PathLike
) -> None:
    """Load what `save_state` wrote, with any sharding and any number of processes.

    Every process of the job calls this, and each reads what it holds. If something does
    not fit, nothing is changed.

    Args:
        model: Built with the `ParallelContext` of this process, also under
            DistributedDataParallel or FSDP2.
        optimizer: An optimizer of the class and the parameters that were saved.
        directory: The directory that `save_state` wrote.

    Raises:
        FileNotFoundError: The directory does not exist or is incomplete.
        ValueError: Something is missing, extra, or of another shape or dtype. The
            message names all of it.
        RuntimeError: Another process failed. The message says why.
    """
    directory = Path(directory)
    record = on_rank_0(partial(_read_record, directory))
    stored = on_rank_0(partial(stored_tensors, directory))

    def compare() -> _Fit:
        return _Fit.of(_Trained(model, optimizer), record, stored)

    _refuse(on_all_ranks(compare), record, stored)
    _Trained(model, optimizer).resume(directory, record["parameters"])


class _Trained:
    """A model and its optimizer, by the names of the model's layout."""

    def __init__(self, model: nn.Module, optimizer: Optimizer) -> None:
        layout = CheckpointLayout.of(model)
        self.parameters, self.aliases = layout.parameters, layout.aliases
        self.tensors = tensors_of(model)
        refuse_meta(self.tensors)
        refuse_extra_state(model)
        self.optimizer = optimizer
        known = {id(tensor): name for name, tensor in self.tensors.items()}
        groups = optimizer.param_groups
        given = [parameter for group in groups for parameter in group["params"]]
        strangers = [given for given in given if id(given) not in known]
        if strangers:
            shapes = ", ".join(str(list(tensor.shape)) for tensor in strangers[:3])
            raise ValueError(
                f"{len(strangers)} of the optimizer's {len(given)} parameters are not "
                f"the model's, first of shape {shapes}. Make the optimizer after "
                "fully_shard(model), from model.parameters()."
            )
        # In the order in which the optimizer numbers its parameters.
        self.names = [known[id(parameter)] for parameter in given]

    def options(self) -> Iterator[dict[str, Any]]:
        """The hyperparameters of each of `names`."""
        for group in self.optimizer.param_groups:
            options = {
                key: _storable(value)
                for key, value in group.items()
                if key not in ("params", "param_names")
            }
            yield from [options] * len(group["params"])

    def state_of(self, name: str) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
        """What the optimizer keeps of a parameter: of its shape, and single values."""
        parameter = self.tensors[name]
        tensors, values = {}, {}
        for key, value in self.optimizer.state.get(parameter, {}).items():
            if isinstance(value, torch.Tensor) and value.shape == parameter.shape:
                tensors[key] = value
            elif (single := _single(value)) is not None or value is None:
                values[key] = single
            else:
                given = f", a {type(value).__name__},"
                if isinstance(value, torch.Tensor):
                    given = f" of shape {list(value.shape)}"
                raise ValueError(
                    f"{type(self.optimizer).__name__} keeps {key}{given} for {name} "
                    f"of shape {list(parameter.shape)}; only state of the parameter's "
                    "shape, or a single number, can be saved and resharded."
                )
        return tensors, values

    def weights(self) -> Iterator[Piece]:
        for name, parameter in self.parameters.items():
            yield from pieces_of(parameter, local_tensor(self.tensors[name]), "model.")

    def state_pieces(self, name: str, key: str, tensor: torch.Tensor) -> list[Piece]:
        prefix = _state_prefix(key)
        return [*pieces_of(self.parameters[name], local_tensor(tensor), prefix)]

    def resume(self, directory: Path, saved: Mapping[str, Any]) -> None:
        """Load weights and state that have been found to fit.

        Args:
            directory: Of the checkpoint.
            saved: The parameters' part of its record.
        """
        pieces, state = list(self.weights()), {}
        for index, name in enumerate(self.names):
            tensors, values = saved[name]["tensors"], saved[name]["values"]
            if tensors or values:
                state[index] = dict(values)
            for key, dtype in tensors.items():
                tensor = torch.zeros_like(self.tensors[name], dtype=dtype)
                state[index][key] = tensor
                pieces += self.state_pieces(name, key, tensor)
        read_pieces(directory, pieces)
        for name, parameter in self.parameters.items():
            for shard in parameter.shards:
                parameter.clear_padding(local_tensor(self.tensors[name]), shard)
        self.optimizer.load_state_dict(
            {"state": state, "param_groups": self._groups(saved)}
        )
        # torch has cast them to the parameters' dtype.
        for index, entries in state.items():
            kept = self.optimizer.state[self.tensors[self.names[index]]]
            for key, value in entries.items():
                if isinstance(value, torch.Tensor):
                    kept[key] = value.to(kept[key].device)

    def _groups(self, saved: Mapping[str, Any]) -> list[dict[str, Any]]:
        groups, first = [], 0
        for group in self.optimizer.param_groups:
            numbers = range(first, first + len(group["params"]))
            options = saved[self.names[first]]["options"] if numbers else group
            groups.append({**options, "params": [*numbers]})
            first += len(numbers)
        return groups

    def mixed_groups(self, saved: Mapping[str, Any]) -> list[str]:
        """Parameters whose saved hyperparameters are not those of their group."""
        mixed, first = [], 0
        for group in self.optimizer.param_groups:
            names = self.names[first : first + len(group["params"])]
            first += len(names)
            mixed += [
                name
                for name in names
                if saved[name]["options"] != saved[names[0]]["options"]
            ]
        return mixed


@dataclass
class _Fit:
    """What one rank needs of a checkpoint, and what is wrong with it.

    Attributes:
        wanted: Names of the stored tensors it needs.
        trained: Names of the parameters it trains.
        aliases: Other names of tied parameters, with the name of the first.
        problems: As `refuse_misfit` takes them.
    """

    wanted: set[str] = field(default_factory=set)
    trained: set[str] = field(default_factory=set)
    aliases: dict[str, str] = field(default_factory=dict)
    problems: dict[str, set[str]] = field(default_factory=dict)

    @classmethod
    def of(
        cls,
        trained: _Trained,
        record: Mapping[str, Any],
        stored: Mapping[str, TensorStorageMetadata],
    ) -> _Fit:
        saved = record["parameters"]
        fit = cls(trained=set(trained.names), aliases=trained.aliases)
        used = type(trained.optimizer).__name__
        if used != record["optimizer"]:
            raise ValueError(
                f"The checkpoint has the state of {record['optimizer']}, and the "
                f"optimizer is {used}. Make one of the class that was saved."
            )
        for name, parameter in trained.parameters.items():
            fit._compare("model.", parameter, trained.tensors[name].dtype, stored)
        known = [name for name in trained.names if name in saved]
        for name in known:
            for key, dtype in saved[name]["tensors"].items():
                parameter = trained.parameters[name]
                fit._compare(_state_prefix(key), parameter, dtype, stored)
        fit._add("Not trained when it was saved", fit.trained.difference(known))
        if len(known) == len(trained.names):
            mixed = trained.mixed_groups(saved)
            fit._add("Hyperparameters unlike the first of its group", mixed)
        return fit

    def _compare(
        self,
        prefix: str,
        parameter: LocalParameter,
        dtype: torch.dtype,
        stored: Mapping[str, TensorStorageMetadata],
    ) -> None:
        """Look for what this rank holds of a tensor sharded as a parameter is."""
        for shard in parameter.shards:
            if not shard.numel:
                continue
            name = prefix + shard.tensor
            self.wanted.add(name)
            entry = stored.get(name)
            if entry is None:
                self._add("Missing", [name])
            elif tuple(entry.size) != shard.shape:
                found, needed = list(entry.size), list(shard.shape)
                given = f"{name} is {found}, the model needs {needed}"
                self._add("Wrong shape", [given])
            elif entry.properties.dtype != dtype:
                given = f"{name} is {entry.properties.dtype}, the model needs {dtype}"
                self._add("Wrong dtype", [given])

    def _add(self, title: str, names: Iterable[str]) -> None:
        self.problems.setdefault(title, set()).update(names)


def _refuse(
    fits: list[_Fit],
    record: Mapping[str, Any],
    stored: Mapping[str, TensorStorageMetadata],
) -> None:
    """Report what is wrong on any rank, and what none of them needs."""
    together = _Fit()
    for fit in fits:
        together.wanted |= fit.wanted
        together.trained |= fit.trained
        together.aliases |= fit.aliases
        for title, names in fit.problems.items():
            together._add(title, names)
    extra = {name for name in stored if name.startswith("model.")} - together.wanted
    aliases = {f"model.{name}": first for name, first in together.aliases.items()}
    apart = [f"{name} and model.{aliases[name]}" for name in extra & aliases.keys()]
    together._add("Tied in the model and saved apart; resume an untied one", apart)
    together._add("Not in the model", extra - aliases.keys())
    untrained = record["parameters"].keys() - together.trained - together.aliases.keys()
    together._add("Not in the optimizer", untrained)
    refuse_misfit(together.problems)


def _begin(directory: Path, unfinished: Path) -> None:
    if directory.exists():
        raise FileExistsError(
            f"{directory} exists. Give each save a directory of its own, such as "
            f"{directory.name}-2, and remove old ones when a newer one is complete."
        )
    if unfinished.exists():
        shutil.rmtree(unfinished)
    unfinished.mkdir(parents=True)


def _finish(directory: Path, unfinished: Path, record: dict[str, Any]) -> None:
    files = {path.name: path.stat().st_size for path in unfinished.iterdir()}
    with whole_file(unfinished / RECORD_NAME) as path:
        torch.save(record | {"files": files}, path)
    os.rename(unfinished, directory)


def _read_record(directory: Path) -> dict[str, Any]:
    path = directory / RECORD_NAME
    if not path.is_file():
        what = "has no " + RECORD_NAME if directory.is_dir() else "does not exist"
        raise FileNotFoundError(
            f"{directory} is not a complete training state: it {what}. A save that was "
            "interrupted leaves a directory .NAME.unfinished, which cannot be resumed "
            "from; take the one before."
        )
    record = torch.load(path, weights_only=True, map_location="cpu")
    for name, size in record["files"].items():
        file = directory / name
        found = file.stat().st_size if file.is_file() else 0
        if found != size:
            raise FileNotFoundError(
                f"{directory} is not a complete training state: {name} has {found} of "
                f"{size} bytes. Copy the directory again, or take the one before."
            )
    return record


def _state_prefix(key: str) -> str:
    """What stands before a tensor's name for the optimizer's state of it."""
    return f"optimizer.{key}."


def _single(value: Any) -> Any:
    """A single number or string as it is stored; None for anything else."""
    value = _storable(value)
    if isinstance(value, torch.Tensor):
        return None if value.dim() else value
    return value if isinstance(value, bool | int | float | str) else None


def _storable(value: Any) -> Any:
    """With tensors on the CPU and numbers that torch reads without running code."""
    if isinstance(value, torch.Tensor):
        return local_tensor(value).cpu()
    if isinstance(value, np.generic):
        return value.item()
    if type(value) in (list, tuple):
        return type(value)(map(_storable, value))
    return value
