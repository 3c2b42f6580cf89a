# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""What a machine's GPUs allow."""

import pytest
import torch

# Of an engine: little of a GPU, so that several may run side by side.
MEMORY = (
    {"gpu_memory_utilization": 0.3, "kv_cache_memory_bytes": 1 << 30}
    if torch.cuda.is_available()
    else {}
)


def skip_without_gpus(workers: int) -> None:
    """Skip on a machine with GPUs, of which each worker takes one, but too few."""
    if 0 < torch.cuda.device_count() < workers:
        pytest.skip(f"needs {workers} GPUs, or none")
