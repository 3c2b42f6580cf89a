# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""Pipeline stages: outside the engine, and in engines of several workers."""

from types import SimpleNamespace

import pytest
import torch
from torch import nn

from tests.models.builder.models import (
    GENERIC,
    PLAIN,
    PLAIN_FIELDS,
    PlainGPT,
    StagedGPT,
    assert_trainer_agrees,
    build_plain,
    build_staged,
    greedy,
    save_generic,
    save_plain,
)
from vllm import ModelRegistry
from vllm.model_executor.models.builder import PipelineLayers
from vllm.model_executor.models.generic_transformer import (
    GenericTransformerConfig,
    GenericTransformerForCausalLM,
    GenericTransformerForCausalLMVLLM,
)
from vllm.model_executor.parallel_context import ParallelContext

PROMPTS = [[1, 2, 3], list(range(20, 90)), [7], [5, 6] * 20]


def stage(rank: int, size: int) -> ParallelContext:
    return ParallelContext(pp_rank=rank, pp_size=size, rank=rank)


def test_each_stage_has_its_layers_under_their_own_index():
    made = []

    def make(index):
        made.append(index)
        return nn.Linear(1, 1)

    layers = PipelineLayers(7, make, stage(1, 3))
    assert (layers.start, layers.end, len(layers)) == (2, 5, 3)
    assert made == [2, 3, 4]
    assert [name for name, _ in layers.named_children()] == ["2", "3", "4"]
    assert list(layers) == [layers[2], layers[3], layers[4]]
    assert layers[-3] is layers[4] and layers[2:4] == list(layers)[:2]
    for index in (0, 5, -1, -7, 7):
        message = f"Layer {index} is not on this .* which has layers 2 to 4 of 7"
        with pytest.raises(IndexError, match=message):
            layers[index]
        with pytest.raises(IndexError, match=message):
            layers[index] = nn.Linear(1, 1)
    with pytest.raises(IndexError, match="Layer 1 is not on this"):
        layers[1:]


def test_a_layer_is_replaced_in_its_place():
    layers = PipelineLayers(5, lambda i: nn.Linear(1, 1), stage(1, 2))
    first, second = layers
    layers[3] = wrapped = nn.Sequential(first)
    layers[-1] = other = nn.Identity()
    assert list(layers) == [wrapped, other] and second not in layers
    assert [name for name, _ in layers.named_children()] == ["3", "4"]
    with pytest.raises(TypeError, match="not a Module"):
        layers[3] = 1


@pytest.mark.parametrize("size", [1, 2, 3, 5])
def test_the_stages_are_the_whole_model(size):
    parts = [
        PipelineLayers(5, lambda i: nn.Linear(1, 1), stage(r, size))
        for r in range(size)
    ]
    assert [i for p in parts for i in range(p.start, p.end)] == list(range(5))
    assert all(len(part) for part in parts)


def test_more_stages_than_layers():
    message = "2 layers cannot be spread over pipeline_parallel_size=3"
    with pytest.raises(ValueError, match=message):
        PipelineLayers(2, lambda i: nn.Linear(1, 1), stage(0, 3))


def test_a_partition_that_leaves_a_stage_empty(monkeypatch):
    monkeypatch.setenv("VLLM_PP_LAYER_PARTITION", "0,4")
    with pytest.raises(ValueError, match="gives pipeline stage 0 no layer"):
        PipelineLayers(4, lambda i: nn.Linear(1, 1), stage(0, 2))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("tied", [False, True])
def test_a_transformer_in_stages_is_the_transformer(tied, dtype):
    """The bits, wherever it is cut."""
    config = GenericTransformerConfig(
        vocab_size=50,
        hidden_size=64,
        num_hidden_layers=3,
        num_attention_heads=2,
        tie_word_embeddings=tied,
    )
    torch.manual_seed(0)
    whole = GenericTransformerForCausalLM(config).to(dtype)
    state, names = whole.state_dict(), set()
    hidden_states = None
    positions = torch.arange(6)
    for rank in range(3):
        part = GenericTransformerForCausalLM(config, stage(rank, 3)).to(dtype)
        part.load_state_dict({name: state[name] for name in part.state_dict()})
        names |= set(part.state_dict())
        ids = torch.arange(6) if rank == 0 else None
        hidden_states = part(ids, positions, hidden_states=hidden_states)
    assert names == set(state)
    assert torch.equal(hidden_states, whole(torch.arange(6)))


