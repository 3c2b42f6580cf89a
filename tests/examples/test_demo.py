# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""The demo, with two training steps: everything it does, quickly."""

import json
import os
from pathlib import Path

from tests.forks import run_python

DEMO = Path(__file__).parents[2] / "examples" / "demo.py"


def test_the_demo(tmp_path):
    done = run_python(
        [DEMO, "--steps", 2, "--out", tmp_path],
        timeout=500,
        # Traced, but not compiled to C++.
        env=os.environ
        | {"VLLM_ENABLE_V1_MULTIPROCESSING": "1", "VLLM_CPU_CI_ENV": "1"},
    )
    assert done.returncode == 0, f"{done.stdout[-2000:]}\n{done.stderr[-4000:]}"
    report = json.loads((tmp_path / "report.json").read_text())
    assert report["train"]["steps"] == 2
    assert 7 < report["train"]["loss_first"] < 10
    assert report["serve"]["tensor_parallel_size"] == 2
    tokens = report["serve"]["tokens"]
    assert 0 < report["parity"]["equal"] == report["parity"]["tokens"] == tokens
    assert report["parity"]["max_abs_diff"] == 0
    assert (tmp_path / "report.png").read_bytes().startswith(b"\x89PNG")
