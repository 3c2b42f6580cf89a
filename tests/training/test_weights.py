# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""Checkpoints: names, loading, saving."""

import copy
import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from vllm.model_executor.checkpoint.layout import CheckpointLayout
from vllm.model_executor.checkpoint.load import load_checkpoint
from vllm.model_executor.checkpoint.save import checkpoint_tensors, save_checkpoint
from vllm.model_executor.layers.training import (
    MergedColumnParallelLinear,
    QKVParallelLinear,
)
from vllm.model_executor.models.builder.loader import EngineLoader
from vllm.model_executor.models.generic_transformer import (
    GenericTransformerConfig,
    GenericTransformerForCausalLM,
)
from vllm.model_executor.parallel_context import ParallelContext
from vllm.training import save_state


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


@pytest.mark.parametrize("names", ["first last", "last first"])
def test_tied_tensors_that_differ_are_refused(tmp_path, names):
    """The head's and the embedding's, by everything that loads."""
    tied = GenericTransformerForCausalLM(config(tie_word_embeddings=True))
    tensors = {name: t.clone() for name, t in checkpoint_tensors(tied)}
    head, embedding = "lm_head.weight", "model.embed_tokens.weight"
    tensors[head] = tensors[embedding].bfloat16()
    order = sorted(tensors, reverse=names == "last first")
    bfloat16 = GenericTransformerForCausalLM(
        config(tie_word_embeddings=True)
    ).bfloat16()
    save_file(tensors, tmp_path / "model.safetensors")
    load_checkpoint(bfloat16, tmp_path)  # rounded, they are equal
    assert torch.equal(bfloat16.lm_head.weight, tied.lm_head.weight.bfloat16())

    message = f"different in the checkpoint.*tie_word_embeddings=False .1.: {head} and "
    before = [p.clone() for p in tied.parameters()]
    with pytest.raises(ValueError, match=f"{message}{embedding}"):
        load_checkpoint(tied, tmp_path)
    tied.config.to_json_file(tmp_path / "config.json")
    with pytest.raises(ValueError, match=f"{message}{embedding}"):
        GenericTransformerForCausalLM.from_pretrained(tmp_path)
    loader = EngineLoader(tied, CheckpointLayout.of(tied), None)
    loader.load((name, tensors[name]) for name in order if name != head)
    with pytest.raises(ValueError, match="Tied in the model and different"):
        loader.load((name, tensors[name]) for name in order)
    assert all(map(torch.equal, before, tied.parameters()))
    loader = EngineLoader(tied, CheckpointLayout.of(tied), None)
    with pytest.raises(ValueError, match="Tied in the model and different"):
        loader.load((name, tensors[name]) for name in order)
    tensors[head] = tensors[embedding]
    for _ in range(2):  # a first load and a later one
        loader.load((name, tensors[name]) for name in order)
    assert torch.equal(tied.lm_head.weight, tensors[head])


def test_ties_stay(tmp_path):
    """Where torch gives each place a parameter of its own."""
    source = GenericTransformerForCausalLM(config(tie_word_embeddings=True))
    state = {name: tensor.clone() for name, tensor in source.state_dict().items()}
    with torch.device("meta"):
        model, assigned = (
            GenericTransformerForCausalLM(config(tie_word_embeddings=True))
            for _ in range(2)
        )
    model.to_empty(device="cpu").load_state_dict(state)
    assigned.load_state_dict(state, assign=True)
    for each in (model, assigned, copy.deepcopy(source)):
        assert each.lm_head.weight is each.model.embed_tokens.weight
        assert torch.equal(each.lm_head.weight, source.lm_head.weight)
    # What is untied on purpose stays so.
    model.lm_head.weight = nn.Parameter(model.lm_head.weight.detach().clone())
    model.double().to_empty(device="cpu")
    assert model.lm_head.weight is not model.model.embed_tokens.weight
    with pytest.raises(ValueError, match="are two parameters. Tie them"):
        model.save_pretrained(tmp_path)
    assert not list(tmp_path.iterdir())


