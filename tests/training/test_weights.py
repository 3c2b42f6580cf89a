# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""Checkpoints: names, loading, saving."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from vllm.model_executor.layers.training import (
    MergedColumnParallelLinear,
    QKVParallelLinear,
)
from vllm.model_executor.models.generic_transformer import (
    GenericTransformerConfig,
    GenericTransformerForCausalLM,
)
from vllm.model_executor.parallel_context import ParallelContext
from vllm.training.weights import (
    CheckpointLayout,
    EngineLoader,
    checkpoint_tensors,
    load_checkpoint,
    save_checkpoint,
)


def config(**sizes) -> GenericTransformerConfig:
    return GenericTransformerConfig(
        **{
            "vocab_size": 100,
            "hidden_size": 64,
            "intermediate_size": 96,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "max_position_embeddings": 64,
            "rope_theta": 5000.0,
        }
        | sizes
    )


@pytest.mark.parametrize("tied", [False, True])
def test_the_checkpoint_is_llamas(tmp_path, tied):
    """transformers' Llama loads it strictly and computes the same."""
    torch.manual_seed(0)
    model = GenericTransformerForCausalLM(config(tie_word_embeddings=tied))
    model.save_pretrained(tmp_path)
    fields = json.loads((tmp_path / "config.json").read_text())
    del fields["model_type"], fields["architectures"]
    llama = LlamaForCausalLM(LlamaConfig(**fields))
    state = load_file(tmp_path / "model.safetensors")
    if tied:
        assert "lm_head.weight" not in state
        state["lm_head.weight"] = state["model.embed_tokens.weight"]
    llama.load_state_dict(state)
    ids = torch.randint(0, 100, (3, 40))
    with torch.no_grad():
        torch.testing.assert_close(
            model.double()(ids), llama.double()(ids).logits, rtol=1e-5, atol=1e-6
        )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("tied", [False, True])
def test_save_and_load(tmp_path, tied, dtype):
    model = GenericTransformerForCausalLM(config(tie_word_embeddings=tied)).to(dtype)
    model.save_pretrained(tmp_path)
    loaded = GenericTransformerForCausalLM.from_pretrained(tmp_path)
    assert (loaded.lm_head.weight is loaded.model.embed_tokens.weight) == tied
    for name, parameter in model.named_parameters():
        other = loaded.get_parameter(name)
        assert other.dtype == dtype and torch.equal(parameter, other), name
    for key, value in model.config.to_dict().items():
        assert loaded.config.to_dict()[key] == value, key


def test_a_state_dict_is_a_checkpoint_as_well(tmp_path):
    """Fused parameters are accepted whole, under the names of the module."""
    model = GenericTransformerForCausalLM(config())
    save_file(model.state_dict(), tmp_path / "model.safetensors")
    other = GenericTransformerForCausalLM(config())
    load_checkpoint(other, tmp_path)
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, other.get_parameter(name)), name


def test_several_files_and_an_index(tmp_path):
    model = GenericTransformerForCausalLM(config())
    tensors = dict(checkpoint_tensors(model))
    names = sorted(tensors)
    files = {"a.safetensors": names[::2], "b.safetensors": names[1::2]}
    for file, part in files.items():
        save_file({name: tensors[name].clone() for name in part}, tmp_path / file)
    index = {name: file for file, part in files.items() for name in part}
    (tmp_path / "model.safetensors.index.json").write_text(
        json.dumps({"weight_map": index})
    )
    other = GenericTransformerForCausalLM(config())
    load_checkpoint(other, tmp_path)
    assert all(map(torch.equal, model.parameters(), other.parameters()))


def test_everything_that_does_not_fit_is_named_and_nothing_written(tmp_path):
    model = GenericTransformerForCausalLM(config())
    tensors = {name: t.clone() for name, t in checkpoint_tensors(model)}
    del tensors["model.layers.0.self_attn.v_proj.weight"], tensors["lm_head.weight"]
    tensors["model.norm.weight"] = torch.zeros(3)
    tensors["model.layers.1.self_attn.k_proj.weight"] = torch.zeros(64, 64)
    tensors |= {"surprise": torch.zeros(1), "model.layers.2.x": torch.zeros(1)}
    save_file(tensors, tmp_path / "model.safetensors")
    other = GenericTransformerForCausalLM(config())
    before = {name: p.clone() for name, p in other.named_parameters()}
    with pytest.raises(ValueError) as error:
        load_checkpoint(other, tmp_path)
    assert str(error.value) == (
        "The checkpoint does not fit the model. Missing (2): lm_head.weight; "
        "model.layers.0.self_attn.v_proj.weight. Not in the model (2): "
        "model.layers.2.x; surprise. Wrong shape (2): "
        "model.layers.1.self_attn.k_proj.weight is [64, 64], the model needs "
        "[32, 64]; model.norm.weight is [3], the model needs [64]."
    )
    assert all(torch.equal(before[n], p) for n, p in other.named_parameters())


