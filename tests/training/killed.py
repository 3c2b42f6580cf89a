# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""A process that is killed while it writes files."""

import functools
import multiprocessing
import os
import signal
import traceback
from unittest import mock

import torch

from tests import forks
from vllm.model_executor.checkpoint import files as checkpoint_files


def killed_at(step, function, *args):
    """Run in a process that dies at its step-th change of a file; whether it did.

    The process sees no GPU: what is saved is on the CPU.
    """
    context = fork_context()
    receiver, sender = context.Pipe(duplex=False)
    child = context.Process(target=run, args=(step, sender, function, args))
    child.start()
    sender.close()
    child.join()
    assert child.exitcode in (0, -signal.SIGKILL), receiver.recv()
    return child.exitcode != 0


@functools.cache
def fork_context():
    """Forks of a process that has imported vLLM and computed nothing.

    A fork of the tests' process could not use a GPU that they have used.
    """
    with mock.patch.dict(os.environ, CUDA_VISIBLE_DEVICES=""):
        forks.start_server()
    return multiprocessing.get_context("forkserver")


def run(step, errors, function, args):
    """In the process: leave without its exit handlers, which change files, too."""
    try:
        die_at(step)
        function(*args)
    except Exception:
        errors.send(traceback.format_exc())
        os._exit(1)
    os._exit(0)


def die_at(step):
    """Kill this process before its step-th change of a file, and within a file."""
    left = [step]

    def counted(change, half=None):
        def run(*args, **kwargs):
            left[0] -= 1
            if left[0] == 0:
                if half is not None:
                    half(*args)
                os.kill(os.getpid(), signal.SIGKILL)
            return change(*args, **kwargs)

        return run

    os.replace, os.rename = counted(os.replace), counted(os.rename)
    os.unlink = counted(os.unlink)

    def half(tensors, path):
        path.write_bytes(b"half")

    checkpoint_files.save_file = counted(checkpoint_files.save_file, half)
    torch.save = counted(torch.save)
