# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""Starts `tensor_parallel_checks.py` on two ranks."""

from pathlib import Path


def test_two_ranks(run_on_two_ranks):
    run_on_two_ranks(Path(__file__).with_name("tensor_parallel_checks.py"))
