# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""A process that is killed while it writes files."""

import os
import signal
import traceback

import torch

from vllm.training import checkpoint_files


def killed_at(step, function):
    """Run in a process that dies at its step-th change of a file; whether it did."""
    child = os.fork()
    if child == 0:
        exit_code = 1
        try:
            # A fork cannot use its parent's GPUs; what is saved is on the CPU.
            torch.cuda.is_available = lambda: False
            die_at(step)
            function()
            exit_code = 0
        except Exception:
            traceback.print_exc()
        finally:
            os._exit(exit_code)
    exit_code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    assert exit_code in (0, -signal.SIGKILL)
    return exit_code != 0


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
