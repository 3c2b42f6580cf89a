# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""Trainers of several processes, through torchrun: four at work, and two that die."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent


def torchrun(count, arguments, folder, *options):
    """Start torchrun and wait; its process and what it wrote."""
    command = [
        *(sys.executable, "-m", "torch.distributed.run", "--standalone", *options),
        *("--nproc-per-node", str(count), *map(str, arguments)),
    ]
    environment = os.environ | {
        "OMP_NUM_THREADS": "1",
        "CHECKS_FOLDER": str(folder),
        "PYTHONPATH": str(HERE),
    }
    return subprocess.run(
        command, env=environment, capture_output=True, text=True, timeout=300
    )


@pytest.fixture(scope="module")
def four_ranks(tmp_path_factory):
    """What four ranks have checked and left in their folder."""
    folder = tmp_path_factory.mktemp("four")
    checks = ["-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", "--durations=8"]
    done = torchrun(4, [*checks, HERE / "distributed_checks.py"], folder)
    return folder, done


def test_four_ranks(four_ranks):
    _, done = four_ranks
    report = done.stdout + done.stderr
    print(report)
    assert done.returncode == 0, report
    assert report.count(" passed") == 4, report
