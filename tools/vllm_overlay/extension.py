# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""Compile the kernels for CPU with CMake."""

import importlib.util
import shutil
import subprocess
import sys
from pathlib import Path

from vllm_overlay.common import BUILT_EXTENSION, OverlayError


def build(checkout: Path) -> Path:
    """Compile what changed since the last build.

    Args:
        checkout: The root of the checkout.

    Returns:
        The library, which is replaced only when the build succeeded.

    Raises:
        OverlayError: If a tool or torch is missing, or the compiler fails.
    """
    torch = importlib.util.find_spec("torch")
    if torch is None or torch.origin is None:
        raise OverlayError(
            f"the kernels are compiled against torch, which {sys.executable} does not "
            "have; install it and build with --no-build-isolation (`make setup` does "
            "both)"
        )
    library = checkout / BUILT_EXTENSION
    folder = library.parent / "objects"
    cmake = _find("cmake")
    configure = [
        *(cmake, "-G", "Ninja", f"-DCMAKE_MAKE_PROGRAM={_find('ninja')}"),
        *("-S", str(checkout), "-B", str(folder)),
        f"-DTORCH_ROOT={Path(torch.origin).parent}",
    ]
    _run(configure)
    _run([cmake, "--build", str(folder)])
    new = folder / library.name
    if not library.exists() or library.read_bytes() != new.read_bytes():
        temporary = library.with_name(f".{library.name}.new")
        shutil.copyfile(new, temporary)
        temporary.replace(library)
    return library


def _find(program: str) -> str:
    """Find a program beside the running Python, else on PATH."""
    beside = Path(sys.executable).parent / program
    path = str(beside) if beside.exists() else shutil.which(program)
    if path is None:
        raise OverlayError(
            f"{program} is needed to compile the kernels; `pip install {program}`"
        )
    return path


def _run(command: list[str]) -> None:
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    if result.returncode:
        raise OverlayError(
            f"cannot compile the kernels: `{' '.join(command)}` failed. A C++20 "
            f"compiler is needed (g++ 12 or newer, or clang):\n"
            f"{result.stdout[-4000:]}{result.stderr[-4000:]}"
        )
