# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""Bringing the error that ends an engine to the process that uses it.

A worker or an engine core that fails writes what happened into a pipe, and the process
that waits for it raises that instead of a pointer to the log. A worker that is killed
writes nothing; its executor notes it.
"""

from __future__ import annotations

import multiprocessing
import sys
import threading
import time
from collections.abc import Iterable, Sequence
from multiprocessing.connection import Connection, wait
from typing import Any

FAILED = "FAILED"
_SECONDS_TO_DRAIN = 5
_NOTING = threading.Lock()
_LONGEST = 1500
"""Characters of one error; a report this short is written to a pipe in one piece."""


def pipe() -> tuple[Connection, Connection]:
    """Where engine cores report: the end to read, and the end to write."""
    return multiprocessing.Pipe(duplex=False)


def send(writer: Connection | None, name: str) -> None:
    """Write the exception that is being handled to the process that waits.

    Args:
        writer: The pipe; None where the other side no longer waits.
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


def raise_sent(manager: Any) -> None:
    """Raise what engine cores sent while they started, if anything.

    Args:
        manager: Of the engine cores; only one that starts processes has a pipe.

    Raises:
        RuntimeError: Has the errors of all engine cores that failed so far.
    """
    if reports := _all_received(manager):
        _raise("Engine core initialization failed", reports)


def with_cause(error: Exception, manager: Any) -> Exception:
    """An `EngineDeadError` that says what its engine core sent before it died."""
    if reports := _all_received(manager):
        error.args = (f"{error} {_text(reports)}",)
    return error


def note_death(executor: Any, who: str) -> None:
    """Keep in mind which worker of an executor died first."""
    if getattr(executor, "death", None) is None:
        executor.death = (
            f"{who} died while the engine ran. If it was not killed by hand, the log "
            "above or the kernel's (out of memory?) says why. Start a new engine."
        )


def note_ended(executor: Any) -> None:
    """Keep in mind which of an executor's processes ended first, if one has.

    A process that used a GPU needs seconds from its end to its exit code. What asks in
    the meantime waits here.
    """
    with _NOTING:
        if getattr(executor, "death", None) is not None:
            return
        handles = getattr(executor, "workers", None) or ()
        processes = {handle.proc.sentinel: handle.proc for handle in handles}
        if ended := wait(list(processes), timeout=0):
            note_death(executor, _described(processes[ended[0]]))


def raise_death(executor: Any) -> None:
    """Raise what `note_death` noted, or would have if its thread had been faster.

    Raises:
        RuntimeError: Names the worker that died first.
    """
    note_ended(executor)
    if (death := getattr(executor, "death", None)) is not None:
        raise RuntimeError(death) from None


def drain_answers(executor: Any, queues: Sequence[Any], failed: Any) -> None:
    """Called when one worker's answer to a call of all is an error.

    Takes the answers of the workers after it out of their queues, where they would be
    taken for answers to the next call. Those that do not come soon are taken out by
    `discard_late_answers`.

    Args:
        executor: Whose call it was.
        queues: Of the workers that answer, in the order they are read.
        failed: The queue that the error came from.

    Raises:
        RuntimeError: A worker died; names it.
    """
    position = next(i for i, queue in enumerate(queues) if queue is failed)
    deadline = time.monotonic() + _SECONDS_TO_DRAIN
    for queue in queues[position + 1 :]:
        try:
            queue.dequeue(timeout=max(0.0, deadline - time.monotonic()))
        except (TimeoutError, RuntimeError):
            # One that hangs in a collective without the failed one gives no answer.
            owed = vars(executor).setdefault("owed_answers", {})
            owed[id(queue)] = owed.get(id(queue), 0) + 1
    raise_death(executor)


def discard_late_answers(executor: Any, queue: Any, timeout: float | None) -> None:
    """Take late answers to calls that failed out of a queue, before it is read.

    Args:
        executor: Whose queue it is.
        queue: Of one worker.
        timeout: In seconds, for each of them; None: no limit.

    Raises:
        TimeoutError: They have not come.
    """
    owed = getattr(executor, "owed_answers", {})
    while owed.get(id(queue)):
        queue.dequeue(timeout=timeout)
        owed[id(queue)] -= 1


def _described(process: Any) -> str:
    """A worker process that has ended, in words."""
    process.join()
    return f"{process.name} (pid {process.pid}, exit code {process.exitcode})"


def _all_received(manager: Any) -> list[dict[str, Any]]:
    reader, reports = getattr(manager, "failure_reader", None), []
    while reader is not None and (report := _received(reader)) is not None:
        reports.append(report)
    return reports


def _received(reader: Connection) -> dict[str, Any] | None:
    """A report of failure that waits in a pipe."""
    try:
        message = reader.recv() if reader.poll() else None
    except (EOFError, OSError):
        return None
    return message if message and message["status"] == FAILED else None


def _raise(what: str, reports: list[dict[str, Any]]) -> None:
    raise RuntimeError(f"{what}. {_text(reports)}")


def _text(reports: list[dict[str, Any]]) -> str:
    ordered = sorted(reports, key=lambda report: report["time"])
    return "\n".join(report["error"] for report in ordered)
