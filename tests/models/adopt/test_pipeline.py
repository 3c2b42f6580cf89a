# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""Pipeline stages of adopted models, in a row and in engines of two workers."""

import copy
import pickle

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM, LlamaForCausalLM, LlamaModel
from transformers.modeling_outputs import BaseModelOutputWithPast

from tests.models.adopt.families import CONFIGS, make
from tests.models.adopt.inputs import PROMPTS, token_ids
from tests.models.adopt.plain import NanoConfig, NanoGPT
from tests.models.gpus import skip_without_gpus
from vllm import ModelRegistry, training
from vllm.model_executor.layers.training import TrainableAttention
from vllm.model_executor.models.builder import model_builder
from vllm.model_executor.parallel_context import ParallelContext
from vllm.training import parity


def context(rank, size=2, **options):
    return ParallelContext(pp_rank=rank, pp_size=size, rank=rank, **options)


def stages(model, size=2):
    return [
        training.adopt(copy.deepcopy(model), parallel_context=context(rank, size))
        for rank in range(size)
    ]


def in_a_row(parts, ids, **options):
    """What the last stage returns."""
    x = None
    options |= {"use_cache": False}
    options["position_ids"] = torch.arange(ids.shape[1]).expand(ids.shape)
    for part in parts:
        x = part(ids if x is None else None, hidden_states=x, **options)
    return x.logits


def test_stages_in_a_row_are_the_model(staged):
    """The bits, and each tensor of the checkpoint on one of them."""
    model = make(staged)
    parts = stages(model)
    ids = token_ids(2, 11, first=3)
    whole = training.adopt(copy.deepcopy(model))
    for mode in (training.batch_invariant, torch.no_grad):
        with mode(), torch.no_grad():
            expected = whole(ids, use_cache=False).logits
            assert torch.equal(in_a_row(parts, ids), expected)
    names = [set(part.state_dict()) for part in parts]
    assert names[0] | names[1] == set(model.state_dict())
    # A tied embedding is on both.
    assert all("embed_tokens" in name for name in names[0] & names[1])
    for index, part in enumerate(parts):
        held = [n for n, m in part.named_modules() if isinstance(m, TrainableAttention)]
        assert held == [f"model.layers.{index}.self_attn.trainable_attention"]
        assert "another pipeline stage has it" in part.adoption


def test_gradients_go_back_through_the_stages(staged):
    model = make(staged)
    parts, ids = stages(model), token_ids(2, 11, first=3)
    whole = training.adopt(copy.deepcopy(model))
    for logits in (whole(ids, use_cache=False).logits, in_a_row(parts, ids)):
        logits.float().log_softmax(-1)[..., 5].sum().backward()
    for name, parameter in whole.named_parameters():
        own = [dict(part.named_parameters()) for part in parts]
        gradients = [each[name].grad for each in own if name in each]
        total = sum(gradient for gradient in gradients if gradient is not None)
        scale = parameter.grad.abs().max() + 1e-6
        assert (total - parameter.grad).abs().max() <= 1e-5 * scale, name


def test_a_tied_head_has_the_embedding():
    first, last = stages(make("gemma3"))
    assert "lm_head.weight" not in first.state_dict()
    assert last.lm_head.weight is last.model.embed_tokens.weight
    first, last = stages(make("llama"))
    assert "model.embed_tokens.weight" not in last.state_dict()


def test_a_stage_of_several_ranks():
    part = training.adopt(
        make("mixtral"), parallel_context=context(1, tp_rank=1, tp_size=2)
    )
    assert [*part.state_dict()][0].startswith("model.layers.1.")
    assert part.model.layers[1].self_attn.trainable_attention.num_heads == 2
    assert part.model.layers[1].mlp.experts.down_proj.shape == (4, 64, 48)


def test_a_stage_can_be_copied_and_pickled():
    parts, ids = stages(make("qwen3")), token_ids(1, 5, first=3)
    with torch.no_grad():
        expected = in_a_row(parts, ids)
        assert torch.equal(in_a_row(copy.deepcopy(parts), ids), expected)
        pickled = pickle.loads(pickle.dumps(parts))
        assert torch.equal(in_a_row(pickled, ids), expected)


def test_a_stage_is_called_with_hidden_states():
    first, last = stages(make("qwen3"))
    with pytest.raises(ValueError, match="called without hidden_states"):
        last(token_ids(1, 5, first=3), use_cache=False)
    with pytest.raises(ValueError, match="with hidden_states on the first"):
        first(
            token_ids(1, 5, first=3),
            hidden_states=torch.zeros(1, 5, 64),
            use_cache=False,
        )
    with pytest.raises(ValueError, match="this rank's part of the model"):
        first.save_pretrained("unused")


class Written(LlamaModel):
    """Llama as someone might write it, with what a layer gets and what is returned."""

    def between(self, x, embeddings):
        return x

    def end(self, x):
        return x

    def layers_in_order(self):
        return self.layers

    def forward(self, input_ids=None, position_ids=None, inputs_embeds=None, **_):
        if inputs_embeds is None:
            inputs_embeds = self.embed_tokens(input_ids)
        x = embeddings = inputs_embeds * 2.0
        rotary = self.rotary_emb(x, position_ids)
        for layer in self.layers_in_order():
            x = layer(
                self.between(x, embeddings),
                position_embeddings=rotary,
                position_ids=position_ids,
            )
        return BaseModelOutputWithPast(last_hidden_state=self.end(self.norm(x)))


