# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""Install the CPU build of torch, or say how to get it.

Run with the Python of the environment it is for. The plain ``torch==…`` on the
package index is a CUDA build that brings gigabytes of CUDA libraries, so it is never
what this asks pip for.
"""

import importlib.metadata
import subprocess
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))

from vllm_overlay.base import torch_is_cuda  # noqa: E402
from vllm_overlay.wheel import CPU_TORCH  # noqa: E402


def is_installed() -> bool:
    """Say whether the right torch is there, built for CPU."""
    try:
        version = importlib.metadata.version("torch")
    except importlib.metadata.PackageNotFoundError:
        return False
    return f"torch=={version.partition('+')[0]}" == CPU_TORCH and not torch_is_cuda()


def main() -> int:
    """Install torch; return the exit status."""
    if is_installed():
        return 0
    wanted = f"{CPU_TORCH}+cpu"
    command = [sys.executable, "-m", "pip", "install", "--quiet", wanted]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    if result.returncode == 0:
        return 0
    scripts = Path(sys.prefix).name + "/bin"
    print(
        f"{result.stderr}\n"
        f"error: pip could not install {wanted}. The {CPU_TORCH} that it may find "
        "instead is a CUDA build\nof several gigabytes, so it was not installed. Get "
        "the CPU build with this command, and retry:\n\n"
        f"    {scripts}/pip install uv && {scripts}/uv pip install "
        f"--torch-backend=cpu {CPU_TORCH}\n",
        file=sys.stderr,
    )
    return 1


if __name__ == "__main__":
    sys.exit(main())
