# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""Bringing the error that ends an engine's start to the process that started it.

A worker or an engine core that fails writes what happened into a pipe, and the process
that waits for it raises that instead of a pointer to the log.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Iterable
from multiprocessing.connection import Connection
from typing import Any

FAILED = "FAILED"
_LONGEST = 1500
"""Characters of one error; a report this short is written to a pipe in one piece."""


def send(writer: Connection | None, name: str) -> None:
    """Write the exception that is being handled to the process that waits.

    Args:
        writer: The pipe; None once the start is over.
        name: Of this process, such as "rank 1".
    """
    error = sys.exc_info()[1]
    if writer is None or error is None:
        return
    text = "\n".join([str(error), *getattr(error, "__notes__", ())])
    if len(text) > _LONGEST:
        text = f"... {text[-_LONGEST:]}"
    report = {
        "status": FAILED,
        "time": time.time(),
        "error": f"{name}: {type(error).__name__}: {text}",
    }
    try:
        writer.send(report)
    except OSError:
        return  # The other side has given up already.


def raise_failed(response: dict[str, Any], others: Iterable[Connection]) -> None:
    """Raise what a worker reported, if that is an error.

    Args:
        response: What one worker sent.
        others: The pipes of those that have sent nothing yet. An error on one rank
            soon is one on all; the earliest is its cause and is named first.

    Raises:
        RuntimeError: Has the errors of all workers that failed so far.
    """
    if response["status"] != FAILED:
        return
    reports = [response, *filter(None, map(_received, others))]
    _raise("Worker initialization failed", reports)


def raise_sent(reader: Connection | None) -> None:
    """Raise what engine cores have sent, if anything.

    Raises:
        RuntimeError: Has the errors of all engine cores that failed so far.
    """
    reports = []
    while reader is not None and (report := _received(reader)) is not None:
        reports.append(report)
    if reports:
        _raise("Engine core initialization failed", reports)


def _received(reader: Connection) -> dict[str, Any] | None:
    """A report of failure that waits in a pipe."""
    try:
        message = reader.recv() if reader.poll() else None
    except (EOFError, OSError):
        return None
    return message if message and message["status"] == FAILED else None


def _raise(what: str, reports: list[dict[str, Any]]) -> None:
    reports.sort(key=lambda report: report["time"])
    errors = "\n".join(report["error"] for report in reports)
    raise RuntimeError(f"{what}. {errors}")
