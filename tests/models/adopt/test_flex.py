# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""Models in plain PyTorch that call `flex_attention`."""

import copy
import json

import pytest
import torch
import torch.nn.functional as F
from torch.nn.attention.flex_attention import create_block_mask, flex_attention

from tests.models.adopt.inputs import token_ids
from tests.models.adopt.plain import NanoAttention, NanoConfig, nano_with
from vllm import ModelRegistry, training
from vllm.training import parity

CONFIG = NanoConfig()
LENGTH = 11


def causal(b, h, q, k):
    return q >= k


def within_4(b, h, q, k):
    return (q >= k) & (q - k < 4)


def capped(score, b, h, q, k):
    return 0.5 * torch.tanh(score / 0.5)


class FlexAttention(NanoAttention):
    """Grouped heads; the mask and the scores are those of the class."""

    mask_mod, score_mod = staticmethod(causal), None
    block_mask = None
    attention = staticmethod(flex_attention)

    def forward(self, x):
        batch, seq, width = x.shape
        q, k, v = (
            each.view(batch, seq, 2, 32).transpose(1, 2)
            for each in self.c_attn(x).split(width, dim=2)
        )
        y = self.attend(q, k[:, :1], v[:, :1])
        return self.c_proj(y.transpose(1, 2).reshape(batch, seq, width))

    def attend(self, q, k, v):
        seq = q.shape[2]
        mask = self.block_mask
        if mask is None and self.mask_mod is not None:
            mask = create_block_mask(self.mask_mod, None, None, seq, seq, q.device)
        return self.attention(q, k, v, self.score_mod, mask, scale=0.3, enable_gqa=True)


class Windowed(FlexAttention):
    mask_mod, score_mod = staticmethod(within_4), staticmethod(capped)


class CompiledAttention(Windowed):
    attention = staticmethod(torch.compile(flex_attention))


class Written(Windowed):
    """What it computes, written out; on CPU torch's has no backward."""

    def attend(self, q, k, v):
        scores = q @ k.mT * 0.3
        if self.score_mod is not None:
            scores = self.score_mod(scores, 0, 0, 0, 0)
        places = torch.arange(q.shape[2])
        mask = self.mask_mod(0, 0, places[:, None], places)
        return F.softmax(scores.masked_fill(~mask, -torch.inf), -1) @ v


def _site(model):
    return model.h[0].attn.trainable_attention.site


@pytest.mark.parametrize("attention", [FlexAttention, Windowed, CompiledAttention])
def test_logits_and_gradients(attention, monkeypatch):
    adopted = training.adopt(nano_with(attention))
    monkeypatch.setattr(Written, "mask_mod", staticmethod(attention.mask_mod))
    monkeypatch.setattr(Written, "score_mod", staticmethod(attention.score_mod))
    if attention.score_mod is None:
        monkeypatch.setattr(Written, "score_mod", None)
    model = nano_with(Written)
    assert _site(adopted).num_kv_heads == 1
    assert _site(adopted).sliding_window == (None if attention is FlexAttention else 4)
    assert _site(adopted).logits_soft_cap == (
        None if attention is FlexAttention else 0.5
    )
    ids = token_ids(2, LENGTH)
    with torch.no_grad():
        torch.testing.assert_close(
            nano_with(attention)(ids)[0], model(ids)[0], rtol=1e-4, atol=2e-5
        )
    logits = [each(ids)[0] for each in (model, adopted)]
    torch.testing.assert_close(*logits, rtol=1e-4, atol=2e-5)
    for each in logits:
        each.square().mean().backward()
    for p, q in zip(model.parameters(), adopted.parameters(), strict=True):
        assert (p.grad - q.grad).abs().max() <= 1e-4 * p.grad.abs().max()
    training.check_servable(adopted, CONFIG)


def test_compiled_with_the_model():
    adopted = training.adopt(nano_with(Windowed))
    ids = token_ids(2, LENGTH)
    with training.batch_invariant(), torch.no_grad():
        options = {"emulate_precision_casts": True}
        compiled = torch.compile(adopted, fullgraph=True, options=options)
        assert torch.equal(compiled(ids)[0], adopted(ids)[0])


def test_packed_sequences():
    """A mask that keeps sequences apart, in a trainer."""
    adopted = training.adopt(nano_with(Windowed))
    sequence = torch.tensor([[0] * 5 + [1] * 6, [0] * 11])

    def document(b, h, q, k):
        return within_4(b, h, q, k) & (sequence[b, q] == sequence[b, k])

    mask = create_block_mask(document, 2, None, LENGTH, LENGTH, "cpu")
    for block in adopted.h:
        block.attn.block_mask = mask
    ids, positions = token_ids(2, LENGTH), torch.arange(LENGTH).repeat(2, 1)
    positions[0, 5:] -= 5
    packed = adopted(ids, positions)[0]
    for block in adopted.h:
        block.attn.block_mask = None
    torch.testing.assert_close(packed[:1, :5], adopted(ids[:1, :5])[0])
    torch.testing.assert_close(packed[:1, 5:], adopted(ids[:1, 5:])[0])
    torch.testing.assert_close(packed[1:], adopted(ids[1:])[0])


