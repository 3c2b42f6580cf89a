# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""Trainers of several processes, through torchrun: four at work, and two that die.

With GPUs each process takes one; where there are fewer than four, two are at work.
"""

import os
import re
import sys
import time
from pathlib import Path

import pytest
import torch

from tests.forks import run_python
from tests.models.gpus import skip_without_gpus
from tests.training.distributed_model import moments, parallelized, weights
from vllm import training
from vllm.model_executor.parallel_context import ParallelContext

HERE = Path(__file__).parent
ON_GLOO = not torch.cuda.is_available()
# Without an end of its own, a rank waits as long as its process group: 30 minutes.
SECONDS_TO_AN_END = 150
RANKS = 2 if 0 < torch.cuda.device_count() < 4 else 4


def torchrun(count, arguments, folder, *options):
    """Start torchrun and wait; its process and what it wrote."""
    torchrun = ["-m", "torch.distributed.run", "--standalone", *options]
    command = [*torchrun, "--nproc-per-node", count, *arguments]
    environment = os.environ | {
        "OMP_NUM_THREADS": "1",
        "CHECKS_FOLDER": str(folder),
        # A rank that gives up waits four times as long for the others' records.
        "TORCH_NCCL_WAIT_TIMEOUT_DUMP_MILSEC": "1000",
        "PYTHONPATH": os.pathsep.join([*sys.path, str(HERE.parents[1])]),
    }
    # By their working directory `processes_in` knows them.
    return run_python(command, timeout=300, env=environment, cwd=folder)


@pytest.fixture(scope="module")
def all_ranks(tmp_path_factory):
    """What the ranks have checked and left in their folder."""
    skip_without_gpus(2)
    folder = tmp_path_factory.mktemp("ranks")
    checks = ["-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", "--durations=8"]
    done = torchrun(RANKS, [*checks, HERE / "distributed_checks.py"], folder)
    return folder, done


@pytest.fixture(scope="module")
def saved(all_ranks):
    """Where the ranks have saved `state`, and `saved.pt` with what is in it."""
    folder, done = all_ranks
    assert done.returncode == 0
    return folder


def test_ranks(all_ranks):
    _, done = all_ranks
    report = done.stdout + done.stderr
    assert done.returncode == 0, report
    assert report.count(" passed") == RANKS, report


def resume(directory):
    """Weights and moments of a checkpoint in a process without groups."""
    model, optimizer = parallelized(ParallelContext.single(), "plain")
    training.load_state(model, optimizer, directory)
    return weights(model) | moments(model, optimizer)


def assert_is_state(directory, saved):
    found, expected = resume(directory), torch.load(saved / "saved.pt")
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(found[name], tensor), name


def test_one_process_resumes_what_several_have_saved(saved):
    assert_is_state(saved / "state", saved)


def test_two_ranks_of_which_one_is_killed(saved):
    """While it saves, and when torchrun has started both again, while it trains."""
    script = [HERE / "dying_checks.py", "killed"]
    done = torchrun(2, script, saved, "--max-restarts", "1")
    ended = time.time()
    assert done.returncode == 1, done.stderr
    killed = [noted(saved, f"stopped-killed-{restart}") for restart in (0, 1)]
    assert noted(saved, "rank-0-started-killed-1") - killed[0] < SECONDS_TO_AN_END
    assert ended - killed[1] < SECONDS_TO_AN_END
    assert "exitcode  : -9" in done.stderr and "(SIGKILL)" in done.stderr
    # NCCL does not see that the other one is gone: torchrun ends the waiting rank.
    for restart in (0, 1) if ON_GLOO else ():
        error = (saved / f"rank-0-error-killed-{restart}").read_text()
        assert re.search("Connection (reset|closed) by peer", error), error
    assert not list(saved.glob("rank-1-error-*"))
    assert processes_in(saved) == []
    # The save before is what it was, and the killed one does not look like one.
    assert_is_state(saved / "state", saved)
    assert not (saved / "next").exists()
    unfinished = saved / ".next.unfinished"
    assert any(unfinished.iterdir())
    with pytest.raises(FileNotFoundError, match="optimizer.pt. A save that was inter"):
        resume(unfinished)


def test_a_rank_that_hangs_is_given_up_after_the_timeout(saved):
    done = torchrun(2, [HERE / "dying_checks.py", "hanging"], saved)
    seconds = time.time() - noted(saved, "stopped-hanging-0")
    assert done.returncode == 1, done.stderr
    assert seconds < SECONDS_TO_AN_END, done.stderr
    if ON_GLOO:
        error = (saved / "rank-0-error-hanging-0").read_text()
        assert "Timed out waiting 4000ms" in error
    else:  # by a thread of NCCL's, which ends the process
        assert "Timeout(ms)=4000" in done.stderr, done.stderr
    assert processes_in(saved) == []


def noted(folder, name):
    """When a rank of `dying_checks.py` wrote a note, in seconds."""
    return float((folder / name).read_text())


def processes_in(folder):
    """Processes that were started in this folder."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        try:
            directory = (process / "cwd").readlink()
        except OSError:
            continue
        if directory == folder:
            found.append(process.name)
    return found
