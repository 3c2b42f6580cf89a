# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""The patch format: an add-only unified diff with an explanatory header.

A patch only adds lines. Its line numbers are those of the pristine files, whose
hashes are pinned in the header, so every patch of the series stands on its own
and nothing is ever searched for.
"""

import re
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from vllm_overlay.common import OverlayError, sha256_bytes

REQUIRED_FIELDS = ("Subject", "Why", "Why not an extension point", "Unnecessary when")
PIN_FIELD = "Base-SHA256"
# These differ between the CPU and the CUDA release, so no hash can pin them.
UNPATCHABLE = (
    "vllm/_version.py",
    "vllm/platforms/__init__.py",
    "vllm/utils/cpu_triton_utils.py",
)

_FIELD = re.compile(r"([A-Z][A-Za-z0-9 -]*):(?:\s+(.*))?$")
_PIN = re.compile(r"([0-9a-f]{64}) +(\S+)$")
_HUNK = re.compile(r"@@ -(\d+)(?:,(\d+))? \+(\d+)(?:,(\d+))? @@(.*)$")


@dataclass(frozen=True)
class Insertion:
    """New lines that go after the first ``after`` lines of the pristine file."""

    after: int
    lines: tuple[str, ...]


@dataclass(frozen=True)
class FileDiff:
    """What one patch adds to one file."""

    path: str
    base_sha256: str
    insertions: tuple[Insertion, ...]
    context: tuple[tuple[int, str], ...]  # (index of the pristine line, its text)


@dataclass(frozen=True)
class Patch:
    """One patch of the series."""

    name: str
    sha256: str
    fields: dict[str, str]
    files: tuple[FileDiff, ...]

    @property
    def message(self) -> str:
        """The commit message: the subject, then the reasons."""
        reasons = [f"{key}: {self.fields[key]}" for key in REQUIRED_FIELDS[1:]]
        return "\n\n".join([self.fields["Subject"], *reasons]) + "\n"


class _Parser:
    def __init__(self, name: str, text: str) -> None:
        self.name = name
        self.lines = text.split("\n")
        if self.lines[-1] == "":
            self.lines.pop()
        self.at = 0

    def fail(self, problem: str, at: int | None = None) -> OverlayError:
        number = (self.at if at is None else at) + 1
        return OverlayError(f"{self.name}:{number}: {problem}")

    def peek(self) -> str | None:
        return self.lines[self.at] if self.at < len(self.lines) else None

    def header(self) -> tuple[dict[str, str], dict[str, str]]:
        fields: dict[str, str] = {}
        pins: dict[str, str] = {}
        last = ""
        while (line := self.peek()) is not None and not line.startswith("--- "):
            if line.startswith(" ") and line.strip() and last in fields:
                fields[last] = f"{fields[last]}\n{line.strip()}".strip()
            elif match := _FIELD.match(line):
                last, value = match[1], (match[2] or "").strip()
                self._add_field(fields, pins, last, value)
            elif line.strip():
                raise self.fail(
                    f"{line!r} is no header line; write 'Field: text', and indent "
                    "the lines that continue it"
                )
            self.at += 1
        missing = [key for key in REQUIRED_FIELDS if not fields.get(key)]
        if missing:
            raise OverlayError(
                f"{self.name}: the header lacks {', '.join(missing)}; a patch states "
                f"{', '.join(REQUIRED_FIELDS)}"
            )
        return fields, pins

    def _add_field(
        self, fields: dict[str, str], pins: dict[str, str], key: str, value: str
    ) -> None:
        if key == PIN_FIELD:
            pin = _PIN.match(value)
            if pin is None or pin[2] in pins:
                raise self.fail(
                    f"{value!r} is not one '<sha256>  <path>' for each patched file"
                )
            pins[pin[2]] = pin[1]
        elif key not in REQUIRED_FIELDS or key in fields:
            raise self.fail(
                f"field {key!r} is unknown or given twice; the fields are "
                f"{', '.join((*REQUIRED_FIELDS, PIN_FIELD))}"
            )
        else:
            fields[key] = value

    def file(self, pins: dict[str, str]) -> FileDiff:
        start = self.at
        names = self.lines[start : start + 2]
        path = names[0].removeprefix("--- a/")
        if names != [f"--- a/{path}", f"+++ b/{path}"]:
            raise self.fail(
                "expected '--- a/PATH' and '+++ b/PATH' with the same PATH; new files "
                "are not patched in, they belong under the checkout's vllm/"
            )
        pure = PurePosixPath(path)
        if pure.parts[:1] != ("vllm",) or ".." in pure.parts or str(pure) != path:
            raise self.fail(f"{path} is outside vllm/; patch files of vllm/ only")
        if path in UNPATCHABLE:
            raise self.fail(
                f"{path} differs between the CPU and CUDA releases and is never "
                "patched; find another place for the change"
            )
        if path not in pins:
            raise self.fail(f"the header has no '{PIN_FIELD}: <sha256>  {path}'")
        self.at += 2
        insertions: list[Insertion] = []
        context: list[tuple[int, str]] = []
        added = done = 0
        while (line := self.peek()) is not None and line.startswith("@@"):
            done, added = self.hunk(insertions, context, done, added)
        if not insertions:
            raise self.fail(f"{path} has no hunks", start)
        return FileDiff(path, pins[path], tuple(insertions), tuple(context))

    def hunk(
        self,
        insertions: list[Insertion],
        context: list[tuple[int, str]],
        done: int,
        added: int,
    ) -> tuple[int, int]:
        """Read one hunk.

        Args:
            insertions: Where to append the hunk's insertions.
            context: Where to append the hunk's context lines.
            done: Pristine lines that the hunks before this one cover.
            added: Lines that the hunks before this one add.

        Returns:
            ``done`` and ``added`` after this hunk.
        """
        start = self.at
        match = _HUNK.match(self.lines[start])
        if match is None:
            raise self.fail("malformed '@@ -l,n +l,n @@'")
        if match[5].strip():
            raise self.fail("remove the text after the second '@@'")
        counts = [1 if match[i] is None else int(match[i]) for i in (2, 4)]
        old = int(match[1]) - (1 if counts[0] else 0)
        if old < done:
            raise self.fail("hunks overlap or are out of order")
        self.at += 1
        body = self.lines[self.at : self.at + counts[1]]
        kinds = "".join(line[:1] or " " for line in body)
        for offset, kind in enumerate(kinds):
            if kind not in " +":
                raise self.fail(
                    f"{body[offset]!r}: a patch only adds lines; call new code from "
                    "an added line instead of changing or removing one",
                    self.at + offset,
                )
        if kinds.count(" ") != counts[0] or len(kinds) != counts[1]:
            raise self.fail(
                "the counts after '@@' do not match the context and added lines of the "
                "hunk; a patch only adds lines",
                start,
            )
        runs = re.split(r"\++", kinds)
        if len(runs) < 2:
            raise self.fail("the hunk adds nothing", start)
        if max(len(runs[0]), len(runs[-1])) > 1 or max(map(len, runs)) > 2:
            raise self.fail(
                "more than one line of context; make the diff with -U1", start
            )
        expected = old + added + 1
        if int(match[3]) != expected:
            raise self.fail(
                f"the new side starts at line {match[3]}, but the hunks before put it "
                f"at {expected}",
                start,
            )
        position = old
        for block in re.finditer(r"\++| ", kinds):
            lines = tuple(line[1:] for line in body[block.start() : block.end()])
            if block[0] == " ":
                context.append((position, lines[0]))
                position += 1
            else:
                insertions.append(Insertion(position, lines))
        self.at += len(body)
        return position, added + kinds.count("+")


def parse_patch(name: str, text: str) -> Patch:
    """Parse a patch and check everything that needs no other file.

    Args:
        name: The patch's file name, for messages.
        text: Its contents.

    Raises:
        OverlayError: Naming the line, what is wrong with it and what to do.
    """
    parser = _Parser(name, text)
    fields, pins = parser.header()
    files = []
    while (line := parser.peek()) is not None:
        if not line.startswith("--- "):
            raise parser.fail(
                f"{line!r} is part of no hunk: the counts after '@@' are too small, or "
                "a line was removed (a patch only adds lines) or text follows the diff"
            )
        files.append(parser.file(pins))
    paths = [file.path for file in files]
    if not files or sorted(paths) != sorted(pins):
        raise OverlayError(
            f"{name}: patched files ({', '.join(paths) or 'none'}) and {PIN_FIELD} "
            f"fields ({', '.join(pins) or 'none'}) must be the same, each once"
        )
    return Patch(name, sha256_bytes(text.encode()), fields, tuple(files))


def read_patch(path: Path) -> Patch:
    """Parse the patch at ``path``."""
    return parse_patch(path.name, path.read_bytes().decode("utf-8"))
