# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""Answers of workers to calls of which one has failed, and workers that end."""

import multiprocessing
import threading
from types import SimpleNamespace

import pytest

from vllm.v1.engine import engine_errors


class Answers:
    """A worker's queue; None is an answer that has not come yet."""

    def __init__(self, *answers):
        self.answers = list(answers)

    def dequeue(self, timeout=None):
        if self.answers[0] is None:
            del self.answers[0]
            raise TimeoutError
        return self.answers.pop(0)


def test_no_answer_is_taken_for_one_to_the_next_call():
    failed, prompt = Answers("error"), Answers("old", "new")
    late = Answers(None, "old", "new")
    executor, queues = SimpleNamespace(), [failed, prompt, late]
    assert failed.dequeue() == "error"
    engine_errors.drain_answers(executor, queues, failed)
    for queue in (prompt, late):
        engine_errors.discard_late_answers(executor, queue, timeout=1.0)
        assert queue.dequeue() == "new"
        # Nothing is owed any more.
        engine_errors.discard_late_answers(executor, queue, timeout=1.0)
        assert queue.answers == []


def test_an_answer_that_stays_owed():
    failed, silent = Answers("error"), Answers(None, None, "old", "new")
    executor = SimpleNamespace()
    engine_errors.drain_answers(executor, [failed, silent], failed)
    with pytest.raises(TimeoutError):
        engine_errors.discard_late_answers(executor, silent, timeout=0.0)
    engine_errors.discard_late_answers(executor, silent, timeout=1.0)
    assert silent.dequeue() == "new"


class SlowlyEnding:
    """A killed process whose exit code comes long after its end, as with a GPU."""

    name, pid = "VllmWorker-1", 7

    def __init__(self):
        self.sentinel, self.alive = multiprocessing.Pipe(duplex=False)
        self.joining, self.reaped = threading.Event(), threading.Event()
        self.exitcode = None

    def join(self):
        self.joining.set()
        assert self.reaped.wait(timeout=10)
        self.exitcode = -9


def test_a_worker_that_ends_slowly_is_named():
    process = SlowlyEnding()
    executor = SimpleNamespace(workers=[SimpleNamespace(proc=process)])
    engine_errors.raise_death(executor)  # does nothing: it is alive

    process.alive.close()
    monitor = threading.Thread(target=engine_errors.note_ended, args=(executor,))
    monitor.start()
    assert process.joining.wait(timeout=10)
    threading.Timer(0.2, process.reaped.set).start()
    message = r"VllmWorker-1 \(pid 7, exit code -9\) died while the engine ran"
    with pytest.raises(RuntimeError, match=message):
        engine_errors.raise_death(executor)
    monitor.join()
