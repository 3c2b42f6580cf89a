# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""Engines in processes of their own, measured in turns.

A benchmark starts its own file once more for each engine, with what the engine is, and
calls `answer_loads` there.
"""

from __future__ import annotations

import os
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, NamedTuple

import torch

if TYPE_CHECKING:
    from vllm import LLM

# What a serving process begins its answers with.
_ANSWER = "ANSWER"


class Load(NamedTuple):
    """Requests that are sent at once.

    Attributes:
        requests: how many.
        prompt: tokens of each prompt.
        new: tokens to generate for each.
    """

    requests: int
    prompt: int
    new: int

    def __str__(self) -> str:
        return f"{self.requests} requests of {self.prompt}+{self.new} tokens"


def answer_loads(llm: LLM, vocab_size: int) -> None:
    """For each load on stdin, print how many tokens per second it got."""
    from vllm import SamplingParams

    print(_ANSWER, "ready", flush=True)
    for line in sys.stdin:
        load = Load(*map(int, line.split()))
        generator = torch.Generator().manual_seed(0)
        size = (load.requests, load.prompt)
        ids = torch.randint(vocab_size, size, generator=generator)
        prompts = [{"prompt_token_ids": row} for row in ids.tolist()]
        sampling = SamplingParams(
            max_tokens=load.new, ignore_eos=True, detokenize=False, logprobs=0
        )
        begin = time.perf_counter()
        llm.generate(prompts, sampling, use_tqdm=False)
        seconds = time.perf_counter() - begin
        print(_ANSWER, load.requests * load.new / seconds, flush=True)


class Served:
    """An engine in a process that runs this benchmark's file with other arguments.

    Args:
        arguments: of the file.
        environment: variables of the process, besides those of this one.
    """

    def __init__(
        self, arguments: Sequence[str], environment: Mapping[str, str] | None = None
    ) -> None:
        variables = {"VLLM_LOGGING_LEVEL": "WARNING"} | dict(environment or {})
        self.process = subprocess.Popen(
            [sys.executable, sys.argv[0], *arguments],
            env=os.environ | variables,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )

    def wait_until_ready(self) -> None:
        assert self._answer() == "ready"

    def rate(self, load: Load) -> float:
        """Tokens per second."""
        print(*load, file=self.process.stdin, flush=True)
        return float(self._answer())

    def _answer(self) -> str:
        for line in self.process.stdout:
            if line.startswith(_ANSWER):
                return line.removeprefix(_ANSWER).strip()
        sys.exit(f"an engine ended with status {self.process.wait()}")

    def end(self) -> None:
        """End it and its workers."""
        self.process.stdin.close()
        try:
            self.process.wait(timeout=30)
        except subprocess.TimeoutExpired:
            os.killpg(self.process.pid, signal.SIGKILL)


@contextmanager
def all_ready(engines: Sequence[Served]) -> Iterator[None]:
    """The engines, which start at the same time; they end whatever happens."""
    try:
        for engine in engines:
            engine.wait_until_ready()
        yield
    finally:
        for engine in engines:
            engine.end()


def rates_in_turns(
    engines: Sequence[Served], load: Load, repetitions: int
) -> list[float]:
    """The median of each engine's tokens per second; two runs of each are not counted.

    The engines take turns, so that what else the machine does falls on all alike.
    """
    for engine in [*engines] * 2:
        engine.rate(load)
    rates = [[engine.rate(load) for engine in engines] for _ in range(repetitions)]
    return list(map(statistics.median, zip(*rates)))
