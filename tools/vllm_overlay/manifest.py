# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""The manifest that an overlaid vLLM carries, and the RECORD of its distribution."""

import base64
import json
import zlib
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from vllm_overlay.common import OverlayError, sha256_bytes, write_atomically

MANIFEST = "vllm/_training_overlay.json"


@dataclass
class Manifest:
    """What the overlay did to a vLLM.

    Attributes:
        files: The hashes that a patched or added file may have, by path. While an
            apply is under way these are the old and the new one.
        pristine: The release's contents of the patched ones, by path.
        complete: False while an apply or revert is under way or was interrupted.
    """

    files: dict[str, list[str]] = field(default_factory=dict)
    pristine: dict[str, bytes] = field(default_factory=dict)
    complete: bool = True

    @classmethod
    def of(
        cls, files: Mapping[str, bytes], pristine: Mapping[str, bytes]
    ) -> "Manifest":
        """Describe a finished overlay by the contents of its files."""
        hashes = {path: [sha256_bytes(data)] for path, data in files.items()}
        return cls(hashes, dict(pristine))

    def on_the_way_to(self, other: "Manifest") -> "Manifest":
        """Describe every state between this manifest and another one."""
        files = {
            path: list(
                dict.fromkeys(self.files.get(path, []) + other.files.get(path, []))
            )
            for path in self.files | other.files
        }
        return Manifest(files, self.pristine | other.pristine, complete=False)

    def encode(self) -> bytes:
        """Return the file contents."""
        document = {
            "complete": self.complete,
            "files": self.files,
            "pristine": {
                path: base64.b64encode(zlib.compress(data)).decode()
                for path, data in self.pristine.items()
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
            pristine = {
                name: zlib.decompress(base64.b64decode(data))
                for name, data in document["pristine"].items()
            }
            return cls(document["files"], pristine, document["complete"])
        except (ValueError, KeyError, AttributeError, TypeError, zlib.error) as error:
            raise OverlayError(
                f"{path} is damaged or of another version of this tool ({error!r}); "
                "reinstall vLLM, or run `overlay.py apply --revert` of the checkout "
                "that was applied, and apply again"
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
