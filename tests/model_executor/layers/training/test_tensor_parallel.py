# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""Starts the checks of several ranks, on two and on four."""

from pathlib import Path

import pytest

CHECKS = ["tensor_parallel", "sequence_parallel", "collective"]


@pytest.mark.parametrize(
    ("count", "names"), [(2, [*CHECKS, "compiled_parallel"]), (4, CHECKS)]
)
def test_ranks(count, names, run_on_ranks):
    folder = Path(__file__).parent
    run_on_ranks(count, *(folder / f"{name}_checks.py" for name in names))
