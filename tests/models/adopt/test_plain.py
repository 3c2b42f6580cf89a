# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""Models in plain PyTorch, and what cannot be adopted."""

import copy
import json

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from tests.models.adopt.inputs import token_ids
from tests.models.adopt.plain import NanoAttention, NanoConfig, NanoGPT, RotaryGPT
from vllm import ModelRegistry, training
from vllm.model_executor.determinism.probes import BatchInvarianceError
from vllm.model_executor.layers.training import TrainableAttention
from vllm.model_executor.models.builder.adopt import probing
from vllm.model_executor.models.builder.convention import (
    CallingConvention,
    logits_of,
)
from vllm.model_executor.models.builder.spec import INFERRED
from vllm.training import parity

CONFIG = NanoConfig()
POSITIONS = torch.arange(9).expand(2, 9)


@pytest.fixture(params=[NanoGPT, RotaryGPT])
def pair(request):
    torch.manual_seed(0)
    model = request.param(CONFIG).eval()
    return model, training.adopt(copy.deepcopy(model))


def test_logits_and_gradients(pair):
    logits = [logits_of(model(token_ids(2, 9), POSITIONS)) for model in pair]
    torch.testing.assert_close(*logits, rtol=1e-4, atol=2e-5)
    for model, each in zip(pair, logits):
        model.zero_grad()
        each.square().mean().backward()
    model, adopted = pair
    for p, q in zip(model.parameters(), adopted.parameters(), strict=True):
        scale = p.grad.abs().max()
        assert (p.grad - q.grad).abs().max() <= 1e-4 * scale


def test_nothing_is_left_without_a_batch_invariant_form(pair):
    model, adopted = pair
    assert "not batch-invariant" not in adopted.adoption
    with training.batch_invariant():
        training.adopt(copy.deepcopy(model))


def test_modules_are_recognised_by_what_they_compute(pair):
    _, adopted = pair
    linears = (nn.Linear, nn.LayerNorm)
    assert not any(isinstance(module, linears) for module in adopted.modules())
    attentions = [m for m in adopted.modules() if isinstance(m, TrainableAttention)]
    assert len(attentions) == 2
    training.check_servable(adopted, CONFIG)


def test_compiled_and_in_the_mode(pair):
    _, adopted = pair
    ids = token_ids(2, 9)
    with training.batch_invariant(), torch.no_grad():
        logits = logits_of(adopted(ids, POSITIONS))
        alone = logits_of(adopted(ids[:1, :5], POSITIONS[:1, :5]))
        assert torch.equal(alone, logits[:1, :5])
        options = {"emulate_precision_casts": True}
        compiled = torch.compile(adopted, fullgraph=True, options=options)
        assert torch.equal(logits_of(compiled(ids, POSITIONS)), logits)


class Counting(NanoGPT):
    """Counts its tokens, and takes as many as it has positions."""

    def forward(self, idx, targets=None):
        seq = idx.shape[1]
        assert seq <= CONFIG.max_position_embeddings
        pos = torch.arange(0, seq, dtype=torch.long, device=idx.device)
        x = self.wte(idx) + self.wpe(pos)
        for block in self.h:
            x = block(x)
        return self.lm_head(self.ln_f(x)), targets


class Tables(NanoGPT):
    """A table of positions, and one that it computes."""

    def __init__(self, config: NanoConfig) -> None:
        super().__init__(config)
        self.wpe = nn.Parameter(torch.randn(1, config.max_position_embeddings, 64))
        self.frequencies = torch.logspace(0, -2, 64)

    def forward(self, idx, pos=None, cache=None):
        if pos is not None:
            raise TypeError("positions are for decoding; make a cache first")
        x = self.wte(idx)
        seq = x.size(1)
        angles = torch.arange(seq, device=x.device, dtype=x.dtype).add_(1)
        x = x + torch.outer(angles, self.frequencies).sin()
        x = x + self.wpe[:, :seq] + self.wpe.narrow(1, 0, seq)
        for block in self.h:
            x = block(x)
        return self.lm_head(self.ln_f(x))


@pytest.fixture(params=[Counting, Tables])
def counting(request):
    torch.manual_seed(0)
    model = request.param(CONFIG).eval()
    return model, training.adopt(copy.deepcopy(model))


def test_a_model_that_counts_is_given_positions(counting):
    model, adopted = counting
    training.check_servable(adopted, CONFIG)
    assert "is given positions" in adopted.adoption
    logits = [logits_of(each(token_ids(2, 9))) for each in counting]
    torch.testing.assert_close(*logits, rtol=1e-4, atol=2e-5)
    convention = CallingConvention.of(adopted, INFERRED, "the test")
    ids, positions = token_ids(2, 9)[0], torch.arange(9)
    before = positions.clone()
    called = logits_of(convention.call(adopted, ids, positions))
    torch.testing.assert_close(called[0], logits[0][0], rtol=1e-4, atol=2e-5)
    assert torch.equal(positions, before)  # the module may change what it counted


