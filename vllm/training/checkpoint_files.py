# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""The safetensors files of a model directory, and their replacement as one step.

A directory's checkpoint is `model.safetensors`, or the files that
`model.safetensors.index.json` lists; other files are not part of it. So exchanging the
index exchanges the checkpoint, and a process that is killed at any point leaves the old
checkpoint or the new one.
"""

from __future__ import annotations

import json
import os
import re
import uuid
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file

WEIGHTS_NAME = "model.safetensors"
INDEX_NAME = "model.safetensors.index.json"
_UNFINISHED = ".unfinished-"
_PART = re.compile(r"([0-9a-f]{8}-)?model-\d{5}-of-\d{5}\.safetensors")


def checkpoint_files(directory: Path) -> list[Path]:
    """The safetensors files of a model directory.

    Raises:
        FileNotFoundError: there is no checkpoint.
    """
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
