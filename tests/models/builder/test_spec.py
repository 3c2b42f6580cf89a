# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""What counts as a builder, and how its parameters are matched."""

import functools
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from transformers import PretrainedConfig

from vllm.model_executor.models.builder import model_builder
from vllm.model_executor.models.builder import spec as spec_module
from vllm.model_executor.models.builder.spec import (
    BuilderOptions,
    BuilderSpec,
    match_parameters,
)
from vllm.model_executor.parallel_context import ParallelContext

CONFIG = PretrainedConfig(hidden_size=4, dtype="float32")
VLLM_CONFIG = SimpleNamespace(
    model_config=SimpleNamespace(hf_config=CONFIG, dtype=torch.float32)
)
CONTEXT = ParallelContext.single()


@pytest.fixture(autouse=True)
def inside_an_engine(monkeypatch):
    """`BuilderSpec.build` runs in a process whose groups exist."""
    fake = SimpleNamespace(current=lambda: CONTEXT)
    monkeypatch.setattr(spec_module, "ParallelContext", fake)


class Recorder(nn.Module):
    def __init__(self, **received):
        super().__init__()
        self.received = received


def by_name(config, parallel_context):
    return Recorder(config=config, parallel_context=parallel_context)


def other_order(parallel_context, config):
    return by_name(config, parallel_context)


def any_two(cfg, ctx):
    return by_name(cfg, ctx)


def positional_only(cfg, ctx, /):
    return by_name(cfg, ctx)


def with_default(config, parallel_context, dropout=0.0):
    assert dropout == 0.0
    return by_name(config, parallel_context)


def with_rest(config, parallel_context, *args, **kwargs):
    assert not args and not kwargs
    return by_name(config, parallel_context)


class Builders:
    @staticmethod
    def static(config, parallel_context):
        return by_name(config, parallel_context)

    @classmethod
    def of_class(cls, config, parallel_context):
        return by_name(config, parallel_context)

    def method(self, config, parallel_context):
        return by_name(config, parallel_context)

    def __call__(self, config, parallel_context):
        return by_name(config, parallel_context)


def bound(size, config, parallel_context):
    assert size == 3
    return by_name(config, parallel_context)


@pytest.mark.parametrize(
    "target",
    [
        by_name,
        other_order,
        any_two,
        positional_only,
        with_default,
        with_rest,
        lambda config, parallel_context: by_name(config, parallel_context),
        lambda c, p: by_name(c, p),
        Builders.static,
        Builders.of_class,
        Builders().method,
        Builders(),
        functools.partial(bound, 3),
        functools.partial(bound, size=3),  # makes what follows keyword-only
    ],
)
def test_every_callable_gets_config_and_context(target):
    module = BuilderSpec.of(target).build(VLLM_CONFIG)
    assert module.received == {"config": CONFIG, "parallel_context": CONTEXT}


def test_the_config_has_the_engines_dtype():
    """transformers builds a model in it, whatever the checkpoint's is."""
    engine = SimpleNamespace(hf_config=CONFIG, dtype=torch.bfloat16)
    built = BuilderSpec.of(by_name).build(SimpleNamespace(model_config=engine))
    assert built.received["config"].dtype == torch.bfloat16
    assert CONFIG.dtype == torch.float32


def test_any_subset_by_name():
    assert match_parameters(lambda: None) == {}
    assert match_parameters(lambda prefix: None) == {"prefix": "prefix"}
    assert match_parameters(lambda cfg: None) == {"cfg": "config"}
    assert match_parameters(lambda cfg, depth=2: None) == {"cfg": "config"}
    everything = BuilderSpec.of(
        lambda prefix, vllm_config, config, parallel_context: Recorder(
            all=(prefix, vllm_config, config, parallel_context)
        )
    )
    module = everything.build(VLLM_CONFIG, prefix="p")
    assert module.received["all"] == ("p", VLLM_CONFIG, CONFIG, CONTEXT)


@pytest.mark.parametrize(
    ("target", "named"),
    [
        (lambda config, parallel_context, tokenizer: None, "'tokenizer'"),
        (lambda vllm_config, other: None, "'other'"),
        (lambda a, b, c: None, "'a', 'b', 'c'"),
        (lambda config, *, tokenizer: None, "'tokenizer'"),
        (lambda *, depth: None, "'depth'"),
        (lambda *args, **kwargs: None, "names no parameter"),
    ],
)
def test_unknown_parameters_are_named(target, named):
    with pytest.raises(TypeError) as error:
        BuilderSpec.of(target)
    message = str(error.value)
    assert named in message
    assert "vllm_config, config, parallel_context, prefix" in message


def test_a_builder_that_raises_is_named_in_the_traceback():
    def broken(config):
        raise KeyError("no such layer")

    with pytest.raises(KeyError) as error:
        BuilderSpec.of(broken).build(VLLM_CONFIG)
    (note,) = error.value.__notes__
    assert "test_spec.test_a_builder_that_raises" in note and note.endswith(
        "broken ran."
    )


@pytest.mark.parametrize("result", [None, 3, nn.Linear])
def test_a_builder_that_returns_no_module(result):
    def build(config):
        return result

    with pytest.raises(TypeError, match=r"build returned \w+, but it must return"):
        BuilderSpec.of(build).build(VLLM_CONFIG)


def test_options():
    @model_builder
    def bare(config): ...

    @model_builder(head="out", batched=True)
    def full(config): ...

    assert BuilderSpec.of(bare).options == BuilderOptions()
    assert BuilderSpec.of(lambda config: None).options == BuilderOptions()
    assert BuilderSpec.of(full).options == BuilderOptions("out", True)
    assert BuilderSpec.of(functools.partial(full)).options.head == "out"
