# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""Models in plain PyTorch that write attention out."""

import copy
import json
import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from tests.models.adopt.inputs import token_ids
from tests.models.adopt.plain import NanoAttention, NanoConfig, nano_with
from vllm import ModelRegistry, training
from vllm.training import parity

CONFIG = NanoConfig()


class Masked(NanoAttention):
    """nanoGPT's own way, with a mask in a buffer and dropout."""

    dropout = 0.0

    def __init__(self, config):
        super().__init__(config)
        self.attn_dropout = nn.Dropout(self.dropout)
        size = config.max_position_embeddings
        mask = torch.tril(torch.ones(size, size)).view(1, 1, size, size)
        self.register_buffer("bias", mask, persistent=False)

    def forward(self, x):
        batch, seq, width = x.shape
        q, k, v = (
            each.view(batch, seq, 2, 32).transpose(1, 2)
            for each in self.c_attn(x).split(width, dim=2)
        )
        y = self.attend(q, k, v, seq)
        return self.c_proj(y.transpose(1, 2).contiguous().view(batch, seq, width))

    def attend(self, q, k, v, seq):
        att = (q @ k.transpose(-2, -1)) * (1.0 / math.sqrt(k.size(-1)))
        att = self.mask(att, seq)
        att = F.softmax(att, dim=-1)
        return self.attn_dropout(att) @ v

    def mask(self, att, seq):
        return att.masked_fill(self.bias[:, :, :seq, :seq] == 0, float("-inf"))


class Capped(Masked):
    """One key head, a window, a soft cap, softmax in fp32."""

    def attend(self, q, k, v, seq):
        k, v = k[:, :1], v[:, :1]
        scores = torch.matmul(q * 0.5, k.mT)
        scores = torch.tanh(scores / 2.0) * 2.0
        places = torch.arange(seq, device=q.device)
        distance = places[:, None] - places[None, :]
        scores = torch.where((distance >= 0) & (distance < 4), scores, -1e9)
        weights = torch.softmax(scores, -1, torch.float32).to(q.dtype)
        return torch.matmul(weights, v)


class Added(Masked):
    """A mask of numbers, in place."""

    def attend(self, q, k, v, seq):
        scores = torch.matmul(q, k.mT).div_(4)
        assert scores.shape[-1] == seq and scores.dtype == q.dtype
        mask = torch.full((seq, seq), torch.finfo(q.dtype).min, device=q.device)
        scores += torch.triu(mask, diagonal=1)
        return scores.float().softmax(dim=-1).type_as(q) @ v


class CastLikeScores(Masked):
    """Mask and values are cast to what the scores are."""

    def attend(self, q, k, v, seq):
        scores = q @ k.mT * 0.25
        mask = torch.full((seq, seq), -1e9, dtype=torch.float64, device=q.device)
        scores = scores + mask.triu(1).type_as(scores)
        hidden = torch.ones(seq, seq, dtype=torch.int64, device=q.device).triu(1)
        assert hidden.to(scores).dtype == q.dtype
        scores = scores.masked_fill(hidden.to(scores) == 1, -1e9)
        weights = scores.float().softmax(dim=-1).type_as(v)
        return weights @ v.double().type_as(weights)


VARIANTS = [Masked, Capped, Added, CastLikeScores]


@pytest.mark.parametrize("attention", VARIANTS)
def test_logits_and_gradients(attention):
    model = nano_with(attention)
    adopted = training.adopt(copy.deepcopy(model))
    site = adopted.h[0].attn.trainable_attention.site
    assert site.sliding_window == (4 if attention is Capped else None)
    assert site.logits_soft_cap == (2.0 if attention is Capped else None)
    scale = {Masked: 32**-0.5, Capped: 1.0}.get(attention, 0.25)
    assert abs(site.scale - scale) <= 1e-12
    ids = token_ids(2, 11)
    logits = [each(ids)[0] for each in (model, adopted)]
    torch.testing.assert_close(*logits, rtol=1e-4, atol=2e-5)
    for each in logits:
        each.square().mean().backward()
    for p, q in zip(model.parameters(), adopted.parameters(), strict=True):
        assert (p.grad - q.grad).abs().max() <= 1e-4 * p.grad.abs().max()
    training.check_servable(adopted, CONFIG)


