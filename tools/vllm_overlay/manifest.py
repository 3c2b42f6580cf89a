# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""The manifest that an overlaid vLLM carries, and the RECORD of its distribution."""

import base64
import json
import zlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from vllm_overlay.common import OverlayError, sha256_bytes, write_atomically

MANIFEST = "vllm/_training_overlay.json"


@dataclass
class Change:
    """What the overlay did to one file.

    Attributes:
        released: The contents that the release has there, None if no file.
        hashes: Of the contents that the overlay has put there: one, or two while an
            apply is under way.
    """

    released: bytes | None
    hashes: list[str]


@dataclass
class Manifest:
    """What the overlay did to a vLLM.

    Attributes:
        files: The patched and the added files, by path.
        complete: False while an apply or revert is under way or was interrupted.
    """

    files: dict[str, Change] = field(default_factory=dict)
    complete: bool = True

    @classmethod
    def of(
        cls, files: Mapping[str, bytes], released: Mapping[str, bytes | None]
    ) -> "Manifest":
        """Describe a finished overlay.

        Args:
            files: The contents of the patched and added files, by path.
            released: What the release has at these paths; nothing if left out.
        """
        return cls(
            {
                path: Change(released.get(path), [sha256_bytes(data)])
                for path, data in files.items()
            }
        )

    def on_the_way_to(self, other: "Manifest") -> "Manifest":
        """Describe every state between this manifest and another one."""
        files = self.files | other.files
        for path in self.files.keys() & other.files.keys():
            hashes = [*self.files[path].hashes, *other.files[path].hashes]
            files[path] = Change(files[path].released, list(dict.fromkeys(hashes)))
        return Manifest(files, complete=False)

    def encode(self) -> bytes:
        """Return the file contents."""
        files = {
            path: {
                "released": None
                if change.released is None
                else base64.b64encode(zlib.compress(change.released)).decode(),
                "sha256": change.hashes,
            }
            for path, change in self.files.items()
        }
        document = {"complete": self.complete, "files": files}
        return (json.dumps(document, indent=1) + "\n").encode()

    @classmethod
    def read(cls, site: Path) -> "Manifest | None":
        """Read the manifest of a vLLM, None if it has no overlay."""
        path = site / MANIFEST
        if not path.exists():
            return None
        try:
            document = json.loads(path.read_bytes())
            files = {
                name: Change(
                    None
                    if (released := change["released"]) is None
                    else zlib.decompress(base64.b64decode(released)),
                    change["sha256"],
                )
                for name, change in document["files"].items()
            }
            return cls(files, document["complete"])
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


def update_record(dist_info: Path, files: Mapping[str, bytes | None]) -> None:
    """Make RECORD of an installed distribution say what is installed.

    Args:
        dist_info: The distribution's ``*.dist-info`` folder.
        files: The contents of what changed by path, None for no file.
    """
    path = dist_info / "RECORD"
    if not path.exists():
        return
    old = path.read_bytes()
    lines = {line.rsplit(",", 2)[0]: line for line in old.decode().splitlines()}
    for name, data in files.items():
        if data is None:
            lines.pop(name, None)
        else:
            lines[name] = record_line(name, sha256_bytes(data), len(data))
    newline = "\r\n" if b"\r\n" in old else "\n"
    new = "".join(line + newline for line in lines.values()).encode()
    if new != old:
        write_atomically(path, new)
