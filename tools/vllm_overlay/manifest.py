# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""The manifest that an overlaid vLLM carries, and the RECORD of its distribution."""

import base64
import json
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from vllm_overlay.common import OverlayError, sha256_bytes, write_atomically
from vllm_overlay.series import PatchedFile, without_added

MANIFEST = "vllm/_training_overlay.json"


@dataclass
class PatchedEntry:
    """A patched file: its pristine hash, and by hash where lines were added.

    While an apply is under way there are two states, the old and the new one.
    """

    pristine: str
    states: dict[str, tuple[tuple[int, int], ...]]

    def restore(self, data: bytes) -> bytes | None:
        """Return the pristine contents, or None if the file was changed."""
        actual = sha256_bytes(data)
        if actual == self.pristine:
            return data
        if actual in self.states:
            restored = without_added(data, self.states[actual])
            if sha256_bytes(restored) == self.pristine:
                return restored
        return None


@dataclass
class Manifest:
    """What the overlay did to a vLLM.

    Attributes:
        series: The identity of the series.
        added: The hashes an added file may have, by path.
        patched: The patched files, by path.
        complete: False while an apply or revert is under way or was interrupted.
    """

    series: str = ""
    added: dict[str, list[str]] = field(default_factory=dict)
    patched: dict[str, PatchedEntry] = field(default_factory=dict)
    complete: bool = True

    @classmethod
    def of(
        cls,
        series: str,
        added: Mapping[str, bytes],
        patched: Mapping[str, tuple[str, PatchedFile]],
    ) -> "Manifest":
        """Describe a finished overlay.

        Args:
            series: The identity of the series.
            added: The contents of the added files, by path.
            patched: The pristine hash and the result, by path.
        """
        entries = {
            path: PatchedEntry(pristine, {sha256_bytes(file.data): file.added})
            for path, (pristine, file) in patched.items()
        }
        hashes = {path: [sha256_bytes(data)] for path, data in added.items()}
        return cls(series, hashes, entries)

    def on_the_way_to(self, other: "Manifest") -> "Manifest":
        """Describe every state between this manifest and another one."""
        added = {path: list(hashes) for path, hashes in self.added.items()}
        for path, hashes in other.added.items():
            added[path] = list(dict.fromkeys([*added.get(path, []), *hashes]))
        patched = dict(self.patched)
        for path, entry in other.patched.items():
            known = patched[path].states if path in patched else {}
            patched[path] = PatchedEntry(entry.pristine, known | entry.states)
        return Manifest(other.series, added, patched, complete=False)

    def encode(self) -> bytes:
        """Return the file contents."""
        document = {
            "series": self.series,
            "complete": self.complete,
            "added": self.added,
            "patched": {
                path: {
                    "pristine_sha256": entry.pristine,
                    "patched_sha256": entry.states,
                }
                for path, entry in self.patched.items()
            },
        }
        return (json.dumps(document, indent=1) + "\n").encode()

    @classmethod
    def read(cls, site: Path) -> "Manifest | None":
        """Read the manifest of a vLLM, None if it has no overlay."""
        path = site / MANIFEST
        if not path.exists():
            return None
        try:
            document = json.loads(path.read_bytes())
            patched = {
                name: PatchedEntry(
                    entry["pristine_sha256"],
                    {
                        sha256: tuple((start, count) for start, count in added)
                        for sha256, added in entry["patched_sha256"].items()
                    },
                )
                for name, entry in document["patched"].items()
            }
            return cls(
                document["series"], document["added"], patched, document["complete"]
            )
        except (ValueError, KeyError, AttributeError, TypeError) as error:
            raise OverlayError(
                f"{path} is damaged ({error!r}); reinstall vLLM and apply again"
            ) from error


def record_line(path: str, sha256: str, size: int) -> str:
    """Return a file's line in RECORD."""
    digest = base64.urlsafe_b64encode(bytes.fromhex(sha256)).rstrip(b"=").decode()
    name = f'"{path}"' if "," in path else path
    return f"{name},sha256={digest},{size}"


def update_record(
    dist_info: Path, changed: Mapping[str, bytes], removed: Collection[str]
) -> None:
    """Make RECORD of an installed distribution say what is installed.

    Args:
        dist_info: The distribution's ``*.dist-info`` folder.
        changed: The contents of new and changed files, by path.
        removed: The paths that are no longer installed.
    """
    path = dist_info / "RECORD"
    if not path.exists():
        return
    pending = dict(changed)
    old = path.read_bytes()
    lines = []
    for line in old.decode("utf-8").splitlines():
        name = line.split(",")[0]
        if name in pending:
            data = pending.pop(name)
            lines.append(record_line(name, sha256_bytes(data), len(data)))
        elif name not in removed:
            lines.append(line)
    lines += [
        record_line(name, sha256_bytes(data), len(data))
        for name, data in pending.items()
    ]
    newline = "\r\n" if b"\r\n" in old else "\n"
    new = "".join(line + newline for line in lines).encode()
    if new != old:
        write_atomically(path, new)
