# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""The pinned vLLM release: which file, where it comes from, is it the right one."""

import importlib.util
import os
import runpy
import shutil
import subprocess
import sys
import tempfile
import tomllib
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from vllm_overlay.common import CHECKOUT, OverlayError, sha256_file

DEVICES = ("cpu", "cuda")
NVIDIA_DRIVER = Path("/proc/driver/nvidia/version")


@dataclass(frozen=True)
class BaseFile:
    """One file of the release.

    Attributes:
        version: The release, such as ``"0.32.0"``.
        requirement: What pip is asked for.
        file: The file name it must deliver.
        sha256: The hash the file must have.
        local_version: The local part of the version of the wheel built from it;
            empty for the source distribution.
    """

    version: str
    requirement: str
    file: str
    sha256: str
    local_version: str

    @property
    def built_version(self) -> str:
        """The version of the wheel built from this file."""
        return f"{self.version}+{self.local_version}"


def load_base(kind: str, checkout: Path = CHECKOUT) -> BaseFile:
    """Read one entry of ``base.lock``.

    Args:
        kind: ``"cpu"``, ``"cuda"``, ``"source"``, or the source of another release
            such as ``"source-0.33.0"``.
        checkout: The root of the checkout.
    """
    lock = tomllib.loads((checkout / "base.lock").read_text(encoding="utf-8"))
    entry = lock[kind]
    return BaseFile(
        version=entry.get("version", lock["version"]),
        requirement=entry["requirement"],
        file=entry["file"],
        sha256=entry["sha256"],
        local_version=entry.get("local_version", ""),
    )


def find_device(environ: Mapping[str, str] = os.environ) -> str:
    """Choose the release: ``VLLM_TARGET_DEVICE``, else what the machine has."""
    if device := environ.get("VLLM_TARGET_DEVICE"):
        if device not in DEVICES:
            raise OverlayError(
                f"VLLM_TARGET_DEVICE={device} is not supported; set it to "
                f"{' or '.join(DEVICES)}, or unset it to take what the machine has"
            )
        return device
    if NVIDIA_DRIVER.exists() or shutil.which("nvidia-smi") or torch_is_cuda():
        return "cuda"
    return "cpu"


def torch_is_cuda() -> bool:
    """Read what the installed torch was built for, without importing all of it."""
    spec = importlib.util.find_spec("torch")
    if spec is None or spec.origin is None:
        return False
    version = Path(spec.origin).with_name("version.py")
    return version.exists() and runpy.run_path(str(version)).get("cuda") is not None


def verify(path: Path, base: BaseFile) -> None:
    """Check that ``path`` is the pinned file.

    Raises:
        OverlayError: With the expected and the actual hash.
    """
    actual = sha256_file(path)
    if actual != base.sha256:
        raise OverlayError(
            f"{path} is not the pinned {base.file}: expected sha256 {base.sha256}, "
            f"got {actual}; delete the file if it is still there, and retry"
        )


def fetch(kind: str, checkout: Path = CHECKOUT) -> Path:
    """Return the verified file of the release, downloading it if needed.

    Args:
        kind: As for `load_base`.
        checkout: The root of the checkout; the file is kept in ``build/base``.

    Raises:
        OverlayError: If pip fails or delivers anything but the pinned file.
            Nothing is left behind then.
    """
    base = load_base(kind, checkout)
    folder = checkout / "build" / "base"
    path = folder / base.file
    if path.exists():
        verify(path, base)
        return path
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".download-", dir=folder) as temporary:
        _pip_download(kind, base, Path(temporary))
        delivered = sorted(item.name for item in Path(temporary).iterdir())
        if delivered != [base.file]:
            raise OverlayError(
                f"pip delivered {', '.join(delivered) or 'nothing'} for "
                f"{base.requirement}, expected {base.file} (Linux x86_64); run it on "
                "such a machine, and check pip's configured index"
            )
        verify(Path(temporary) / base.file, base)
        os.replace(Path(temporary) / base.file, path)
    return path


def _pip_download(kind: str, base: BaseFile, folder: Path) -> None:
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps"]
    environment = dict(os.environ)
    if kind.startswith("source"):
        # pip runs the source's setup.py for its metadata, which imports torch and
        # wants to know a version and a device.
        command += ["--no-binary", "vllm", "--no-build-isolation"]
        environment |= {
            "VLLM_VERSION_OVERRIDE": base.version,
            "VLLM_TARGET_DEVICE": "empty",
        }
    else:
        command += ["--only-binary", ":all:"]
    command += ["--dest", str(folder), base.requirement]
    result = subprocess.run(
        command, env=environment, capture_output=True, text=True, check=False
    )
    if result.returncode != 0:
        hint = "check the network and pip's configured index, and retry"
        if kind.startswith("source"):
            hint += "; for the source, install torch and requirements/upstream.txt"
        raise OverlayError(
            f"pip could not download {base.requirement} ({hint}):\n{result.stderr}"
        )


class BaseWheel:
    """Read access to the pristine files inside the base wheel."""

    def __init__(self, path: Path) -> None:
        self.archive = zipfile.ZipFile(path)
        self.names = frozenset(self.archive.namelist())

    def read(self, path: str) -> bytes:
        """Return a file's contents.

        Raises:
            OverlayError: If the release has no such file.
        """
        if path not in self.names:
            raise OverlayError(
                f"{path} is not in the base release; new files belong under the "
                "checkout's vllm/, and patches are for files that exist"
            )
        return self.archive.read(path)
