# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""Workers of vLLM's own and of Ray: what reaches them, and how they end."""

import threading
import time
from dataclasses import dataclass, field

import psutil
import pytest
import torch
from torch import nn

from tests.models.builder.models import (
    GENERIC,
    assert_logprobs_agree_in_bf16,
    build_generic,
    greedy,
    save_generic,
)
from tests.models.gpus import MEMORY, skip_without_gpus
from vllm import ModelRegistry
from vllm.model_executor.checkpoint.save import checkpoint_tensors

PROMPTS = [[1, 2, 3], list(range(20, 90)), [7], [5, 6] * 20]
ENGINE_TITLES = ("VLLM::", "vllm_Worker", "RayWorkerProc", "multiprocessing.spawn")
SECONDS_TO_AN_ERROR = 30
SECONDS_TO_NO_PROCESS = 20


@pytest.fixture(scope="module")
def ray_cluster():
    """A real Ray on this host, with two CPUs and nothing else."""
    import ray

    with pytest.MonkeyPatch.context() as patch:
        # Of its workers, which nothing but the sampler would compile for.
        patch.setenv("TORCH_COMPILE_DISABLE", "1")
        context = ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False)
        patch.setenv("RAY_ADDRESS", context.address_info["gcs_address"])
        yield
    ray.shutdown()


# Of engines that the tests of other files keep, in this process.
_of_other_tests: set[psutil.Process] = set()


@pytest.fixture(scope="module", autouse=True)
def other_tests_engines():
    """Leave out of `engine_processes` what is there before the first test."""
    _of_other_tests.update(engine_processes())


def engine_processes() -> list[psutil.Process]:
    """Engine cores and workers that these tests started, also as Ray's actors."""
    found = []
    for process in psutil.Process().children(recursive=True):
        if process in _of_other_tests:
            continue
        try:
            title = " ".join(process.cmdline())
        except (psutil.NoSuchProcess, psutil.ZombieProcess):
            continue
        if any(name in title for name in ENGINE_TITLES):
            found.append(process)
    return found


def left_over(processes: list[psutil.Process]) -> list[psutil.Process]:
    """Those that do not end soon."""
    return psutil.wait_procs(processes, timeout=SECONDS_TO_NO_PROCESS)[1]


@dataclass
class Outcome:
    """What one engine did.

    Attributes:
        completions: What it generated.
        push_error: What a push of tensors to another process's engine ended in, before
            it generated.
        error: What ended it.
        seconds: From the kill to the error.
        left: The processes that were still there later.
    """

    completions: list = field(default_factory=list)
    push_error: Exception | None = None
    error: Exception | None = None
    seconds: float = 0
    left: list = field(default_factory=list)


def push(llm, model) -> Exception | None:
    """Send an engine weights, all zeros; what it raises."""
    tensors = [(n, torch.zeros_like(t)) for n, t in checkpoint_tensors(model)]
    try:
        llm.collective_rpc("reload_weights", kwargs={"weights_iterator": tensors})
    except Exception as error:
        return error
    return None


def kill_while_it_generates(llm) -> tuple[Exception, float]:
    """Kill a worker in the middle; the error and after how many seconds it came."""
    titles = {p: " ".join(p.cmdline()) for p in engine_processes()}
    workers = [p for p, title in titles.items() if "Worker" in title]
    assert len(workers) == 2, titles
    killed = []

    def kill():
        workers[-1].kill()
        killed.append(time.monotonic())

    timer = threading.Timer(0.5, kill)
    timer.start()
    try:
        while True:
            greedy(llm, [[1, 2, 3]] * 4, max_tokens=200)
    except Exception as error:
        timer.join()
        return error, time.monotonic() - killed[0]