@pytest.mark.parametrize("attention", VARIANTS)
def test_compiled(attention):
    adopted = training.adopt(nano_with(attention))
    ids = token_ids(2, 11)
    with training.batch_invariant(), torch.no_grad():
        options = {"emulate_precision_casts": True}
        compiled = torch.compile(adopted, fullgraph=True, options=options)
        assert torch.equal(compiled(ids)[0], adopted(ids)[0])


class Unmasked(Masked):
    def mask(self, att, seq):
        return att


class Biased(Masked):
    def mask(self, att, seq):
        places = torch.arange(seq)
        return Masked.mask(self, att + (places - places[:, None]), seq)


class Prefix(Masked):
    def mask(self, att, seq):
        hidden = self.bias[:, :, :seq, :seq] == 0
        hidden[..., :3] = False
        return att.masked_fill(hidden, -torch.inf)


class Weak(Masked):
    def mask(self, att, seq):
        return att.masked_fill(self.bias[:, :, :seq, :seq] == 0, -5.0)


class Sinks(Masked):
    def mask(self, att, seq):
        att = Masked.mask(self, att, seq)
        return torch.cat([att, torch.zeros(1, 2, seq, 1)], -1)


class Squared(Masked):
    def mask(self, att, seq):
        return Masked.mask(self, att * att, seq)


class Inverse(Masked):
    def mask(self, att, seq):
        return Masked.mask(self, 2.0 / att, seq)


class Curved(Masked):
    def mask(self, att, seq):
        return Masked.mask(self, torch.tanh(att), seq) * 2


class Transposed(Masked):
    def mask(self, att, seq):
        return Masked.mask(self, att, seq).mT


class OverQueries(Masked):
    def attend(self, q, k, v, seq):
        att = self.mask(q @ k.mT, seq)
        return F.softmax(att, dim=2) @ v


class Unused(Masked):
    def attend(self, q, k, v, seq):
        self.mask(q @ k.mT, seq)
        return v


@pytest.mark.parametrize(
    ("attention", "message"),
    [
        (Unmasked, "has no mask"),
        (Biased, "not exactly the causal one"),
        (Prefix, "not exactly the causal one"),
        (Weak, "not exactly the causal one"),
        (Sinks, "applies 'cat' to its scores"),
        (Squared, "applies 'mul' to its scores"),
        (Inverse, "to its scores"),
        (Curved, "applies 'mul' to its scores"),
        (Transposed, "applies '__get__' to its scores"),
        (OverQueries, "over dim 2"),
        (Unused, "does something else with its scores"),
    ],
)
def test_other_attention_is_refused(attention, message):
    with pytest.raises(ValueError, match=message):
        training.adopt(nano_with(attention))


def test_dropout_while_training(monkeypatch):
    monkeypatch.setattr(Masked, "dropout", 0.1)
    adopted = training.adopt(nano_with(Masked))
    adopted(token_ids(1, 5))
    with pytest.raises(ValueError, match=r"dropout of 0\.1; no kernel"):
        adopted.train()(token_ids(1, 5))


@pytest.mark.parametrize(
    ("attention", "message"),
    [
        (Prefix, "not exactly the causal one"),
        (Weak, "not exactly the causal one"),
        (Unused, "does something else with its scores"),
        (Squared, "applies 'mul'"),
    ],
)
def test_something_else_than_when_adopted(attention, message, monkeypatch):
    adopted = training.adopt(nano_with(Masked))
    for block in adopted.h:
        for name in ("mask", "attend"):
            function = getattr(attention, name)
            monkeypatch.setattr(block.attn, name, function.__get__(block.attn))
    with pytest.raises(ValueError, match=message):
        adopted(token_ids(1, 5))


@pytest.mark.parametrize("attention", [Masked, Capped])
def test_same_bits(make_llm, tmp_path, monkeypatch, attention):
    monkeypatch.setenv("VLLM_BATCH_INVARIANT", "1")
    model = nano_with(attention)
    training.save_checkpoint(model, tmp_path)
    fields = {"architectures": ["Written"], **vars(CONFIG)}
    (tmp_path / "config.json").write_text(json.dumps(fields))
    ModelRegistry.register_model(
        "Written", lambda config: training.adopt(nano_with(attention))
    )
    llm = make_llm(tmp_path, max_model_len=96)
    trainer = training.adopt(copy.deepcopy(model))
    prompts = [[5, 6, 7, 8, 9], [3 + i % 90 for i in range(40)], [4]]
    report = parity.check(llm, trainer, prompts, max_tokens=12)
    assert report.all_equal, report
