# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""Two ranks, of which one dies or hangs. Run by `test_distributed.py`.

`torchrun --max-restarts 1 --nproc-per-node 2 dying_checks.py killed`: the first time a
rank is killed while it saves, the second time while it trains.
"""

import os
import signal
import sys
import time
from datetime import timedelta
from pathlib import Path

import torch

from tests.training.distributed_model import moments, parallelized, train, weights
from vllm import training
from vllm.model_executor.checkpoint import reshard

FOLDER = Path(os.environ["CHECKS_FOLDER"])
RANK, RESTART = int(os.environ["RANK"]), os.environ["TORCHELASTIC_RESTART_COUNT"]


def note(what):
    (FOLDER / f"{what}-{sys.argv[1]}-{RESTART}").write_text(str(time.time()))


def die():
    note("stopped")
    os.kill(os.getpid(), signal.SIGKILL)


def hang():
    note("stopped")
    time.sleep(600)


def resumed(context):
    """What the ranks have saved, under another sharding."""
    model, optimizer = parallelized(context, "fsdp")
    training.load_state(model, optimizer, FOLDER / "state")
    saved = torch.load(FOLDER / "saved.pt")
    found = weights(model) | moments(model, optimizer)
    assert found.keys() == saved.keys()
    assert all(torch.equal(found[name], saved[name]) for name in saved)
    return model, optimizer


def killed_in_a_save(model, optimizer):
    """Rank 1 dies when it has written half of its pieces."""
    lookup, written = reshard._SavePieces.lookup_object, []

    def lookup_some(planner, index):
        written.append(index)
        if RANK == 1 and len(written) > len(planner.plan.items) // 2:
            die()
        return lookup(planner, index)

    reshard._SavePieces.lookup_object = lookup_some
    training.save_state(model, optimizer, FOLDER / "next")


def stopped_in_a_step(model, optimizer, context, stop):
    """Rank 1 stops in the backward, where rank 0 waits for its gradients."""

    def stop_in_backward(layer, inputs, output):
        hidden_states, _ = output
        hidden_states.register_hook(lambda grad: stop())

    if RANK == 1:
        model.lm.model.layers[1].register_forward_hook(stop_in_backward)
    train(model, optimizer, range(3), context)


def main():
    note(f"rank-{RANK}-started")
    stop = {"killed": die, "hanging": hang}[sys.argv[1]]
    timeout = None if stop is die else timedelta(seconds=4)
    context = training.initialize_parallel(2, timeout=timeout)
    model, optimizer = resumed(context)
    try:
        if stop is die and RESTART == "0":
            killed_in_a_save(model, optimizer)
        else:
            stopped_in_a_step(model, optimizer, context, stop)
    except Exception as error:
        name = f"rank-{RANK}-error-{sys.argv[1]}-{RESTART}"
        (FOLDER / name).write_text(f"{type(error).__name__}: {error}")
        raise


main()
