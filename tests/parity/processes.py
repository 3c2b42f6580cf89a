# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""Processes of their own for engines and for the ranks of a trainer.

Engines read the environment when vLLM is imported and keep it, so they run apart from
the tests' process, which then shows as well that two processes compute the same bits.
"""

import multiprocessing
import os
import tempfile
from collections.abc import Callable
from concurrent.futures import Future, ProcessPoolExecutor
from pathlib import Path
from typing import Any

# Characters of a process's output that are shown with its errors.
TAIL = 8000


class Process:
    """Runs functions in one other process, in order.

    Args:
        environment: set there before anything is imported.
    """

    def __init__(self, environment: dict[str, str]) -> None:
        self.folder = tempfile.TemporaryDirectory()
        self.log = Path(self.folder.name) / "log"
        # Nothing of vLLM is imported in the process before the environment is set.
        context = multiprocessing.get_context("spawn")
        self.pool = ProcessPoolExecutor(1, mp_context=context)
        # Threads that wait for a core of another process spin.
        environment = {"OMP_NUM_THREADS": "1"} | environment
        self.pool.submit(_set_up, environment, self.log)

    def submit(self, function: Callable[..., Any], *args: Any) -> Future:
        return self.pool.submit(function, *args)

    def result(self, future: Future) -> Any:
        """What was submitted returns or raises, with what the process wrote."""
        try:
            return future.result()
        except Exception as error:
            if self.log.exists():
                output = self.log.read_text(errors="replace")[-TAIL:]
                error.add_note(f"The end of the process's output:\n{output}")
            raise

    def call(self, function: Callable[..., Any], *args: Any) -> Any:
        return self.result(self.submit(function, *args))

    def end(self) -> None:
        self.pool.shutdown()
        self.folder.cleanup()


def _set_up(environment: dict[str, str], log: Path) -> None:
    os.environ.update(environment)
    # Of the process and those that it starts.
    with log.open("ab") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
