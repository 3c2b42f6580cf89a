# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""Adopted models compute what they computed before, in a trainer."""

import copy
from pickle import dumps, loads

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM

from tests.models.adopt.families import make
from tests.models.adopt.inputs import token_ids
from vllm import training
from vllm.model_executor.layers.training import TrainableAttention, TrainingLayer

# fp32 sums in another order, through two layers.
TOLERANCE = dict(rtol=1e-4, atol=1e-5)


@pytest.fixture(scope="module")
def pair(family):
    """A model and the same one adopted."""
    model = make(family)
    return model, training.adopt(copy.deepcopy(model))


def test_names_weights_and_object_stay(pair):
    model, adopted = pair
    weights, before = adopted.state_dict(), model.state_dict()
    assert list(weights) == list(before)
    assert all(torch.equal(weights[name], before[name]) for name in before)
    assert type(adopted).__name__ == type(model).__name__
    assert isinstance(adopted, type(model))
    again = copy.deepcopy(adopted.adoption)
    assert training.adopt(adopted) is adopted and adopted.adoption == again


def test_every_attention_and_weight_is_a_training_layer(pair):
    model, adopted = pair
    attentions = [m for m in adopted.modules() if isinstance(m, TrainableAttention)]
    assert len(attentions) == 2
    linears = (nn.Linear, nn.LayerNorm, nn.Embedding)
    assert not any(isinstance(m, linears) for m in adopted.modules())
    norms = [m for m in adopted.modules() if type(m).__name__.endswith("RMSNorm")]
    assert all(isinstance(norm, TrainingLayer) for norm in norms)


def test_rows_of_a_batch(pair):
    model, adopted = pair
    ids = token_ids(2, 11, first=3)
    expected = model(ids, use_cache=False).logits
    torch.testing.assert_close(
        adopted(ids, use_cache=False).logits, expected, **TOLERANCE
    )


def test_gradients(pair):
    model, adopted = pair
    ids = token_ids(2, 11, first=3)
    ids[:, 3] = 0  # padding, whose embedding gets no gradient in some models
    for each in pair:
        each.zero_grad()
        each(ids, labels=ids, use_cache=False).loss.backward()
    for (name, p), q in zip(
        adopted.named_parameters(), model.parameters(), strict=True
    ):
        scale = q.grad.abs().max().item() + 1e-6
        error = (p.grad - q.grad).abs().max().item()
        assert error <= 1e-4 * scale, (name, error, scale)


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding(pair, side):
    model, adopted = pair
    ids, mask = token_ids(3, 11, first=3), torch.ones(3, 11, dtype=torch.long)
    for row, padding in enumerate((0, 4, 10)):
        mask[row, slice(padding) if side == "left" else slice(11 - padding, 11)] = 0
    expected = model(ids, attention_mask=mask, use_cache=False).logits
    logits = adopted(ids, attention_mask=mask, use_cache=False).logits
    is_token = mask.bool()
    torch.testing.assert_close(logits[is_token], expected[is_token], **TOLERANCE)


def test_packed_positions(pair):
    model, adopted = pair
    ids = token_ids(2, 11, first=3)
    positions = torch.tensor([[0, 1, 2, 0, 1, 2, 3, 4, 0, 1, 0], [*range(11)]])
    expected = model(ids, position_ids=positions, use_cache=False).logits
    logits = adopted(ids, position_ids=positions, use_cache=False).logits
    torch.testing.assert_close(logits, expected, **TOLERANCE)


def test_given_lengths(pair):
    model, adopted = pair
    ids = token_ids(1, 11, first=3)
    positions = torch.tensor([[0, 1, 2, 0, 1, 2, 3, 4, 5, 6, 7]])
    lengths = torch.tensor([0, 3, 11], dtype=torch.int32)
    logits = adopted(
        ids,
        position_ids=positions,
        use_cache=False,
        cu_seq_lens_q=lengths,
        cu_seq_lens_k=lengths,
        max_length_q=8,
        max_length_k=8,
    ).logits
    first = model(ids[:, :3], use_cache=False).logits
    second = model(ids[:, 3:], use_cache=False).logits
    torch.testing.assert_close(logits, torch.cat([first, second], 1), **TOLERANCE)


def test_bf16(pair):
    model, adopted = (copy.deepcopy(each).bfloat16() for each in pair)
    ids = token_ids(2, 11, first=3)
    exact = pair[0](ids, use_cache=False).logits
    error = (model(ids, use_cache=False).logits - exact).abs().mean()
    own = (adopted(ids, use_cache=False).logits - exact).abs().mean()
    assert own <= 2 * error


def test_meta_device_and_a_checkpoint(pair, tmp_path):
    model, adopted = pair
    adopted.save_pretrained(tmp_path)
    with torch.device("meta"):
        empty = AutoModelForCausalLM.from_config(model.config)
    training.adopt(empty)
    if "meta device" not in empty.adoption:  # where a buffer has Gemma's scale
        assert empty.adoption == adopted.adoption
    assert all(p.is_meta for p in empty.parameters())
    ids = token_ids(1, 7, first=3)
    loaded = training.adopt(AutoModelForCausalLM.from_pretrained(tmp_path).eval())
    expected = adopted(ids, use_cache=False).logits
    assert torch.equal(loaded(ids, use_cache=False).logits, expected)
    unadopted = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    logits = unadopted(ids, use_cache=False).logits
    torch.testing.assert_close(logits, expected, **TOLERANCE)


def test_another_default_device(pair):
    """As in an engine on CUDA, which builds models under its device."""
    model, adopted = pair
    again = copy.deepcopy(model)
    with torch.device("meta"):
        training.adopt(again)
    assert again.adoption == adopted.adoption
    ids = token_ids(1, 7, first=3)
    expected = adopted(ids, use_cache=False).logits
    assert torch.equal(again(ids, use_cache=False).logits, expected)


def test_activation_checkpointing(pair):
    _, adopted = pair
    model = copy.deepcopy(adopted).train()
    ids = token_ids(2, 11, first=3)
    gradients = []
    for checkpointing in (False, True):
        if checkpointing:
            model.gradient_checkpointing_enable()
        model.zero_grad()
        model(ids, labels=ids, use_cache=False).loss.backward()
        gradients.append([p.grad.clone() for p in model.parameters()])
    assert all(map(torch.equal, *gradients))


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda m: loads(dumps(m))])
def test_compiled_experts_of_a_copy_are_its_own(copied):
    adopted = training.adopt(make("mixtral"))
    again = copied(adopted)
    experts, own = (each.model.layers[0].mlp.experts for each in (adopted, again))
    with torch.no_grad():
        own.down_proj.mul_(2)
        inputs = torch.randn(5, 64), torch.randint(4, (5, 2)), torch.rand(5, 2)
        compiled = torch.compile(own, backend="eager")(*inputs)
        assert torch.equal(compiled, own(*inputs))
        assert not torch.equal(compiled, experts(*inputs))
