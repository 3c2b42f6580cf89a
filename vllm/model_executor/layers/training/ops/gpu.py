# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""What the kernels for CUDA ask about the GPU."""

from __future__ import annotations

import functools
from typing import Any

import torch


@functools.cache
def has_large_shared_memory(device: torch.device) -> bool:
    """Whether a block may have the 163 KB of an A100 (others: 99 KB)."""
    properties: Any = torch.cuda.get_device_properties(device)
    return properties.shared_memory_per_block_optin >= 160 * 1024
