# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""Layer names, and telling what a built module is."""

from types import SimpleNamespace

import pytest
from torch import nn

from vllm.model_executor.layers.training import (
    ColumnParallelLinear,
    ParallelLMHead,
    TrainableAttention,
    VocabParallelEmbedding,
)
from vllm.model_executor.models.builder.binding import (
    attention_layer_name,
    bind_engine_layers,
)
from vllm.model_executor.models.builder.head import find_head
from vllm.model_executor.models.builder.interface import (
    check_takes_hidden_states,
    has_vllm_interface,
)
from vllm.model_executor.models.utils import extract_layer_index
from vllm.model_executor.parallel_context import ParallelContext


@pytest.mark.parametrize(
    ("path", "name"),
    [
        ("model.layers.3.attn", "model.layers.3.attn"),
        ("attn", "attn.5"),
        ("blocks.1.sub.2.attn", "blocks1.sub2.attn.5"),
        ("0.1", "m01.5"),
    ],
)
def test_attention_layers_are_named_after_their_path(path, name):
    assert attention_layer_name(path, 5) == name
    assert extract_layer_index(name) == (3 if "3" in path else 5)


def test_one_attention_in_two_places_is_refused(monkeypatch):
    attention = TrainableAttention(2, 32)
    monkeypatch.setattr(attention, "bind_engine", lambda config, name: attention)
    module = nn.ModuleDict({"first": attention, "second": attention})
    with pytest.raises(ValueError, match="'first' and 'second' are one Train"):
        bind_engine_layers(module, SimpleNamespace())


def test_layers_are_replaced_everywhere_and_stay_tied(monkeypatch):
    linear = ColumnParallelLinear(4, 4, bias=False)
    other = nn.Linear(4, 4, bias=False)
    other.weight = linear.weight
    module = nn.ModuleDict({"a": linear, "b": nn.Sequential(linear), "c": other})
    replacement = nn.Linear(4, 4, bias=False)
    monkeypatch.setattr(linear, "bind_engine", lambda config, name: replacement)
    bind_engine_layers(module, SimpleNamespace())
    assert module["a"] is module["b"][0] is replacement
    assert module["c"].weight is replacement.weight


def test_a_replacement_keeps_the_public_attributes(monkeypatch):
    linear = ColumnParallelLinear(4, 4)
    linear.q_size = 3
    replacement = nn.Linear(4, 4)
    monkeypatch.setattr(linear, "bind_engine", lambda config, name: replacement)
    bind_engine_layers(nn.Sequential(linear), SimpleNamespace())
    assert replacement.q_size == 3 and replacement.out_features == 4
    assert replacement.parallel_context is linear.parallel_context


def test_only_the_head_becomes_the_engines(monkeypatch):
    module = nn.ModuleDict(
        {"head": ParallelLMHead(8, 4), "other": ParallelLMHead(8, 4)}
    )
    replacement = nn.Linear(4, 8)
    for head in module.values():
        monkeypatch.setattr(head, "bind_engine", lambda config, name: replacement)
    bind_engine_layers(module, SimpleNamespace(), head="head")
    assert module["head"] is replacement
    assert type(module["other"]) is ParallelLMHead


def test_a_users_subclass_is_left_alone():
    class Doubled(ColumnParallelLinear):
        def forward(self, x):
            return 2 * super().forward(x)

    module = nn.Sequential(Doubled(4, 4))
    bind_engine_layers(module, SimpleNamespace())
    assert type(module[0]) is Doubled


SIZES = (10, 4)


def test_the_head_is_found():
    head = nn.Linear(4, 10)
    named = nn.ModuleDict({"lm_head": head, "other": nn.Linear(4, 10)})
    assert find_head(named, None, "b", SIZES) == "lm_head"
    by_shape = nn.ModuleDict(
        {"tokens": nn.Embedding(10, 4), "mid": nn.Linear(4, 4), "out": head}
    )
    assert find_head(by_shape, None, "b", SIZES) == "out"
    assert find_head(named, "other", "b", SIZES) == "other"
    below = nn.ModuleDict({"model": named, "other": nn.Linear(4, 10)})
    assert find_head(below, None, "b", SIZES) == "model.lm_head"


@pytest.mark.parametrize("tp_size", [1, 2])
def test_the_head_is_found_among_parallel_layers(tp_size):
    context = ParallelContext(tp_size=tp_size)
    layers = nn.ModuleDict(
        {
            "tokens": VocabParallelEmbedding(10, 4, parallel_context=context),
            "out": ParallelLMHead(10, 4, parallel_context=context),
        }
    )
    assert find_head(layers, None, "b", SIZES) == "out"
    del layers["out"]
    with pytest.raises(ValueError, match="none have a weight of shape"):
        find_head(layers, None, "b", SIZES)


def test_the_head_is_ambiguous_or_missing():
    two = nn.ModuleDict({"x": nn.Linear(4, 10), "y": nn.Linear(4, 10)})
    with pytest.raises(ValueError, match=r"\['x', 'y'\].*model_builder\(head="):
        find_head(two, None, "b", SIZES)
    with pytest.raises(ValueError, match="none have a weight of shape"):
        find_head(nn.ModuleDict({"z": nn.Linear(4, 4)}), None, SIZES, "b")
    with pytest.raises(ValueError, match="no such submodule; it has x, y"):
        find_head(two, "head", "b", SIZES)


def test_half_an_engine_interface_is_refused():
    class Half(nn.Module):
        def forward(self, input_ids, positions): ...

        def compute_logits(self, hidden_states): ...

    assert not has_vllm_interface(nn.Linear(1, 1), "b")
    with pytest.raises(TypeError, match="lacks embed_input_ids, load_weights"):
        has_vllm_interface(Half(), "b")
    Half.embed_input_ids = Half.load_weights = Half.compute_logits
    assert has_vllm_interface(Half(), "b")
    with pytest.raises(TypeError, match="lacks make_empty_intermediate_tensors"):
        has_vllm_interface(Half(), "b", stages=2)


def test_a_stage_has_to_take_hidden_states():
    class Stage(nn.Module):
        def forward(self, input_ids, positions, hidden_states=None): ...

    check_takes_hidden_states(Stage(), "b")
    with pytest.raises(TypeError, match="no parameter hidden_states, in which later"):
        check_takes_hidden_states(nn.Linear(1, 1), "b")
