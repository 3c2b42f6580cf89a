# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""What a machine's GPUs allow."""

import pytest
import torch


def skip_without_gpus(workers: int) -> None:
    """Skip on a machine with GPUs, of which each worker takes one, but too few."""
    if 0 < torch.cuda.device_count() < workers:
        pytest.skip(f"needs {workers} GPUs, or none")
