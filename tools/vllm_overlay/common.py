# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""Helpers shared by the modules of the overlay tool."""

import hashlib
import os
import subprocess
from collections.abc import Mapping
from pathlib import Path

CHECKOUT = Path(__file__).resolve().parents[2]

# The compiled kernels: where vLLM has them, and where a checkout builds them.
EXTENSION = "vllm/_training_C.abi3.so"
BUILT_EXTENSION = "build/extension/_training_C.abi3.so"

# Files a running system, an editor or a merge leaves behind.
_JUNK_SUFFIXES = (".pyc", ".pyo", ".orig", ".rej", ".swp", "~")


# Who commits, unless a caller names someone else.
OURS = {"name": "vLLM overlay", "email": "overlay@localhost"}


class OverlayError(Exception):
    """A request that cannot be carried out; the message says what to do."""


def git(
    folder: Path, *arguments: str | Path, identity: Mapping[str, str] = OURS
) -> str:
    """Run git in a folder, out of reach of repositories around it and of settings.

    Within an ignored folder of another repository `git apply` would skip files
    without a word.

    Args:
        folder: Where to run it; a repository of its own, or none.
        *arguments: Git's command line.
        identity: Who commits: name and email.

    Returns:
        What git wrote.

    Raises:
        OverlayError: If the folder is absent, or git is not installed or fails.
    """
    if not folder.is_dir():
        raise OverlayError(f"{folder} is no folder")
    environment = {k: v for k, v in os.environ.items() if not k.startswith("GIT_")}
    environment |= {
        "GIT_CEILING_DIRECTORIES": str(folder.resolve().parent),
        "GIT_CONFIG_GLOBAL": os.devnull,
        "GIT_CONFIG_NOSYSTEM": "1",
    }
    environment |= {
        f"GIT_{role}_{key.upper()}": value
        for role in ("AUTHOR", "COMMITTER")
        for key, value in identity.items()
    }
    # Git would pack the objects beside us, and remove them while they are copied.
    command = ["git", "-c", "gc.auto=0", *map(str, arguments)]
    try:
        result = subprocess.run(
            command, cwd=folder, env=environment, capture_output=True, check=False
        )
    except FileNotFoundError as error:
        raise OverlayError(
            "git is needed to apply the patches and is not on PATH; install it, for "
            "example with `apt-get install git`"
        ) from error
    if result.returncode:
        raise OverlayError(
            f"`git {' '.join(map(str, arguments))}` failed in {folder}:\n"
            f"{result.stderr.decode(errors='replace')}"
        )
    return result.stdout.decode("utf-8")


def blob_id(data: bytes) -> str:
    """Return the id that git gives to a file with these contents."""
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


def sha256_bytes(data: bytes) -> str:
    """Return the hexadecimal SHA-256 of ``data``."""
    return hashlib.sha256(data).hexdigest()


def sha256_file(path: Path) -> str:
    """Return the hexadecimal SHA-256 of the file at ``path``."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def temporary_beside(path: Path) -> Path:
    """Return where the new contents of ``path`` are written before the rename."""
    return path.with_name(f".{path.name}.overlay-new")


def write_atomically(path: Path, data: bytes, mode: int = 0o644) -> None:
    """Write ``data`` to ``path``, whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = temporary_beside(path)
    temporary.write_bytes(data)
    temporary.chmod(mode)
    os.replace(temporary, path)


def link_atomically(path: Path, target: Path) -> None:
    """Make ``path`` a symbolic link to ``target``, replacing what is there."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = temporary_beside(path)
    temporary.unlink(missing_ok=True)
    temporary.symlink_to(target)
    os.replace(temporary, path)


def is_junk(relative: Path) -> bool:
    """Say whether a path is a by-product, not a source file."""
    return any(
        part == "__pycache__" or part.startswith(".") or part.endswith(_JUNK_SUFFIXES)
        for part in relative.parts
    )


def source_files(checkout: Path, *roots: str) -> dict[str, Path]:
    """List the source files below some folders of a checkout.

    Args:
        checkout: The root of the checkout.
        *roots: Folders of it, such as ``"vllm"``; absent ones are empty.

    Returns:
        The files by their path relative to the checkout, in sorted order.
    """
    found = {}
    for root in roots:
        for path in sorted((checkout / root).rglob("*")):
            relative = path.relative_to(checkout)
            if path.is_file() and not is_junk(relative.relative_to(root)):
                found[relative.as_posix()] = path
    return found


def overlay_files(checkout: Path) -> dict[str, Path]:
    """List what a checkout adds to the ``vllm`` package, by path.

    The compiled kernels are among it once they are built.
    """
    files = source_files(checkout, "vllm")
    built = checkout / BUILT_EXTENSION
    if built.exists():
        files[EXTENSION] = built
    return files


def bullets(items: list[str]) -> str:
    """Format problems as an indented list, one a line."""
    return "".join(f"\n  {item}" for item in items)