class Remembers(Written):
    def between(self, x, embeddings):
        return x + 0.1 * embeddings


class RemembersByView(Written):
    def between(self, x, embeddings):
        return x + embeddings.mean(-1, keepdim=True).expand_as(x)


class Scales(Written):
    def end(self, x):
        return x * 0.5


class Repeats(Written):
    def layers_in_order(self):
        return [*self.layers, *self.layers]


class Pairs(Written):
    def __init__(self, config):
        super().__init__(config)
        for index, layer in enumerate(self.layers):
            self.layers[index] = Pair(layer)

    def layers_in_order(self):
        return [lambda *a, layer=layer, **k: layer(*a, **k)[0] for layer in self.layers]


class Pair(nn.Module):
    def __init__(self, layer):
        super().__init__()
        self.layer = layer

    def forward(self, *args, **kwargs):
        x = self.layer(*args, **kwargs)
        return x, x * 2


class InTuple(Pair):
    def forward(self, *args, **kwargs):
        return self.layer(*args, **kwargs), None


class Tuples(Pairs):
    def __init__(self, config):
        super().__init__(config)
        for index, pair in enumerate(self.layers):
            self.layers[index] = InTuple(pair.layer)


def written(kind):
    torch.manual_seed(0)
    model = LlamaForCausalLM(CONFIGS["llama"]()).eval()
    model.model = kind(model.config)
    return model


@pytest.mark.parametrize("kind", [Written, Tuples])
def test_embeddings_are_changed_on_the_first_stage_only(kind):
    model, ids = written(kind), token_ids(2, 9, first=3)
    whole = training.adopt(copy.deepcopy(model))
    position_ids = torch.arange(9).expand(2, 9)
    with torch.no_grad():
        expected = whole(ids, position_ids=position_ids, use_cache=False).logits
        assert torch.equal(in_a_row(stages(model), ids), expected)


@pytest.mark.parametrize(
    ("make_model", "rank", "message"),
    [
        (lambda: written(Remembers), 1, r"model: uses what was computed from the emb"),
        (lambda: written(RemembersByView), 1, r"model: uses what was computed"),
        (lambda: written(Scales), 0, "does something to what its layers return"),
        (lambda: written(Repeats), 0, r"its 2 layers in the order \[0, 1, 0, 1\]"),
        (lambda: written(Pairs), 0, r"model: layer 0 .Pair. returns 2 tensors"),
        (lambda: make("gpt2"), 0, "GPT2LMHeadModel .* has no base_model_pp_plan"),
        (lambda: NanoGPT(NanoConfig()), 0, "NanoGPT .* has no base_model_pp_plan"),
    ],
)
def test_what_cannot_be_cut_is_refused(make_model, rank, message):
    model = make_model()
    before = dict(model.named_modules())
    with pytest.raises(ValueError, match=message):
        training.adopt(model, parallel_context=context(rank))
    assert dict(model.named_modules()) == before
    training.adopt(model)


def test_more_stages_than_layers():
    with pytest.raises(ValueError, match="2 layers cannot be spread over .*size=3"):
        training.adopt(make("llama"), parallel_context=context(0, 3))


@model_builder(supports_pp=True)
def build(config):
    return training.adopt(AutoModelForCausalLM.from_config(config))


def test_an_engine_of_two_stages(make_llm, tmp_path, monkeypatch, staged_and_dtype):
    skip_without_gpus(2)
    family, dtype = staged_and_dtype
    monkeypatch.setenv("VLLM_BATCH_INVARIANT", "1")
    original = make(family, getattr(torch, dtype))
    original.save_pretrained(tmp_path)
    ModelRegistry.register_model(type(original).__name__, build)
    llm = make_llm(tmp_path, dtype=dtype, max_model_len=64, pipeline_parallel_size=2)
    trainer = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=dtype).eval()
    report = parity.check(llm, training.adopt(trainer), PROMPTS, max_tokens=12)
    assert report.all_equal, report


def test_a_compiled_engine_of_two_stages(make_llm, tmp_path, monkeypatch):
    """Without code of the user's."""
    skip_without_gpus(2)
    monkeypatch.setenv("VLLM_CPU_CI_ENV", "1")  # traced, but not compiled to C++
    monkeypatch.setenv("VLLM_BATCH_INVARIANT", "1")
    make("qwen3").save_pretrained(tmp_path)
    builder = "vllm.model_executor.models.builder.adopt:causal_lm"
    llm = make_llm(
        tmp_path,
        max_model_len=64,
        enforce_eager=False,
        pipeline_parallel_size=2,
        model_class_overrides={"Qwen3ForCausalLM": builder},
    )
    trainer = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    report = parity.check(llm, training.adopt(trainer), PROMPTS, max_tokens=12)
    assert report.all_equal, report
