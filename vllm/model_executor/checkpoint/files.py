# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""The safetensors files of a model directory, and their replacement as one step.

A directory's checkpoint is `model.safetensors`, or the files that
`model.safetensors.index.json` lists; other files are not part of it, even a
`model.safetensors` that the index leaves out. So exchanging the index exchanges the
checkpoint, and a process that is killed at any point leaves the old checkpoint or the
new one.
"""

from __future__ import annotations

import json
import os
import re
import uuid
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

WEIGHTS_NAME = "model.safetensors"
INDEX_NAME = "model.safetensors.index.json"
_UNFINISHED = ".unfinished-"
_PART = re.compile(r"([0-9a-f]{8}-)?model-\d{5}-of-\d{5}\.safetensors")


def checkpoint_files(directory: Path) -> list[Path]:
    """The safetensors files of a model directory.

    Raises:
        FileNotFoundError: there is no checkpoint, or a file of it is missing.
        ValueError: the index is damaged.
    """
    weight_map = read_index(directory)
    if weight_map is not None:
        files = [directory / name for name in sorted(set(weight_map.values()))]
        missing = [file.name for file in files if not file.is_file()]
        if missing:
            raise FileNotFoundError(
                f"{directory / INDEX_NAME} lists {', '.join(missing)}, which the "
                "directory does not hold. Copy what is missing, or save the checkpoint "
                "again."
            )
        return files
    single = directory / WEIGHTS_NAME
    if not single.is_file():
        raise FileNotFoundError(
            f"{directory} holds no {WEIGHTS_NAME} and no {INDEX_NAME}"
            f"{_weights_of_other_names(directory)}."
        )
    return [single]


def _weights_of_other_names(directory: Path) -> str:
    """What to do with weights that are there, or nothing."""
    found = sorted(
        path.name
        for path in (directory.iterdir() if directory.is_dir() else ())
        if path.suffix in (".safetensors", ".bin", ".pt", ".pth")
    )
    if not found:
        return ""
    return (
        f", but {', '.join(found[:5])}. Only safetensors of these names are read: "
        "rename the file, or load a pickle with torch.load and write it with "
        "safetensors.torch.save_file"
    )


def read_index(directory: Path) -> dict[str, str] | None:
    """The file of each tensor by the directory's index; None if it has no index.

    Raises:
        ValueError: the index is not of that form.
    """
    index = directory / INDEX_NAME
    if not index.is_file():
        return None
    try:
        fields = json.loads(index.read_text())
    except ValueError as error:
        raise ValueError(f"{index} is not valid JSON: {error}.") from error
    weight_map = fields.get("weight_map") if isinstance(fields, dict) else None
    if not isinstance(weight_map, dict) or not all(
        isinstance(name, str) and Path(name).name == name
        for name in weight_map.values()
    ):
        raise ValueError(
            f'{index} must hold an object with a "weight_map" of file names by tensor '
            "name. Save the checkpoint again, or remove the index of a checkpoint in "
            f"one {WEIGHTS_NAME}."
        )
    return weight_map


@contextmanager
def opened(directory: Path, files: Sequence[Path]) -> Iterator[dict[str, Any]]:
    """Open safetensors files; gives the file that holds each tensor, by its name.

    Args:
        directory: of the model; its index, if there is one, is compared with the files.
        files: to open.

    Raises:
        ValueError: names each file that is damaged, and each tensor that is not in the
            file that the index says, is not in the index, or is in two files.
    """
    with ExitStack() as stack:
        handles: dict[str, Any] = {}
        places: dict[str, str] = {}
        problems = []
        for path in files:
            file = stack.enter_context(_open(path))
            for name in file.keys():  # noqa: SIM118, a file is no dict
                if name in places:
                    problems.append(f"{name} is in {places[name]} and in {path.name}")
                handles[name], places[name] = file, path.name
        weight_map = read_index(directory)
        if weight_map is not None:
            for name in sorted(weight_map.keys() | places.keys()):
                listed, found = weight_map.get(name), places.get(name)
                if listed is None:
                    problems.append(f"{name} of {found} is not in the index")
                elif found != listed:
                    where = f"it is in {found}" if found else "no file has it"
                    problems.append(
                        f"the index says {name} is in {listed}, but {where}"
                    )
        if problems:
            shown = "; ".join(problems[:20])
            raise ValueError(
                f"The checkpoint in {directory} contradicts itself "
                f"({len(problems)} times): {shown}. Save it again, or mend "
                f"{INDEX_NAME}; without an index remove the file that is too much."
            )
        yield handles


def check_files(directory: Path) -> None:
    """Refuse damaged and contradictory safetensors of a model directory.

    As vLLM reads them: without an index, whatever the files are called.

    Raises:
        FileNotFoundError: there is no directory, or not a file that the index lists.
        ValueError: see `opened`.
    """
    if not directory.is_dir():
        raise FileNotFoundError(f"There is no model directory {directory}.")
    if read_index(directory) is not None:
        files = checkpoint_files(directory)
    else:
        files = sorted(directory.glob("*.safetensors"))
    with opened(directory, files):
        pass


def _open(path: Path) -> Any:
    try:
        return safe_open(path, framework="pt")
    except (SafetensorError, OSError) as error:
        raise ValueError(
            f"{path} is not a whole file of safetensors ({path.stat().st_size} bytes): "
            f"{error}. Copy it again, or save the checkpoint again."
        ) from error


class CheckpointWriter:
    """Writes the files of a checkpoint, which take the old one's place at the end.

    Args:
        directory: of the model.
        num_files: how many files there will be.
    """

    def __init__(self, directory: Path, num_files: int) -> None:
        self.directory = directory
        self._num_files = num_files
        self._names: list[str] = []
        self._added = 0
        self._weight_map: dict[str, str] = {}

    def begin(self) -> None:
        """Make the directory if it is not there, and clear what a killed save left."""
        self.directory.mkdir(parents=True, exist_ok=True)
        for leftover in self.directory.glob(f"{_UNFINISHED}*"):
            leftover.unlink()
        self._names = _file_names(self.directory, self._num_files)

    def add(self, tensors: Mapping[str, torch.Tensor]) -> None:
        """Write the next file.

        Args:
            tensors: on the CPU, contiguous.
        """
        name = self._names[self._added]
        path = self.directory / f"{_UNFINISHED}{name}"
        save_file(dict(tensors), path, metadata={"format": "pt"})
        self._weight_map |= dict.fromkeys(tensors, name)
        self._added += 1

    def discard(self) -> None:
        """Remove what was added and not committed; the old checkpoint stays."""
        for name in (*self._names, INDEX_NAME) if self._names else ():
            (self.directory / f"{_UNFINISHED}{name}").unlink(missing_ok=True)

    def commit(self) -> None:
        """Put the new files in the place of the old checkpoint's."""
        directory, names = self.directory, self._names
        index, single = directory / INDEX_NAME, directory / WEIGHTS_NAME
        if not index.is_file():
            self._remove(_parts(directory))
            if single.is_file() and names != [WEIGHTS_NAME]:
                # From here on files beside those of the index are not read.
                with safe_open(single, framework="pt") as file:
                    self._write_index(dict.fromkeys(file.keys(), WEIGHTS_NAME))
        for name in names:
            os.replace(directory / f"{_UNFINISHED}{name}", directory / name)
        if names == [WEIGHTS_NAME] and not index.is_file():
            return
        self._write_index(self._weight_map)
        self._remove({WEIGHTS_NAME, *_parts(directory)})
        if names == [WEIGHTS_NAME]:
            index.unlink()

    def _remove(self, names: set[str]) -> None:
        """Remove files that are not of the new checkpoint."""
        for name in names - set(self._names):
            (self.directory / name).unlink(missing_ok=True)

    def _write_index(self, weight_map: dict[str, str]) -> None:
        files = [self.directory / name for name in set(weight_map.values())]
        size = sum(file.stat().st_size for file in files)
        fields = {"metadata": {"total_size": size}, "weight_map": weight_map}
        unfinished = self.directory / f"{_UNFINISHED}{INDEX_NAME}"
        unfinished.write_text(json.dumps(fields, indent=2))
        os.replace(unfinished, self.directory / INDEX_NAME)


def _parts(directory: Path) -> set[str]:
    """The files of a directory that are named as one of several."""
    return {path.name for path in directory.iterdir() if _PART.fullmatch(path.name)}


def _file_names(directory: Path, count: int) -> list[str]:
    """Hugging Face's names; with a prefix where files of such names exist."""
    if count == 1:
        return [WEIGHTS_NAME]
    names = [f"model-{i + 1:05}-of-{count:05}.safetensors" for i in range(count)]
    if _parts(directory) & set(names):
        names = [f"{uuid.uuid4().hex[:8]}-{name}" for name in names]
    return names


@contextmanager
def whole_file(path: Path) -> Iterator[Path]:
    """A temporary path that replaces `path` when the block ends without an error.

    The temporary file lies beside `path`, with the same suffix, and is removed if
    the block raises.
    """
    temporary = path.with_name(f".{path.stem}.{os.getpid()}{path.suffix}")
    try:
        yield temporary
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