def test_one_mask_for_layers_and_batches():
    """What was checked of a mask holds for one window and one batch size."""
    model = nano_with(FlexAttention)
    model.h[1].attn = Windowed(CONFIG)
    adopted = training.adopt(model.eval())
    mask = create_block_mask(causal, None, None, LENGTH, LENGTH, "cpu")
    adopted.h[0].attn.block_mask = mask
    adopted(token_ids(1, LENGTH))
    adopted.h[1].attn.block_mask = mask
    with pytest.raises(ValueError, match="not causal attention, within a window"):
        adopted(token_ids(1, LENGTH))

    adopted = training.adopt(nano_with(FlexAttention))
    sequence = torch.tensor([0] * 5 + [1] * 6)

    def document(b, h, q, k):
        return (q >= k) & (sequence[q] == sequence[k])

    mask = create_block_mask(document, None, None, LENGTH, LENGTH, "cpu")
    ids = token_ids(4, LENGTH)
    positions = torch.cat([torch.arange(5), torch.arange(6)]).expand(4, LENGTH)
    expected = [adopted(part)[0] for part in (ids[:, :5], ids[:, 5:])]
    for block in adopted.h:
        block.attn.block_mask = mask
    for batch in (2, 4):
        packed = adopted(ids[:batch], positions[:batch])[0]
        for part, whole in zip(packed.split([5, 6], 1), expected, strict=True):
            torch.testing.assert_close(part, whole[:batch])


def prefix(b, h, q, k):
    return (q >= k) | (k < 3)


def dilated(b, h, q, k):
    return (q >= k) & ((q - k) % 2 == 0)


def first_head_sees_more(b, h, q, k):
    return (q >= k) & ((q - k < 4) | (h == 0))


def sinks(b, h, q, k):
    return (q >= k) & ((q - k < 4) | (k < 1))


ALLOWED = torch.ones(LENGTH, LENGTH, dtype=torch.bool).tril()


def from_a_table(b, h, q, k):
    return ALLOWED[q, k]


def biased(score, b, h, q, k):
    return score + (k - q) * 2.0**-h


def capped_by_head(score, b, h, q, k):
    cap = 20.0 + h
    return cap * torch.tanh(score / cap)


def clipped(score, b, h, q, k):
    return score.clamp(-30, 30)


@pytest.mark.parametrize(
    ("mask_mod", "score_mod", "message"),
    [
        (None, None, "not causal"),
        (prefix, None, "not causal"),
        (dilated, None, "not causal"),
        (first_head_sees_more, None, "not causal"),
        (sinks, None, "not causal"),
        (from_a_table, None, "uses more than the places"),
        (causal, biased, "score_mod that is neither"),
        (causal, capped_by_head, "score_mod that is neither"),
        (causal, clipped, "score_mod that is neither"),
    ],
)
def test_other_functions_are_refused_by_name(mask_mod, score_mod, message, monkeypatch):
    for name, function in (("mask_mod", mask_mod), ("score_mod", score_mod)):
        function = function and staticmethod(function)
        monkeypatch.setattr(FlexAttention, name, function)
    with pytest.raises(ValueError, match=rf"h\.0\.attn: .*{message}"):
        training.adopt(nano_with(FlexAttention))


@pytest.mark.parametrize(
    ("name", "function"), [("mask_mod", causal), ("score_mod", biased)]
)
def test_another_function_than_when_adopted(name, function, monkeypatch):
    adopted = training.adopt(nano_with(Windowed))
    monkeypatch.setattr(Windowed, name, staticmethod(function))
    with pytest.raises(ValueError, match="of when the model was adopted"):
        adopted(token_ids(1, LENGTH))


def test_same_bits(make_llm, tmp_path, monkeypatch):
    monkeypatch.setenv("VLLM_BATCH_INVARIANT", "1")
    model = nano_with(Windowed)
    training.save_checkpoint(model, tmp_path)
    fields = {"architectures": ["Flex"], **vars(CONFIG)}
    (tmp_path / "config.json").write_text(json.dumps(fields))
    ModelRegistry.register_model(
        "Flex", lambda config: training.adopt(nano_with(Windowed))
    )
    llm = make_llm(tmp_path, max_model_len=96)
    trainer = training.adopt(copy.deepcopy(model))
    prompts = [[5, 6, 7, 8, 9], [3 + i % 90 for i in range(40)], [4]]
    report = parity.check(llm, trainer, prompts, max_tokens=12)
    assert report.all_equal, report
