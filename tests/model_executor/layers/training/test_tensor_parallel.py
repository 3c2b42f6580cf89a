# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""Starts `tensor_parallel_checks.py` on two ranks."""

import os
import subprocess
import sys
from pathlib import Path

CHECKS = Path(__file__).with_name("tensor_parallel_checks.py")


def test_two_ranks():
    command = [
        *(sys.executable, "-m", "torch.distributed.run", "--standalone"),
        *("--nproc-per-node", "2", "-m", "pytest", "-q", "-x"),
        *("-p", "no:cacheprovider", str(CHECKS)),
    ]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    result = subprocess.run(
        command, env=environment, capture_output=True, text=True, timeout=300
    )
    report = result.stdout + result.stderr
    assert result.returncode == 0, report
    assert report.count(" passed") == 2, report