def test_a_module_on_the_meta_device_is_refused(tmp_path):
    optimizer = torch.optim.SGD(nn.Linear(2, 2).parameters())
    save_checkpoint(nn.Linear(2, 2), tmp_path)
    module = nn.Linear(2, 2, device="meta")
    for call in (
        lambda: load_checkpoint(module, tmp_path),
        lambda: save_checkpoint(module, tmp_path),
        lambda: save_state(module, optimizer, tmp_path / "state"),
        lambda: EngineLoader(module, CheckpointLayout.of(module), None),
    ):
        with pytest.raises(ValueError, match=r"are on the meta .* weight. .*to_empty"):
            call()


@pytest.mark.parametrize(
    "dtype",
    [torch.int8, torch.bool, torch.float8_e4m3fn, torch.complex64, torch.int64],
)
def test_tensors_that_are_no_floats_are_refused(tmp_path, dtype):
    module = nn.Linear(2, 2, bias=False)
    before = module.weight.clone()
    tensors = {"weight": torch.ones(2, 2).to(dtype)}
    save_file(tensors, tmp_path / "model.safetensors")
    message = (
        rf"Wrong dtype; only fp64.* .1.: weight is {dtype}, the model needs float32"
    )
    message = message.replace("torch.", "")
    with pytest.raises(ValueError, match=message):
        load_checkpoint(module, tmp_path)
    for complete in (True, False):
        loader = EngineLoader(module, CheckpointLayout.of(module), None, complete)
        with pytest.raises(ValueError, match=message):
            loader.load(tensors.items())
    assert torch.equal(module.weight, before)


def test_floats_are_converted(tmp_path):
    module = nn.Linear(2, 2, bias=False).bfloat16()
    for dtype in (torch.float64, torch.float32, torch.float16):
        weight = torch.randn(2, 2, dtype=dtype)
        save_file({"weight": weight}, tmp_path / "model.safetensors")
        load_checkpoint(module, tmp_path)
        assert torch.equal(module.weight, weight.bfloat16())
    module.register_buffer("count", torch.zeros(1, dtype=torch.int64))
    for dtype in (torch.int32, torch.float32):
        tensors = {"weight": weight, "count": torch.ones(1, dtype=dtype)}
        save_file(tensors, tmp_path / "model.safetensors")
        with pytest.raises(ValueError, match="count is .*, the model needs int64"):
            load_checkpoint(module, tmp_path)


def test_what_is_no_tensor_is_refused_by_the_engine():
    """Such as what arrives in an engine that is in another process."""
    module = nn.Linear(2, 2, bias=False)
    loader = EngineLoader(module, CheckpointLayout.of(module), None, complete=False)
    before = module.weight.clone()
    for given in (
        [["weight", ["float32", [2, 2], 0]]],
        {"weight": torch.ones(2, 2)},
        [("weight", torch.ones(2, 2)), ("bias", None)],
    ):
        with pytest.raises(TypeError, match="another process.*weights_path"):
            loader.load(given)
    assert torch.equal(module.weight, before)


def test_a_tensor_is_given_once():
    module = QKVParallelLinear(8, 4, 4, 2, part_names=("q", "k", "v"))
    layout = CheckpointLayout.of(nn.ModuleDict({"qkv": module}))
    tensors = {n: torch.ones(entry.shape) for n, entry in layout.tensors.items()}
    loader = EngineLoader(nn.ModuleDict({"qkv": module}), layout, None)
    with pytest.raises(ValueError, match="Given twice .1.: q.weight"):
        loader.load([*tensors.items(), ("q.weight", torch.zeros(16, 8))])
    with pytest.raises(ValueError, match="whole and in parts .1.: qkv.weight"):
        loader.load([*tensors.items(), ("qkv.weight", torch.zeros(32, 8))])


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
