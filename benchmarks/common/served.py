# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""Engines in processes of their own, measured in turns.

A benchmark starts its own file once more for each engine, with what the engine is, and
calls `answer_loads` there. Front end and scheduler share that process: messages between
two of them may cost a host more than what is compared.
"""

from __future__ import annotations

import itertools
import os
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import torch

if TYPE_CHECKING:
    from vllm import LLM

# What a serving process begins its answers with.
_ANSWER = "ANSWER"
# In which order the engines are started in each round: as given, or reversed.
_ORDERS = (1, -1, -1, 1)


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


def graphs_of(loads: Sequence[Load]) -> dict[str, list[int]]:
    """An engine's `compilation_config`: CUDA graphs for these loads and no others."""
    return {"cudagraph_capture_sizes": [load.requests for load in loads]}


def half_a_gpu(kv_cache: int) -> dict[str, int | float]:
    """Options of an engine that shares its GPUs with another; kv_cache in GiB."""
    return {"kv_cache_memory_bytes": kv_cache << 30, "gpu_memory_utilization": 0.4}


def answer_loads(llm: LLM, vocab_size: int) -> None:
    """For each load on stdin, print how many tokens per second it got."""
    print(_ANSWER, "ready", flush=True)
    for line in sys.stdin:
        load = Load(*map(int, line.split()))
        rate = load.requests * load.new / seconds_of(llm, load, vocab_size)
        print(_ANSWER, rate, flush=True)


def seconds_of(llm: LLM, load: Load, vocab_size: int) -> float:
    """How long the engine takes for a load."""
    from vllm import SamplingParams

    generator = torch.Generator().manual_seed(0)
    size = (load.requests, load.prompt)
    ids = torch.randint(vocab_size, size, generator=generator)
    sampling = SamplingParams(
        max_tokens=load.new, ignore_eos=True, detokenize=False, logprobs=0
    )
    prompts = [{"prompt_token_ids": row} for row in ids.tolist()]
    begin = time.perf_counter()
    llm.generate(prompts, sampling, use_tqdm=False)
    return time.perf_counter() - begin


class Command(NamedTuple):
    """What starts an engine.

    Attributes:
        arguments: of this benchmark's file.
        environment: names and values of variables, besides those of this process.
    """

    arguments: tuple[str, ...]
    environment: tuple[tuple[str, str], ...] = ()


def compare(
    engines: Sequence[Command],
    loads: Sequence[Load],
    repetitions: int,
    poll: bool,
    rounds: int = len(_ORDERS),
) -> list[list[list[float]]]:
    """Tokens per second of each engine for each load in each round.

    All engines run on the cores of one NUMA node, as those of a machine differ in
    speed, and take turns. They are started once a round, as often in one order as in
    the other, because a process keeps the memory that it was given and the machine's
    speed changes. The first two runs of a load are not counted.

    Args:
        engines: to compare.
        loads: for each.
        repetitions: of a load in each round.
        poll: whether an idle engine polls, as one with workers does. With GPUs they
            share the cores out then, without they run one after the other.
        rounds: how often each engine is started; even.

    Returns:
        `[engine][load][round]`, medians of the repetitions.
    """
    rates: dict[Command, list[list[float]]] = {engine: [] for engine in engines}
    one_by_one = poll and not torch.cuda.is_available()
    for order in _ORDERS[:rounds]:
        ordered = engines[::order]
        for group in [[each] for each in ordered] if one_by_one else [ordered]:
            with _started(group, poll) as started:
                medians = [_medians(started, load, repetitions) for load in loads]
            for engine, of_loads in zip(group, zip(*medians)):
                rates[engine].append(of_loads)
    return [[list(rounds) for rounds in zip(*rates[engine])] for engine in engines]


class Ratio(NamedTuple):
    """The speed of one engine over another's.

    Attributes:
        rounds: the ratio of each.
        median: theirs.
    """

    rounds: list[float]
    median: float

    @classmethod
    def of(cls, rates: Sequence[float], others: Sequence[float]) -> Ratio:
        """Of tokens per second in each round."""
        rounds = [rate / other for rate, other in zip(rates, others)]
        return cls(rounds, statistics.median(rounds))


def _cores_of_a_node() -> list[set[int]]:
    """Of the NUMA node with the most of this process's cores, the threads of each."""
    own = os.sched_getaffinity(0)
    nodes = sorted(Path("/sys/devices/system/node").glob("node[0-9]*"))
    of_nodes = [{i for i in own if (node / f"cpu{i}").exists()} for node in nodes]
    cores: dict[str, set[int]] = {}
    for i in sorted(max(of_nodes, key=len, default=own) or own):
        siblings = Path(f"/sys/devices/system/cpu/cpu{i}/topology/thread_siblings_list")
        cores.setdefault(siblings.read_text(), set()).add(i)
    return list(cores.values())


def shared_out(cores: Sequence[set[int]], count: int) -> list[set[int]]:
    """The threads of equal parts of the cores, or of all where there are too few."""
    size = len(cores) // count
    if size == 0:
        return [set().union(*cores)] * count
    return [set().union(*cores[i * size : (i + 1) * size]) for i in range(count)]


def _medians(engines: Sequence[Served], load: Load, repetitions: int) -> list[float]:
    for engine in [*engines] * 2:
        engine.rate(load)
    rates = [[engine.rate(load) for engine in engines] for _ in range(repetitions)]
    medians = [statistics.median(of_one) for of_one in zip(*rates)]
    print(
        f"{load}: {', '.join(f'{rate:.4g}' for rate in medians)} tokens/s", flush=True
    )
    return medians


@contextmanager
def _started(commands: Sequence[Command], share: bool) -> Iterator[list[Served]]:
    """Engines that are ready; they end whatever happens."""
    parts = shared_out(_cores_of_a_node(), len(commands) if share else 1)
    engines = [Served(*each) for each in zip(commands, itertools.cycle(parts))]
    try:
        for engine in engines:
            engine.wait_until_ready()
        yield engines
    finally:
        for engine in engines:
            engine.end()


class Served:
    """An engine in a process of its own, which begins to start.

    Args:
        command: that starts it.
        cores: that it runs on.
    """

    def __init__(self, command: Command, cores: set[int]) -> None:
        variables = {
            "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
            "VLLM_LOGGING_LEVEL": "WARNING",
            **dict(command.environment),
        }
        self.process = subprocess.Popen(
            [sys.executable, sys.argv[0], *command.arguments],
            env=os.environ | variables,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )
        # Not this process, which may measure something else.
        os.sched_setaffinity(self.process.pid, cores)

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
            self.process.wait()
