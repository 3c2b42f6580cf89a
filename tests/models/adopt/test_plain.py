# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""Models in plain PyTorch, and what cannot be adopted."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from tests.models.adopt.plain import NanoAttention, NanoConfig, NanoGPT, RotaryGPT
from vllm import training
from vllm.model_executor.determinism.probes import BatchInvarianceError
from vllm.model_executor.layers.training import TrainableAttention
from vllm.model_executor.models.builder.convention import logits_of

CONFIG = NanoConfig()
POSITIONS = torch.arange(9).expand(2, 9)


@pytest.fixture(params=[NanoGPT, RotaryGPT])
def pair(request):
    torch.manual_seed(0)
    model = request.param(CONFIG).eval()
    return model, training.adopt(copy.deepcopy(model))


def _ids():
    generator = torch.Generator().manual_seed(1)
    return torch.randint(0, CONFIG.vocab_size, (2, 9), generator=generator)


def test_logits_and_gradients(pair):
    logits = [logits_of(model(_ids(), POSITIONS)) for model in pair]
    torch.testing.assert_close(*logits, rtol=1e-4, atol=2e-5)
    for model, each in zip(pair, logits):
        model.zero_grad()
        each.square().mean().backward()
    model, adopted = pair
    for p, q in zip(model.parameters(), adopted.parameters(), strict=True):
        scale = p.grad.abs().max()
        assert (p.grad - q.grad).abs().max() <= 1e-4 * scale


def test_modules_are_recognised_by_what_they_compute(pair):
    _, adopted = pair
    linears = (nn.Linear, nn.LayerNorm)
    assert not any(isinstance(module, linears) for module in adopted.modules())
    attentions = [m for m in adopted.modules() if isinstance(m, TrainableAttention)]
    assert len(attentions) == 2
    training.check_servable(adopted, CONFIG)


def test_compiled_and_in_the_mode(pair):
    _, adopted = pair
    ids = _ids()
    with training.batch_invariant(), torch.no_grad():
        logits = logits_of(adopted(ids, POSITIONS))
        alone = logits_of(adopted(ids[:1, :5], POSITIONS[:1, :5]))
        assert torch.equal(alone, logits[:1, :5])
        options = {"emulate_precision_casts": True}
        compiled = torch.compile(adopted, fullgraph=True, options=options)
        assert torch.equal(logits_of(compiled(ids, POSITIONS)), logits)


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
    model(_ids())
    Masked.skip = 1
    with pytest.raises(ValueError, match="not exactly the causal one"):
        model(_ids())


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
