# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""Starts `interpreted_triton_checks.py`: the Triton kernels, without a GPU.

Triton decides when a kernel is defined whether it is interpreted, so that takes a
process of its own.
"""

import os
import re
import subprocess
import sys
from pathlib import Path

CHECKS = Path(__file__).with_name("interpreted_triton_checks.py")


def test_interpreted_kernels():
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider"]
    environment = os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    result = subprocess.run(
        [*command, str(CHECKS)],
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
    )
    report = result.stdout + result.stderr
    assert result.returncode == 0, report
    assert re.search(r"^[1-9]\d* passed\b(?!.*skipped)", result.stdout, re.M), report
