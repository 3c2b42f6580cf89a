# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""The stack of commits for vLLM: which file and which patch belongs to which commit.

The table is patches/upstream/stack.toml.
"""

import fnmatch
import tomllib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from vllm_overlay.common import OverlayError, bullets, source_files
from vllm_overlay.series import Patch, Series

_ROOTS = ("vllm", "csrc", "tests", "docs", "examples", "benchmarks", ".buildkite")


@dataclass(frozen=True)
class Commit:
    """One commit of the stack.

    Attributes:
        subject: Its first line; empty: that of the patch.
        why: What follows; the reasons of the patch come after it.
        patch: The number of a patch of the series such as ``"0003"``, a file in
            patches/upstream, or empty.
        files: Patterns of paths. One that ends in a slash is a folder, ``*`` stands
            for any characters.
    """

    subject: str = ""
    why: str = ""
    patch: str = ""
    files: tuple[str, ...] = ()

    def message(self, patch: Patch | None) -> str:
        """Return the commit's message."""
        subject, _, reasons = (patch.message if patch else "").partition("\n")
        parts = [self.subject or subject, self.why, reasons]
        return "\n\n".join(filter(None, (part.strip() for part in parts))) + "\n"


@dataclass(frozen=True)
class Stack:
    """The table.

    Attributes:
        commits: In their order.
        here: Patterns of the files that vLLM does not get.
    """

    commits: tuple[Commit, ...]
    here: tuple[str, ...]

    def assign(self, paths: Iterable[str]) -> tuple[list[str], ...]:
        """Give each path to the commit that has the longest pattern for it.

        Returns:
            The paths of each commit.

        Raises:
            OverlayError: If no pattern or two of equal length are for a path, or none
                of the paths is for a pattern.
        """
        result: tuple[list[str], ...] = tuple([] for _ in self.commits)
        stays: list[str] = []
        owners = [(pattern, stays) for pattern in self.here]
        for commit, its in zip(self.commits, result):
            owners += [(pattern, its) for pattern in commit.files]
        unused, wrong = {pattern for pattern, _ in owners}, []
        for path in paths:
            matches = [entry for entry in owners if _matches(entry[0], path)]
            longest = max((len(pattern) for pattern, _ in matches), default=0)
            best = [entry for entry in matches if len(entry[0]) == longest]
            unused -= {pattern for pattern, _ in best}
            if len(best) == 1:
                best[0][1].append(path)
            else:
                wrong.append(f"{path} is in {len(best)} commits")
        wrong += [f"{pattern} is for no file" for pattern in sorted(unused)]
        if wrong:
            raise OverlayError(f"patches/upstream/stack.toml:{bullets(wrong)}")
        return result


def _matches(pattern: str, path: str) -> bool:
    if pattern.endswith("/"):
        pattern += "*"
    return fnmatch.fnmatchcase(path, pattern)


def load_stack(checkout: Path, series: Series) -> Stack:
    """Read the table.

    Raises:
        OverlayError: If a patch of the series is not in exactly one commit.
    """
    text = (checkout / "patches/upstream/stack.toml").read_text(encoding="utf-8")
    table = tomllib.loads(text)
    commits = tuple(
        Commit(**entry | {"files": tuple(entry.get("files", ()))})
        for entry in table["commit"]
    )
    listed = sorted(c.patch for c in commits if c.patch and "." not in c.patch)
    known = sorted(number(patch) for patch in series.patches)
    if listed != known:
        raise OverlayError(
            f"patches/upstream/stack.toml has the patches {', '.join(listed)}, the "
            f"series has {', '.join(known)}; give each a commit"
        )
    return Stack(commits, tuple(table["here"]))


def number(patch: Patch) -> str:
    """Return the number that a patch's name starts with."""
    return patch.path.name.partition("-")[0]


def candidates(checkout: Path) -> Mapping[str, Path]:
    """List the files of a checkout that vLLM may get, by path."""
    return source_files(checkout, *_ROOTS)