def test_an_empty_directory(tmp_path):
    with pytest.raises(FileNotFoundError, match="no model.safetensors and no"):
        load_checkpoint(GenericTransformerForCausalLM(config()), tmp_path)
    with pytest.raises(FileNotFoundError, match="no config.json"):
        GenericTransformerForCausalLM.from_pretrained(tmp_path)


class Fused(nn.Module):
    """Fused layers whose checkpoint keeps the fused tensor, with a buffer."""

    def __init__(self, context: ParallelContext):
        super().__init__()
        self.qkv = QKVParallelLinear(8, 4, 4, 2, parallel_context=context)
        self.up = MergedColumnParallelLinear(8, [4, 4], parallel_context=context)
        self.register_buffer("step", torch.zeros(()))
        self.register_buffer("cache", torch.zeros(2), persistent=False)


def test_the_layout_of_fused_layers_and_buffers():
    layout = CheckpointLayout.of(Fused(ParallelContext.single()))
    shapes = {name: list(entry.shape) for name, entry in layout.tensors.items()}
    assert shapes == {
        "qkv.weight": [32, 8],
        "qkv.bias": [32],
        "up.weight": [8, 8],
        "up.bias": [8],
        "step": [],
    }


@pytest.mark.parametrize("rank", [0, 1])
def test_each_rank_takes_its_sections_of_a_fused_tensor(rank):
    """Without the engine's layers: what a user's subclass of a linear gets."""
    context = ParallelContext(tp_rank=rank, tp_size=2)
    full, shard = Fused(ParallelContext.single()), Fused(context)
    layout = CheckpointLayout.of(shard)
    loader = EngineLoader(shard, layout, None)
    loader.load(checkpoint_tensors(full))

    q, k, v = full.qkv.weight.split([16, 8, 8])
    pieces = [part.chunk(2)[rank] for part in (q, k, v)]
    assert torch.equal(shard.qkv.weight, torch.cat(pieces))
    gate, up = full.up.bias.split(4)
    assert torch.equal(
        shard.up.bias, torch.cat([gate.chunk(2)[rank], up.chunk(2)[rank]])
    )


def test_later_loads_may_bring_whole_modules():
    model = GenericTransformerForCausalLM(config())
    loader = EngineLoader(model, CheckpointLayout.of(model), None)
    with pytest.raises(ValueError, match="Missing"):
        loader.load([("model.norm.weight", torch.ones(64))])
    loader.load(list(checkpoint_tensors(GenericTransformerForCausalLM(config()))))
    assert loader.load([("model.norm.weight", torch.full((64,), 2.0))]) == {
        "model.norm.weight"
    }
    assert model.model.norm.weight.eq(2).all()
    before = [p.clone() for p in model.parameters()]
    with pytest.raises(ValueError, match="Not in the model .1.: no.such"):
        loader.load([("model.norm.weight", torch.ones(64)), ("no.such", torch.ones(1))])
    part = "model.layers.1.self_attn.q_proj.weight"
    with pytest.raises(
        ValueError, match=r"Missing .2.: model\.layers\.1\.self_attn\.k"
    ):
        loader.load([(part, torch.ones(64, 64))])
    assert all(map(torch.equal, before, model.parameters()))


def test_a_tied_tensor_under_its_other_name(tmp_path):
    """As safetensors' `save_model` leaves it: one of the names, whichever."""
    model = GenericTransformerForCausalLM(config(tie_word_embeddings=True))
    tensors = {name: t.clone() for name, t in checkpoint_tensors(model)}
    tensors["lm_head.weight"] = tensors.pop("model.embed_tokens.weight")
    save_file(tensors, tmp_path / "model.safetensors")
    other = GenericTransformerForCausalLM(config(tie_word_embeddings=True))
    load_checkpoint(other, tmp_path)
    assert torch.equal(other.lm_head.weight, model.lm_head.weight)
    assert other.lm_head.weight is other.model.embed_tokens.weight


def test_a_module_in_two_places(tmp_path):
    shared = nn.Linear(2, 2)
    module = nn.ModuleDict({"a": shared, "b": shared})
    assert list(CheckpointLayout.of(module).tensors) == ["a.weight", "a.bias"]
    state = {name: t.clone() for name, t in module.state_dict().items()}
    save_file(state, tmp_path / "model.safetensors")
    load_checkpoint(module, tmp_path)


def test_a_shard_of_other_processes_is_not_saved(tmp_path):
    sharded = Fused(ParallelContext(tp_rank=0, tp_size=2))
    with pytest.raises(RuntimeError, match=r"qkv.weight of shape \[32, 8\] is sharded"):
        save_checkpoint(sharded, tmp_path / "new")
    assert not (tmp_path / "new").exists()


def test_tensors_of_no_elements_and_scalars(tmp_path):
    module, other = nn.Module(), nn.Module()
    for part, value in ((module, 2.0), (other, 0.0)):
        part.scale = nn.Parameter(torch.tensor(value))
        part.empty = nn.Parameter(torch.empty(0, 3))
    save_checkpoint(module, tmp_path)
    assert load_file(tmp_path / "model.safetensors").keys() == {"scale", "empty"}
    load_checkpoint(other, tmp_path)
    assert other.scale == 2
