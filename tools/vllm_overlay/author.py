# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""Authoring: get the files of a patch to edit, and turn the edits into the patch."""

import re
import subprocess
import tempfile
from pathlib import Path

from vllm_overlay.base import BaseWheel
from vllm_overlay.common import OverlayError, bullets, sha256_bytes, source_files
from vllm_overlay.patch import (
    PIN_FIELD,
    REQUIRED_FIELDS,
    Insertion,
    Patch,
    parse_patch,
    read_patch,
)
from vllm_overlay.series import Series, series_names

_HUNK = re.compile(r"@@ -(\d+)(?:,(\d+))? \+(\d+)(?:,(\d+))? @@")


def start_edit(base: BaseWheel, patch_path: Path, tree: Path, files: list[str]) -> None:
    """Write the files of one patch, with the patch applied, for editing.

    Args:
        base: The pinned release.
        patch_path: The patch, which need not exist yet.
        tree: The folder to write to.
        files: More files of the release to write, as ``vllm/…`` paths.
    """
    patches = (read_patch(patch_path),) if patch_path.exists() else ()
    series = Series(patches)
    for path in sorted({*series.pins(), *files}):
        target = tree / path
        if target.exists():
            raise OverlayError(f"{target} exists; edit it, or delete it and retry")
        data = series.apply(path, base.read(path)).data
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(data)


def write_patch(base: BaseWheel, patch_path: Path, tree: Path) -> None:
    """Make a patch of the edited files, keeping its header.

    Files of the patch that ``tree`` does not have stay as they are in the patch. A
    new patch gets a header to fill in, and a line in ``series``.

    Args:
        base: The pinned release.
        patch_path: The patch to write or update.
        tree: A folder with edited copies of pristine files.
    """
    header = "".join(f"{field}:\n" for field in REQUIRED_FIELDS)
    changes: dict[str, tuple[Insertion, ...]] = {}
    if patch_path.exists():
        text = patch_path.read_text(encoding="utf-8")
        header = _header(text)
        if "\n--- " in text:
            patch: Patch = parse_patch(patch_path.name, text)
            changes = {file.path: file.insertions for file in patch.files}
    for path, edited in source_files(tree, "vllm").items():
        insertions = _insertions(path, base.read(path), edited.read_bytes())
        changes.pop(path, None)
        if insertions:
            changes[path] = insertions
    if not changes:
        raise OverlayError(f"{tree} holds no edited file; nothing written")
    pins = ""
    body = ""
    for path in sorted(changes):
        pristine = base.read(path)
        pins += f"{PIN_FIELD}: {sha256_bytes(pristine)}  {path}\n"
        body += _render(path, pristine.decode("utf-8").split("\n"), changes[path])
    patch_path.write_text(f"{header}{pins}\n{body}", encoding="utf-8")
    listing = patch_path.with_name("series")
    if patch_path.name not in series_names(patch_path.parent):
        with listing.open("a", encoding="utf-8") as stream:
            stream.write(f"{patch_path.name}\n")


def _header(text: str) -> str:
    """Return a patch's header without the pins, which are written anew."""
    head = re.split(r"^--- ", text, maxsplit=1, flags=re.MULTILINE)[0]
    lines = [line for line in head.split("\n") if not line.startswith(PIN_FIELD)]
    return "\n".join(lines).rstrip("\n") + "\n"


def _insertions(path: str, pristine: bytes, edited: bytes) -> tuple[Insertion, ...]:
    """Compare two versions of a file, refusing all but added lines."""
    with tempfile.TemporaryDirectory() as folder:
        for name, data in (("pristine", pristine), ("edited", edited)):
            (Path(folder) / name).write_bytes(data)
        # --minimal finds an add-only difference whenever there is one.
        command = ["git", "diff", "--no-index", "--no-color", "--no-ext-diff"]
        command += ["--text", "--unified=0", "--minimal", "pristine", "edited"]
        result = subprocess.run(command, cwd=folder, capture_output=True, check=False)
    if result.returncode not in (0, 1):
        raise OverlayError(f"git diff failed: {result.stderr.decode()}")
    old = pristine.decode("utf-8").split("\n")
    new = edited.decode("utf-8").split("\n")
    insertions = []
    problems = []
    for line in result.stdout.decode("utf-8").split("\n"):
        if match := _HUNK.match(line):
            start, removed, first, count = (
                1 if group is None else int(group) for group in match.groups()
            )
            problems += [
                f"line {n}: {old[n - 1]!r}" for n in range(start, start + removed)
            ]
            lines = tuple(new[first - 1 : first - 1 + count])
            insertions.append(Insertion(start, lines))
    if problems:
        raise OverlayError(
            f"the edited {path} changes or removes lines of the release, but patches "
            f"only add lines; put these back:{bullets(problems)}"
        )
    return tuple(insertions)


def _render(path: str, pristine: list[str], insertions: tuple[Insertion, ...]) -> str:
    """Write a file's diff, with the line before each insertion as context."""
    output = [f"--- a/{path}", f"+++ b/{path}"]
    added = 0
    for insertion in insertions:
        after, count = insertion.after, len(insertion.lines)
        if after:
            output.append(f"@@ -{after},1 +{after + added},{count + 1} @@")
            output.append(f" {pristine[after - 1]}")
        else:
            output.append(f"@@ -0,0 +1,{count} @@")
        output += [f"+{line}" for line in insertion.lines]
        added += count
    return "\n".join(output) + "\n"
