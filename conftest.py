# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""Settings of the whole suite, made before vLLM is imported."""

import os
from collections import Counter

import pytest

from tests import forks

# Engines run in the test's process unless a test asks for more.
os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
# A process that has asked torch for its GPUs cannot be forked.
os.environ.setdefault("VLLM_WORKER_MULTIPROC_METHOD", "spawn")
# vLLM's Triton kernels would multiply fp32 in TF32, a thousandth off the trainer's.
os.environ.setdefault("TRITON_F32_DEFAULT", "ieee")
# Threads that wait for one that has no core would take a core from those that work.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "0|1")
os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")
os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

forks.install()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """What shares engines and ranks stays on one of xdist's workers.

    The files of few tests come first. They start processes and take long; many short
    tests at the end keep all workers busy.
    """
    groups = {item: _group(item) for item in items}
    sizes = Counter(groups.values())
    items.sort(key=lambda item: sizes[groups[item]])
    for item in items:
        item.add_marker(pytest.mark.xdist_group(groups[item]))


def _group(item: pytest.Item) -> str:
    path = item.path.relative_to(item.config.rootpath)
    return "parity" if path.parts[:2] == ("tests", "parity") else path.as_posix()
