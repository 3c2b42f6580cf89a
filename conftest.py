# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""Settings of the whole suite, made before vLLM is imported."""

import os

from tests import forks

# Engines run in the test's process unless a test asks for more.
os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
# A process that has asked torch for its GPUs cannot be forked.
os.environ.setdefault("VLLM_WORKER_MULTIPROC_METHOD", "spawn")
# vLLM's Triton kernels would multiply fp32 in TF32, a thousandth off the trainer's.
os.environ.setdefault("TRITON_F32_DEFAULT", "ieee")
os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "0|1")
os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")
os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

forks.install()