def test_a_compiled_model_that_counts_is_given_positions(counting):
    _, adopted = counting
    convention = CallingConvention.of(adopted, INFERRED, "the test")

    def hidden_states(ids, positions):
        return logits_of(convention.call(adopted, ids, positions))

    compiled = torch.compile(
        hidden_states, fullgraph=True, dynamic=True, backend="eager"
    )
    ids = token_ids(2, 9).flatten()
    with torch.no_grad():
        for order in (torch.arange(18), torch.arange(7).flip(0), torch.arange(11) + 60):
            each = ids[: len(order)]
            expected = hidden_states(each, order)
            assert torch.equal(compiled(each, order), expected)
            counted = hidden_states(each, torch.arange(len(order)))
            assert torch.equal(counted, expected) == (len(order) == 18)


class Ambiguous(Counting):
    def forward(self, idx, targets=None):
        x = self.wte(idx) + self.wpe(torch.arange(idx.shape[1]))
        x = x + 0 * torch.arange(64)
        for block in self.h:
            x = block(x)
        return self.lm_head(self.ln_f(x))


def test_counting_that_cannot_be_told_apart_is_refused_by_its_line():
    model = training.adopt(Ambiguous(CONFIG))
    with pytest.raises(ValueError, match=r"counts with torch\.arange in .*test_plain"):
        training.check_servable(model, CONFIG)


def test_a_step_longer_than_a_model_that_counts_takes(make_llm, tmp_path):
    model = Counting(CONFIG)
    training.save_checkpoint(model, tmp_path)
    fields = {"architectures": ["Counting"], **vars(CONFIG)}
    (tmp_path / "config.json").write_text(json.dumps(fields))
    ModelRegistry.register_model(
        "Counting", lambda config: training.adopt(Counting(CONFIG))
    )
    with pytest.raises(ValueError, match="Start with max_num_batched_tokens=96"):
        make_llm(tmp_path, max_model_len=96)


def _nano(attention):
    model = NanoGPT(CONFIG)
    model.h[1].attn = attention(CONFIG)
    return model


class Bidirectional(NanoAttention):
    def forward(self, x):
        q = self.c_attn(x)[..., :64].unsqueeze(1)
        return self.c_proj(F.scaled_dot_product_attention(q, q, q)[:, 0])


class Dropout(NanoAttention):
    def forward(self, x):
        q = self.c_attn(x)[..., :64].unsqueeze(1)
        y = F.scaled_dot_product_attention(q, q, q, dropout_p=0.1, is_causal=True)
        return self.c_proj(y[:, 0])


class Crossed(NanoAttention):
    def forward(self, x):
        q = self.c_attn(x)[..., :64].unsqueeze(1)
        k = q[:, :, :3]
        y = F.scaled_dot_product_attention(q, k, k, is_causal=True)
        return self.c_proj(y[:, 0])


@pytest.mark.parametrize(
    ("attention", "message"),
    [
        (Bidirectional, r"h\.1\.attn: .*bidirectional attention"),
        (Dropout, r"h\.1\.attn: .*no kernel has dropout"),
        (Crossed, r"h\.1\.attn: .*self-attention over whole sequences"),
    ],
)
def test_other_attention_is_refused_by_name(attention, message):
    with pytest.raises(ValueError, match=message):
        training.adopt(_nano(attention))


class Masked(NanoAttention):
    def forward(self, x):
        q = self.c_attn(x)[..., :64].unsqueeze(1)
        seq = x.shape[1]
        mask = torch.ones(seq, seq, dtype=torch.bool).tril(-2 * self.skip)
        mask = mask | torch.eye(seq, dtype=torch.bool)
        y = F.scaled_dot_product_attention(q, q, q, attn_mask=mask)
        return self.c_proj(y[:, 0])


def test_a_mask_is_compared_with_the_causal_one():
    Masked.skip = 0
    model = training.adopt(_nano(Masked))
    model(token_ids(2, 9))
    Masked.skip = 1
    with pytest.raises(ValueError, match="not exactly the causal one"):
        model(token_ids(2, 9))


class Local(NanoAttention):
    """A window in a mask that is made in a loop, as a number to add."""

    window = 4

    def forward(self, x):
        q = self.c_attn(x)[..., :64].unsqueeze(1)
        seq = x.shape[1]
        mask = torch.full((seq, seq), -torch.inf, dtype=x.dtype)
        for place in range(seq):
            mask[place, max(0, place + 1 - self.window) : place + 1] = 0
        y = F.scaled_dot_product_attention(q, q, q, attn_mask=mask[None])
        return self.c_proj(y[:, 0])


