# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""A pytest plugin that writes each test's outcome as it is known.

The lines, `[test, outcome]` in JSON, go to the file named by OUTCOMES. A test that
began and has no further line took its process down with it.
"""

import json
import os
from typing import TextIO

import pytest

STARTED = "crashed"


def _write(test: str, outcome: str) -> None:
    with _file() as file:
        file.write(json.dumps([test, outcome]) + "\n")


def _file() -> TextIO:
    return open(os.environ["OUTCOMES"], "a", encoding="utf-8")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Leave out what vLLM's conftest does after each test.

    It empties the accelerator's cache, which fails in a torch without one and would
    end every test in an error.
    """
    for item in items:
        item.add_marker("skip_global_cleanup")


def pytest_runtest_logstart(nodeid: str) -> None:
    """A test begins."""
    _write(nodeid, STARTED)


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    """A phase of a test ended: its call counts, and what went wrong around it."""
    if report.when == "call" or not report.passed:
        _write(report.nodeid, report.outcome)


def pytest_collectreport(report: pytest.CollectReport) -> None:
    """A file that cannot be collected counts as one failed test."""
    if report.failed:
        _write(report.nodeid, report.outcome)