@pytest.fixture(scope="module")
def served(tmp_path_factory, ray_cluster):
    """One model served by both kinds of workers, one of which is killed then.

    vLLM's own workers have an engine core in between, in a process of its own, where
    requests arrive one after the other: only in batch-invariant mode have both kinds to
    have the same bits.
    """
    from vllm import LLM

    skip_without_gpus(2)
    directory = tmp_path_factory.mktemp("served")
    model = save_generic(directory).bfloat16()
    outcomes = {}
    scale = nn.Parameter(torch.ones(1), requires_grad=False)
    seen = {"scale": scale}

    def build(config, parallel_context):  # nothing of it can be imported
        assert seen["scale"].item() == 1
        assert parallel_context.tp_size == 2
        return build_generic(config, parallel_context)

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("VLLM_WORKER_SHUTDOWN_TIMEOUT_SECONDS", "1")
        patch.setenv("VLLM_BATCH_INVARIANT", "1")
        ModelRegistry.register_model(GENERIC, build)
        for backend, core_of_its_own in (("mp", "1"), ("ray", "0")):
            patch.setenv("VLLM_ENABLE_V1_MULTIPROCESSING", core_of_its_own)
            llm = LLM(
                str(directory),
                dtype="bfloat16",
                max_model_len=256,
                enforce_eager=True,
                disable_log_stats=True,
                skip_tokenizer_init=True,
                tensor_parallel_size=2,
                distributed_executor_backend=backend,
                **MEMORY,
            )
            try:
                outcome = outcomes[backend] = Outcome()
                if core_of_its_own == "1":
                    outcome.push_error = push(llm, model)
                outcome.completions = greedy(llm, PROMPTS)
                processes = engine_processes()
                outcome.error, outcome.seconds = kill_while_it_generates(llm)
                outcome.left = left_over(processes)
            finally:
                llm.llm_engine.engine_core.shutdown()
    return model, outcomes


@pytest.mark.parametrize("backend", ["mp", "ray"])
def test_closures_reach_the_workers(served, backend):
    model, outcomes = served
    completions = outcomes[backend].completions
    assert_logprobs_agree_in_bf16(model, PROMPTS, completions)


def test_tensors_do_not_reach_another_process(served):
    """The engine says so and goes on: what it generated later is right."""
    message = (
        "model.embed_tokens.weight with a list arrived.*another process.*weights_p"
    )
    with pytest.raises(Exception, match=message):
        raise served[1]["mp"].push_error


def test_ray_and_multiprocessing_give_the_same_bits(served):
    def bits(outcome):
        return [
            [
                (token, entry[token].logprob)
                for token, entry in zip(c.token_ids, c.logprobs)
            ]
            for c in outcome.completions
        ]

    _, outcomes = served
    assert bits(outcomes["mp"]) == bits(outcomes["ray"])


@pytest.mark.parametrize(
    ("backend", "who"),
    [("mp", r"VllmWorker-\d .pid \d+, exit code -9."), ("ray", r"of rank \[\d\]")],
)
def test_a_killed_worker_ends_in_an_error_and_leaves_nothing(served, backend, who):
    outcome = served[1][backend]
    assert outcome.seconds < SECONDS_TO_AN_ERROR
    with pytest.raises(Exception, match=f"{who} died while the engine ran"):
        raise outcome.error
    assert outcome.left == []


def test_a_builder_that_raises_on_one_rank(make_llm, tmp_path, ray_cluster):
    save_generic(tmp_path)

    def build(config, parallel_context):
        if parallel_context.tp_rank == 1:
            raise ArithmeticError("only here")
        return build_generic(config, parallel_context)

    ModelRegistry.register_model(GENERIC, build)
    with pytest.raises(Exception, match="ArithmeticError.*only here"):
        make_llm(tmp_path, tensor_parallel_size=2, distributed_executor_backend="ray")
    assert left_over(engine_processes()) == []


def test_ranks_that_build_different_shapes(make_llm, tmp_path, monkeypatch):
    monkeypatch.setenv("VLLM_ENABLE_V1_MULTIPROCESSING", "1")
    save_generic(tmp_path)

    def build(config, parallel_context):
        model = build_generic(config, parallel_context)
        if parallel_context.tp_rank == 1:
            model.model.norm = nn.LayerNorm(7)
        return model

    ModelRegistry.register_model(GENERIC, build)
    message = r"different models .*model.norm.weight is \[\d+\] float32 on this rank"
    with pytest.raises(RuntimeError, match=message):
        make_llm(tmp_path, tensor_parallel_size=2)
    assert left_over(engine_processes()) == []


def test_ray_without_enough_resources(make_llm, tmp_path, ray_cluster):
    if torch.cuda.is_available():
        pytest.skip("of CPU hosts: for GPUs upstream waits half an hour")
    save_generic(tmp_path)
    ModelRegistry.register_model(GENERIC, build_generic)
    message = "needs 4 of Ray's CPUs, .* and the Ray cluster has 2. Start Ray with more"
    with pytest.raises(ValueError, match=message):
        make_llm(tmp_path, tensor_parallel_size=4, distributed_executor_backend="ray")
