# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""Engines that end with the test that started them."""

import logging

import pytest
import torch

from tests.models.gpus import MEMORY, skip_without_gpus


@pytest.fixture
def clean_registry(monkeypatch):
    """What a test registers is forgotten after it."""
    from vllm import ModelRegistry
    from vllm.config import model as model_config
    from vllm.model_executor import vllm_internals
    from vllm.model_executor.models.builder import registration

    monkeypatch.setattr(ModelRegistry, "models", dict(ModelRegistry.models))
    monkeypatch.setattr(registration, "_targets", {})
    # With the registry of before, an override has to be registered again.
    monkeypatch.setattr(model_config, "_REGISTERED_MODEL_CLASS_OVERRIDES", set())
    yield
    vllm_internals.MODEL_ARCH_BY_HASH.clear()


@pytest.fixture
def make_llm(clean_registry, monkeypatch):
    """`make_llm(directory, **options)` starts an engine that ends with the test.

    It is eager unless told otherwise: compiling every engine takes too long. So does
    what the sampler compiles in each worker of an eager engine.
    """
    from vllm import LLM
    from vllm.distributed import cleanup_dist_env_and_memory

    engines = []

    def make(directory, **options):
        stop_all()
        options = {
            "dtype": "float32",
            "max_model_len": 256,
            "enforce_eager": True,
            "skip_tokenizer_init": True,
            **MEMORY,
        } | options
        eager = bool(options["enforce_eager"])
        monkeypatch.setenv("TORCH_COMPILE_DISABLE", str(int(eager)))  # the workers'
        torch._dynamo.config.disable = eager
        skip_without_gpus(
            options.get("tensor_parallel_size", 1)
            * options.get("pipeline_parallel_size", 1)
        )
        engines.append(LLM(str(directory), disable_log_stats=True, **options))
        return engines[-1]

    def stop_all():
        while engines:
            engines.pop().llm_engine.engine_core.shutdown()
        cleanup_dist_env_and_memory()

    with torch._dynamo.config.patch(disable=False):
        yield make
        stop_all()


@pytest.fixture
def caplog_vllm(caplog):
    """vLLM's loggers do not propagate."""
    logger = logging.getLogger("vllm")
    logger.addHandler(caplog.handler)
    caplog.set_level(logging.WARNING, "vllm")
    yield caplog
    logger.removeHandler(caplog.handler)