def test_a_plain_model_in_stages():
    config = SimpleNamespace(**PLAIN_FIELDS)
    whole, x = PlainGPT(config), None
    ids = torch.arange(6)[None]
    for rank in range(2):
        part = StagedGPT(config, stage(rank, 2))
        part.load_state_dict({n: whole.state_dict()[n] for n in part.state_dict()})
        x = part(ids, torch.arange(6)[None], hidden_states=x)
    assert torch.equal(x, whole(ids, torch.arange(6)[None]))


@pytest.mark.parametrize(
    ("build", "layers", "message"),
    [
        (build_plain, 2, r"the builder .*build_plain builds whole .*supports_pp=True"),
        (build_staged, 1, "1 layers cannot be spread over pipeline_parallel_size=2"),
    ],
)
def test_what_cannot_be_served_in_stages(make_llm, tmp_path, build, layers, message):
    save_plain(tmp_path, num_hidden_layers=layers)
    ModelRegistry.register_model(PLAIN, build)
    with pytest.raises(ValueError, match=message):
        make_llm(tmp_path, pipeline_parallel_size=2)


def test_two_eager_stages(make_llm, tmp_path):
    """A `[batch, seq]` model; each stage holds and synchronises its own weights."""
    model = save_plain(tmp_path, num_hidden_layers=3)
    ModelRegistry.register_model(PLAIN, build_staged)
    llm = make_llm(tmp_path, pipeline_parallel_size=2)
    assert_trainer_agrees(model, PROMPTS, greedy(llm, PROMPTS))

    held = llm.collective_rpc("get_kv_cache_spec")
    assert [list(spec) for spec in held] == [
        ["blocks.0.attention", "blocks.1.attention"],
        ["blocks.2.attention"],
    ]
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.05)
    tensors = [(name, tensor.clone()) for name, tensor in model.state_dict().items()]
    wrong = [*tensors, ("blocks.7.out.weight", torch.zeros(2, 2))]
    before = greedy(llm, PROMPTS)
    with pytest.raises(RuntimeError, match="Not in the model .1.: blocks.7.out.weight"):
        push(llm, wrong)
    assert [c.token_ids for c in greedy(llm, PROMPTS)] == [c.token_ids for c in before]
    push(llm, tensors)
    assert_trainer_agrees(model, PROMPTS, greedy(llm, PROMPTS))


def push(llm, tensors):
    llm.collective_rpc("reload_weights", kwargs={"weights_iterator": tensors})
    llm.reset_prefix_cache()


def test_two_compiled_stages(make_llm, tmp_path, monkeypatch):
    """A packed model with tied embeddings, whose last stage has both."""
    monkeypatch.setenv("VLLM_CPU_CI_ENV", "1")  # traced, but not compiled to C++
    model = save_generic(tmp_path, tie_word_embeddings=True)
    ModelRegistry.register_model(GENERIC, GenericTransformerForCausalLM.build)
    llm = make_llm(tmp_path, pipeline_parallel_size=2, enforce_eager=False)
    assert_trainer_agrees(model, PROMPTS, greedy(llm, PROMPTS))


def test_two_stages_of_two_ranks(make_llm, tmp_path, monkeypatch):
    """A module with vLLM's interface, which carries hidden states itself."""
    monkeypatch.setenv("VLLM_CPU_OMP_THREADS_BIND", "0|1|0|1")
    model = save_generic(tmp_path)
    ModelRegistry.register_model(GENERIC, GenericTransformerForCausalLMVLLM)
    llm = make_llm(tmp_path, tensor_parallel_size=2, pipeline_parallel_size=2)
    assert_trainer_agrees(model, PROMPTS, greedy(llm, PROMPTS))
