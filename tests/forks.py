# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""Processes that have imported vLLM when they start.

A process needs more than ten seconds to import vLLM, and the suite starts about eighty
of them. They are forks of one process, Python's fork server, which has imported vLLM
and has done nothing else: it has no threads, and none of what the tests register. So a
fork finds what a new process would find. Environment, working directory, standard
output and error are those of the process that starts it.

On a GPU each process is started anew, since what has asked for a GPU cannot be forked.
"""

import atexit
import contextlib
import multiprocessing
import os
import runpy
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Mapping, Sequence
from multiprocessing import context, forkserver, reduction, spawn
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any
from unittest import mock

ROOT = Path(__file__).parents[1]
# What ranks, engines and their workers import.
PRELOADED = [
    "tests.forks",
    "pytest",
    "setproctitle",
    "torch.distributed.fsdp",
    "torch.distributed.run",
    "vllm.entrypoints.llm",
    "vllm.model_executor.models.generic_transformer",
    "vllm.model_executor.models.registry",
    "vllm.training",
    "vllm.v1.engine.core",
    "vllm.v1.executor.multiproc_executor",
    "vllm.v1.worker.cpu_worker",
]
# Set while the server starts: what is read when torch is imported and when it loads
# OpenMP. Threads that wait for a core of another process would spin. vLLM sets the
# others for its workers on CPU.
ENVIRONMENT = {
    "OMP_NUM_THREADS": "1",
    "TORCHINDUCTOR_COMPILE_THREADS": "1",
    "TORCHINDUCTOR_CPP_DYNAMIC_THREADS": "1",
    "PYTHONPATH": str(ROOT),
}
# Of a script before its own folder and PYTHONPATH are added.
SEARCH_PATH = [path for path in sys.path if path not in ("", str(ROOT))]
_preparation_data = spawn.get_preparation_data


def install() -> None:
    """Fork what multiprocessing spawns from now on, here and in the forks."""
    context.SpawnProcess._Popen = staticmethod(_start)
    spawn.get_preparation_data = _surrounded


def forks() -> bool:
    """Whether processes are forked on this machine."""
    import torch

    return not torch.cuda.is_available()


def start_server() -> None:
    """Start the fork server, unless it runs."""
    forkserver.set_forkserver_preload(PRELOADED)
    with mock.patch.dict(os.environ, ENVIRONMENT):
        forkserver._forkserver.ensure_running()


def _start(process: BaseProcess) -> Any:
    if not forks():
        from multiprocessing import popen_spawn_posix

        return popen_spawn_posix.Popen(process)
    from multiprocessing import popen_forkserver

    start_server()
    return popen_forkserver.Popen(process)


def _surrounded(name: str) -> dict[str, Any]:
    """What a new process is told first, and where it stands."""
    return {"surroundings": _Surroundings()} | _preparation_data(name)


class _Surroundings:
    """Becomes those of the process that unpickles it."""

    def __reduce__(self) -> tuple:
        streams = [reduction.DupFd(1), reduction.DupFd(2)] if forks() else []
        return _enter, (dict(os.environ), streams)


def _enter(environment: dict[str, str], streams: Sequence[Any]) -> None:
    install()
    if not streams:
        return
    import setproctitle
    import torch._dynamo

    # By the environment it finds where the process's title is.
    setproctitle.getproctitle()
    os.environ.clear()
    os.environ.update(environment)
    for number, stream in enumerate(streams, 1):
        descriptor = stream.detach()
        os.dup2(descriptor, number)
        os.close(descriptor)
    # A fork's own forks come from the same server; Python would start another.
    forkserver._forkserver.ensure_running = lambda: None  # type: ignore[method-assign]
    torch._dynamo.config.disable = environment.get("TORCH_COMPILE_DISABLE") == "1"


class Python:
    """A Python process of a command line's, as `subprocess.Popen` would start it.

    Args:
        arguments: what follows `python`: a script, or `-m` and a module, and its own.
        stdout: the file to write standard output to, if not to that of this process.
        stderr: likewise; may be the same file.
        env: the environment, if it is not that of this process.
        cwd: the working directory, likewise.
        new_session: whether the process leads a session of its own.
    """

    def __init__(
        self,
        arguments: Sequence[str | Path | int],
        stdout: Path | None = None,
        stderr: Path | None = None,
        env: Mapping[str, str] | None = None,
        cwd: Path | None = None,
        new_session: bool = False,
    ) -> None:
        self.arguments = [str(argument) for argument in arguments]
        self._process = multiprocessing.get_context("spawn").Process(
            name="MainProcess",
            target=_run,
            args=(self.arguments, (stdout, stderr), cwd or Path.cwd(), new_session),
        )
        env = dict(os.environ if env is None else env)
        with mock.patch.dict(os.environ, env, clear=True):
            self._process.start()
        self.pid: int = self._process.pid

    def poll(self) -> int | None:
        return self._process.exitcode

    def terminate(self) -> None:
        self._process.terminate()

    def kill(self) -> None:
        self._process.kill()

    def wait(self, timeout: float | None = None) -> int:
        self._process.join(timeout)
        code = self._process.exitcode
        if code is None:
            raise subprocess.TimeoutExpired(self.arguments, timeout or 0)
        return code


def run_python(
    arguments: Sequence[str | Path | int],
    timeout: float,
    env: Mapping[str, str] | None = None,
    cwd: Path | None = None,
) -> subprocess.CompletedProcess:
    """As `subprocess.run` of such a command line, with its output captured."""
    with tempfile.TemporaryDirectory() as folder:
        stdout, stderr = Path(folder, "stdout"), Path(folder, "stderr")
        python = Python(arguments, stdout, stderr, env, cwd)
        try:
            code = python.wait(timeout)
        except subprocess.TimeoutExpired:
            python.kill()
            python.wait()
            raise
        texts = [file.read_text(errors="replace") for file in (stdout, stderr)]
    return subprocess.CompletedProcess(python.arguments, code, *texts)


def _run(
    arguments: list[str],
    outputs: Sequence[Path | None],
    cwd: Path,
    new_session: bool,
) -> None:
    if new_session:
        os.setsid()
    for number, file in enumerate(outputs, 1):
        if file is None:
            continue
        descriptor = os.open(file, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o666)
        os.dup2(descriptor, number)
        os.close(descriptor)
    os.chdir(cwd)
    try:
        _be_main(arguments)
    finally:
        # A fork leaves without what a process does at its end.
        threading._shutdown()  # type: ignore[attr-defined]
        atexit._run_exitfuncs()


def _be_main(arguments: list[str]) -> None:
    """Do what `python` does with such a command line."""
    from torch.distributed.elastic.multiprocessing import subprocess_handler

    arguments = arguments[arguments[0] == "-u" :]
    paths = os.environ.get("PYTHONPATH", "").split(os.pathsep)
    is_module = arguments[0] == "-m"
    sys.argv = arguments[is_module:]
    first = os.getcwd() if is_module else os.path.dirname(os.path.abspath(sys.argv[0]))
    sys.path[:] = [first, *filter(None, paths), *SEARCH_PATH]
    handler = subprocess_handler.SubprocessHandler
    with mock.patch.multiple(handler, _popen=_start_rank, close=_end_rank):
        if is_module:
            runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
        else:
            runpy.run_path(sys.argv[0], run_name="__main__")


def _start_rank(handler: Any, command: Sequence[str], env: dict[str, str]) -> Python:
    """What torchrun's handler of a process starts it with."""
    python = Python(command[1:], env=env, new_session=True)
    # It is ended by its process group, and may end before it has one.
    with contextlib.suppress(ProcessLookupError):
        while os.getpgid(python.pid) != python.pid:
            time.sleep(0.001)
    return python


def _end_rank(handler: Any, death_sig: int = signal.SIGTERM) -> None:
    # The fork server waits for what ends by itself, whose group is gone then.
    with contextlib.suppress(ProcessLookupError):
        os.killpg(handler.proc.pid, death_sig)