def test_a_window_in_a_mask(make_llm, tmp_path, monkeypatch):
    monkeypatch.setenv("VLLM_BATCH_INVARIANT", "1")
    model = _nano(Local).eval()
    adopted = training.adopt(copy.deepcopy(model))
    assert adopted.h[0].attn.trainable_attention.site.sliding_window is None
    assert adopted.h[1].attn.trainable_attention.site.sliding_window == 4
    torch.testing.assert_close(adopted(token_ids(2, 9))[0], model(token_ids(2, 9))[0])
    training.save_checkpoint(model, tmp_path)
    fields = {"architectures": ["Local"], **vars(CONFIG)}
    (tmp_path / "config.json").write_text(json.dumps(fields))
    ModelRegistry.register_model("Local", lambda config: training.adopt(_nano(Local)))
    llm = make_llm(tmp_path, max_model_len=96)
    prompts = [[5, 6, 7, 8, 9], [3 + i % 90 for i in range(40)]]
    report = parity.check(llm, adopted, prompts, max_tokens=12)
    assert report.all_equal, report


def test_a_window_that_only_shows_in_long_sequences(make_llm, tmp_path, monkeypatch):
    """In a trainer each call is checked, in an engine what it may be called with."""
    monkeypatch.setattr(Local, "window", 80)
    monkeypatch.setattr(probing, "_lengths_with_masks", lambda: (64,))
    adopted = training.adopt(_nano(Local))
    ids = torch.zeros(1, 90, dtype=torch.long)
    adopted(ids[:, :80])
    with pytest.raises(ValueError, match="not exactly the causal one"):
        adopted(ids)
    monkeypatch.undo()
    monkeypatch.setattr(Local, "window", 80)
    training.save_checkpoint(_nano(Local), tmp_path)
    fields = {"architectures": ["Local"], **vars(CONFIG)}
    (tmp_path / "config.json").write_text(json.dumps(fields))
    found = []

    def build(config):
        model = training.adopt(_nano(Local))
        found.append(model.h[1].attn.trainable_attention.site.sliding_window)
        return model

    ModelRegistry.register_model("Local", build)
    make_llm(tmp_path, max_model_len=96)
    assert found == [80]


class OneToken(NanoAttention):
    """Asks for no mask where there is nothing to hide, as transformers does."""

    window = None

    def forward(self, x):
        q = self.c_attn(x)[..., :64].unsqueeze(1)
        seq, mask = x.shape[1], None
        if self.window is not None and seq > 1:
            places = torch.arange(seq)
            distance = places[:, None] - places
            mask = (distance >= 0) & (distance < self.window)
        is_causal = mask is None and seq > 1
        y = F.scaled_dot_product_attention(q, q, q, mask, is_causal=is_causal)
        return self.c_proj(y[:, 0])


@pytest.mark.parametrize("window", [None, 4])
def test_one_token_needs_no_mask(window, monkeypatch):
    monkeypatch.setattr(OneToken, "window", window)
    model = _nano(OneToken).eval()
    adopted = training.adopt(copy.deepcopy(model))
    assert adopted.h[1].attn.trainable_attention.site.sliding_window == window
    for length in (1, 9):
        ids = token_ids(2, 9)[:, :length]
        torch.testing.assert_close(adopted(ids)[0], model(ids)[0])
    monkeypatch.setattr(OneToken, "window", 4 if window is None else None)
    with pytest.raises(ValueError, match="exactly the causal one|sliding_window=None"):
        adopted(token_ids(2, 9))


@pytest.mark.parametrize("window", [512, 1024])
def test_long_windows_in_a_trainer(window, monkeypatch):
    """One that is too long to be found is refused with the length of the look."""
    monkeypatch.setattr(OneToken, "window", window)
    model = NanoGPT(NanoConfig(max_position_embeddings=1100))
    model.h[1].attn = OneToken(CONFIG)
    training.adopt(model)
    found = model.h[1].attn.trainable_attention.site.sliding_window
    assert found == (512 if window == 512 else None)
    ids = torch.zeros(1, 1100, dtype=torch.long)
    if window == 512:
        model(ids)
    else:
        with pytest.raises(ValueError, match="1100 tokens.* shorter than 1024"):
            model(ids)


class Skipped(NanoAttention):
    """No attention for some numbers of tokens."""

    def forward(self, x):
        q = self.c_attn(x)[..., :64].unsqueeze(1)
        for length in (1, 2):
            if x.shape[1] > length:
                q = F.scaled_dot_product_attention(q, q, q, is_causal=True)
        return self.c_proj(q[:, 0])


