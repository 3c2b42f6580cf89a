# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""The series: patches in git's format that only add lines to files of the release.

Git parses and applies them. Its `index` lines have the ids of a file before and after
each patch, so the release is pinned by hash, and so is the result.
"""

import re
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from vllm_overlay.common import OverlayError, blob_id, bullets, git

FIELDS = ("Subject", "Why", "Why not an extension point", "Unnecessary when")
# These differ between the CPU and the CUDA release, so no hash can pin them.
UNPATCHABLE = (
    "vllm/_version.py",
    "vllm/platforms/__init__.py",
    "vllm/utils/cpu_triton_utils.py",
)

_FILE = re.compile(
    r"^diff --git a/(vllm/(?!\S*\.\.)\S+) b/\1\n"
    r"index ([0-9a-f]{40})\.\.([0-9a-f]{40}) 100644\n"
    r"--- a/\1\n\+\+\+ b/\1\n(?=@@ )",
    re.MULTILINE,
)
_BY_HAND = "; after an edit by hand run `overlay.py edit` and `overlay.py save`"
_STRAY = re.compile(r"^[^-+ @\\\n]", re.MULTILINE)
_HUNK = re.compile(r"@@ -\d+(,\d+)? \+\d+(,\d+)? @@")


@dataclass(frozen=True)
class Patch:
    """One patch of the series.

    Attributes:
        path: The patch itself.
        message: Its subject and reasons, as a commit message.
        files: The ids of each patched file before and after the patch, by path.
    """

    path: Path
    message: str
    files: Mapping[str, tuple[str, str]]


@dataclass(frozen=True)
class Series:
    """The patches of a checkout, each made for what the former ones leave."""

    patches: tuple[Patch, ...] = ()

    def pins(self) -> dict[str, str]:
        """Return the id of each pristine file that the series patches."""
        pins: dict[str, str] = {}
        for patch in self.patches:
            for path, (before, _) in patch.files.items():
                pins.setdefault(path, before)
        return pins

    def apply(self, pristine: Mapping[str, bytes]) -> dict[str, bytes]:
        """Apply the series in a folder of its own.

        Args:
            pristine: The contents of the files in ``pins()`` in the release.

        Returns:
            The contents of the patched files.

        Raises:
            OverlayError: If they are not those that the patches were made for.
        """
        if not self.patches:
            return {}
        ids = {path: blob_id(pristine[path]) for path in self.pins()}
        for patch in self.patches:
            for path, (before, after) in patch.files.items():
                if ids[path] != before:
                    raise OverlayError(
                        f"{patch.path.name} was made for {before} at {path}, but there "
                        f"is {ids[path]}; use the release of base.lock{_BY_HAND}"
                    )
                ids[path] = after
        with tempfile.TemporaryDirectory() as folder:
            tree = Path(folder)
            for path in ids:
                (tree / path).parent.mkdir(parents=True, exist_ok=True)
                (tree / path).write_bytes(pristine[path])
            patches = [patch.path.resolve() for patch in self.patches]
            git(tree, "apply", "--whitespace=nowarn", *patches)
            patched = {path: (tree / path).read_bytes() for path in ids}
        for path, data in patched.items():
            if blob_id(data) != ids[path]:
                raise OverlayError(
                    f"{path} is {blob_id(data)} with the patches applied, but the last "
                    f"one says that it is {ids[path]}{_BY_HAND}"
                )
        return patched


def load_series(folder: Path) -> Series:
    """Read the patches in a folder, in the order of their numbers."""
    return Series(tuple(read_patch(path) for path in sorted(folder.glob("*.patch"))))


def read_patch(path: Path) -> Patch:
    """Read a patch and check what can be checked without the files.

    Raises:
        OverlayError: Naming the patch, what is wrong with it and what to do.
    """
    header, separator, diff = path.read_bytes().decode("utf-8").partition("\ndiff ")
    missing = [f for f in FIELDS if not re.search(rf"^{f}: *\S", header, re.MULTILINE)]
    if missing or not re.match("Subject: .*\n\n", header):
        raise OverlayError(
            f"{path.name}: the header lacks {', '.join(missing) or 'its first line'}; "
            f"a patch starts with 'Subject: text', an empty line, and a paragraph each "
            f"for {', '.join(FIELDS[1:])}"
        )
    diff = separator.lstrip("\n") + diff
    files = {match[1]: (match[2], match[3]) for match in _FILE.finditer(diff)}
    hunks, count = _FILE.subn("", diff)
    if not files or len(files) != count or _STRAY.search(hunks):
        raise OverlayError(
            f"{path.name}: a patch changes existing files below vllm/, each once, with "
            "full ids in `index` lines and no change of mode; new files are not "
            "patched in, they belong under the checkout's vllm/"
        )
    if excluded := sorted(files.keys() & set(UNPATCHABLE)):
        raise OverlayError(
            f"{path.name}: {', '.join(excluded)} differs between the CPU and CUDA "
            "releases and is never patched; find another place for the change"
        )
    lines = hunks.split("\n")
    if removed := [line for line in lines if line.startswith("-")]:
        raise OverlayError(
            f"{path.name}: a patch only adds lines; call new code from an added line "
            f"instead of changing or removing these:{bullets(removed)}"
        )
    for before, line, after in zip(["", *lines], lines, [*lines[1:], ""], strict=False):
        if line.startswith("@@") and not _HUNK.fullmatch(line):
            raise OverlayError(f"{path.name}: {line!r}: remove what follows '@@'")
        if line.startswith(" ") and "+" not in (before[:1], after[:1]):
            raise OverlayError(
                f"{path.name}: {line!r} is beside no added line; make the diff with -U1"
            )
    return Patch(path, header.removeprefix("Subject: "), files)
