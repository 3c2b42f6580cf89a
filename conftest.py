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


def pytest_addoption(parser: pytest.Parser) -> None:
    """`make test-models` asks for all families of models, not a few."""
    parser.addoption("--all-models", action="store_true")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The files of few tests come first.

    They start processes and take long; many short tests at the end keep all workers
    busy. A file's tests share engines and ranks, so that xdist keeps them together
    (`--dist loadfile`).
    """
    sizes = Counter(item.path for item in items)
    items.sort(key=lambda item: (sizes[item.path], item.path))