@pytest.mark.parametrize(("length", "calls"), [(1, 0), (2, 1)])
def test_fewer_calls_than_when_adopted(length, calls):
    adopted = training.adopt(_nano(Skipped))
    adopted(token_ids(2, 9))
    with pytest.raises(ValueError, match=f"Skipped makes {calls} calls of attention"):
        adopted(token_ids(2, 9)[:, :length])


class Learned(NanoAttention):
    """A mask that depends on a weight."""

    def forward(self, x):
        q = self.c_attn(x)[..., :64].unsqueeze(1)
        seq = x.shape[1]
        mask = torch.ones(seq, seq, dtype=torch.bool).tril()
        mask &= self.c_proj.bias[0].isfinite()
        y = F.scaled_dot_product_attention(q, q, q, attn_mask=mask)
        return self.c_proj(y[:, 0])


def test_a_mask_that_only_a_trainer_can_check(make_llm, tmp_path):
    model = _nano(Learned).eval()
    adopted = training.adopt(copy.deepcopy(model))
    torch.testing.assert_close(adopted(token_ids(2, 9))[0], model(token_ids(2, 9))[0])
    training.save_checkpoint(model, tmp_path)
    fields = {"architectures": ["Learned"], **vars(CONFIG)}
    (tmp_path / "config.json").write_text(json.dumps(fields))
    ModelRegistry.register_model(
        "Learned", lambda config: training.adopt(_nano(Learned))
    )
    with pytest.raises(ValueError, match=r"h\.1\.attn: .*depends on token ids"):
        make_llm(tmp_path, max_model_len=96)


class Padded(NanoAttention):
    def forward(self, x):
        q = self.c_attn(x)[..., :64].unsqueeze(1)
        seq = x.shape[1]
        mask = torch.ones(seq, seq, dtype=torch.bool).tril()
        mask[:, 0] = self.sees_first
        y = F.scaled_dot_product_attention(q, q, q, attn_mask=mask)
        return self.c_proj(y[:, 0])


class Biased(NanoAttention):
    def forward(self, x):
        q = self.c_attn(x)[..., :64].unsqueeze(1)
        places = torch.arange(x.shape[1])
        bias = (places - places[:, None]).to(x.dtype)
        bias = bias.masked_fill(bias > 0, -torch.inf)
        y = F.scaled_dot_product_attention(q, q, q, attn_mask=bias)
        return self.c_proj(y[:, 0])


@pytest.mark.parametrize("attention", [Padded, Biased])
def test_other_masks_are_refused_when_a_model_is_adopted(attention, monkeypatch):
    monkeypatch.setattr(Padded, "sees_first", False, raising=False)
    with pytest.raises(ValueError, match=r"h\.1\.attn: .*not exactly the causal one"):
        training.adopt(_nano(attention))


class Convolved(nn.Module):
    """Mixes the features of a token, by a function without a batch-invariant form."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv = nn.Conv1d(1, 1, 3, padding=1)

    def forward(self, x):
        return self.conv(x.flatten(0, 1)[:, None])[:, 0].view(x.shape)


def test_an_unknown_function_is_named():
    model = NanoGPT(CONFIG)
    model.h[0].gelu = nn.Sequential(nn.GELU(), Convolved(256))
    with (
        training.batch_invariant(),
        pytest.raises(BatchInvarianceError, match=r"h\.\*\.gelu\.\*\.conv"),
    ):
        training.adopt(copy.deepcopy(model))
    training.adopt(model)
    assert "conv1d" in model.adoption


def test_strict():
    model = NanoGPT(CONFIG)
    with pytest.raises(ValueError, match="strict=True(.|\n)*wpe.*Embedding"):
        training.adopt(model, strict=True)
    assert type(model.h[0].c_fc) is nn.Linear  # nothing was changed
    assert model.lm_head.weight is model.wte.weight


def test_a_model_without_attention():
    class NoAttention(nn.Module):
        def __init__(self):
            super().__init__()
            self.embed = nn.Embedding(8, 4)
            self.lm_head = nn.Linear(4, 8)

        def forward(self, input_ids, positions):
            return self.lm_head(self.embed(input_ids))

    with pytest.raises(ValueError, match="calls no attention that can be taken over"):
        training.adopt(NoAttention())


def test_modules_with_hooks_stay():
    model = NanoGPT(CONFIG)
    model.h[0].c_fc.register_full_backward_hook(lambda *_: None)
    training.adopt(model)
    assert type(model.h[0].c_fc) is nn.Linear
    assert "it has hooks" in model.adoption
    assert model.h[1].c_fc.out_features == 256
