# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""The series: the patches in order, and what they make of the pristine files."""

from dataclasses import dataclass
from pathlib import Path

from vllm_overlay.common import OverlayError, sha256_bytes
from vllm_overlay.patch import FileDiff, Patch, read_patch


@dataclass(frozen=True)
class PatchedFile:
    """A patched file, and how to get the pristine one back.

    Attributes:
        data: The contents.
        added: The added lines, as (index of the first, count) pairs.
    """

    data: bytes
    added: tuple[tuple[int, int], ...]


@dataclass(frozen=True)
class Series:
    """The patches of a checkout, in the order in which they apply."""

    patches: tuple[Patch, ...]

    @property
    def identity(self) -> str:
        """A hash that changes with the patches and their order."""
        lines = [f"{patch.sha256}  {patch.name}" for patch in self.patches]
        return sha256_bytes("\n".join(lines).encode())

    def pins(self) -> dict[str, str]:
        """Return the hash of each pristine file that the series patches."""
        return {file.path: file.base_sha256 for _, file in self._diffs()}

    def apply(self, path: str, pristine: bytes) -> PatchedFile:
        """Apply the whole series to one pristine file.

        Args:
            path: The file, relative to site-packages.
            pristine: Its contents in the base release.

        Raises:
            OverlayError: If the contents are not those the patches were made for.
        """
        lines = pristine.decode("utf-8").split("\n")
        new: dict[int, list[str]] = {}
        for patch, file in self._diffs(path):
            if sha256_bytes(pristine) != file.base_sha256:
                raise OverlayError(
                    f"{path} has sha256 {sha256_bytes(pristine)}, but {patch.name} was "
                    f"made for {file.base_sha256}; use the release of base.lock"
                )
            for index, text in file.context:
                if index >= len(lines) - 1 or lines[index] != text:
                    raise OverlayError(
                        f"{patch.name}: line {index + 1} of {path} is not {text!r}"
                    )
            for insertion in file.insertions:
                if insertion.after >= len(lines):
                    raise OverlayError(
                        f"{patch.name}: {path} has no line {insertion.after}"
                    )
                new.setdefault(insertion.after, []).extend(insertion.lines)
        output: list[str] = []
        added = []
        for index, line in enumerate(lines):
            if index in new:
                added.append((len(output), len(new[index])))
                output += new[index]
            output.append(line)
        return PatchedFile("\n".join(output).encode("utf-8"), tuple(added))

    def _diffs(self, path: str | None = None) -> list[tuple[Patch, FileDiff]]:
        return [
            (patch, file)
            for patch in self.patches
            for file in patch.files
            if path is None or file.path == path
        ]


def without_added(data: bytes, added: tuple[tuple[int, int], ...]) -> bytes:
    """Take the lines that ``PatchedFile.added`` lists out of the contents again."""
    lines = data.decode("utf-8").split("\n")
    for start, count in reversed(added):
        del lines[start : start + count]
    return "\n".join(lines).encode("utf-8")


def series_names(folder: Path) -> list[str]:
    """Return the patch names that ``series`` in ``folder`` lists, in order."""
    path = folder / "series"
    text = path.read_text(encoding="utf-8") if path.exists() else ""
    lines = [line.partition("#")[0].strip() for line in text.split("\n")]
    return [line for line in lines if line]


def load_series(folder: Path) -> Series:
    """Read the series of a checkout.

    Args:
        folder: The ``patches`` folder.

    Raises:
        OverlayError: If the series and the patches there do not match, or two
            patches pin the same file to different hashes.
    """
    names = series_names(folder)
    present = sorted(path.name for path in folder.glob("*.patch"))
    if sorted(names) != present:
        odd = sorted(set(names) ^ set(present)) or sorted(names)
        raise OverlayError(
            f"{folder / 'series'} and the patches beside it do not match: "
            f"{', '.join(odd)}; list every patch once"
        )
    series = Series(tuple(read_patch(folder / name) for name in names))
    pins = series.pins()
    for patch in series.patches:
        for file in patch.files:
            if file.base_sha256 != pins[file.path]:
                raise OverlayError(
                    f"{patch.name} pins {file.path} to {file.base_sha256}, another "
                    f"patch pins it to {pins[file.path]}; one release, one hash"
                )
    return series
