# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""What cannot be trained and served is refused by name, by adopt or at the start."""

import copy

import pytest
import torch
import torch.nn.functional as F
import transformers
from torch import nn

from tests.models.adopt.families import TINY, make_class
from vllm import training
from vllm.model_executor.models.builder.adopt import causal_lm

WITH_STATE = {
    "Lfm2ForCausalLM": {"layer_types": ["conv", "full_attention"]},
    "Qwen3NextForCausalLM": {
        "layer_types": ["linear_attention", "full_attention"],
        "head_dim": 32,
        **dict.fromkeys(("linear_num_key_heads", "linear_num_value_heads"), 2),
        **dict.fromkeys(("linear_key_head_dim", "linear_value_head_dim"), 16),
        **dict.fromkeys(("num_experts", "num_experts_per_tok"), 2),
        **dict.fromkeys(
            ("moe_intermediate_size", "shared_expert_intermediate_size"), 32
        ),
    },
    "JambaForCausalLM": {
        "attn_layer_period": 2,
        "attn_layer_offset": 1,
        "num_experts": 1,
        "num_experts_per_tok": 1,
        "use_mamba_kernels": False,
        "mamba_d_state": 8,
    },
}


@pytest.mark.parametrize("name", ["BertLMHeadModel", "BertForMaskedLM"])
def test_an_encoder(name):
    message = r"bert\.encoder\.layer\.0\.attention\.self: .*bidirectional attention"
    with pytest.raises(ValueError, match=message):
        training.adopt(make_class(name))


@pytest.mark.parametrize(
    "name", ["BartForConditionalGeneration", "T5ForConditionalGeneration"]
)
def test_an_encoder_decoder(name):
    sizes = {"d_model": 64, "d_kv": 32, "num_heads": 2, "encoder_attention_heads": 2}
    sizes |= {"decoder_attention_heads": 2, "encoder_layers": 1, "decoder_layers": 1}
    with pytest.raises(ValueError, match=f"{name} is an encoder-decoder"):
        training.adopt(make_class(name, **sizes))


@pytest.mark.parametrize("name", ["MambaForCausalLM", "RwkvForCausalLM"])
def test_a_model_of_recurrent_layers(name):
    model = make_class(name, state_size=8)
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match=f"{name} calls no attention"):
        training.adopt(model)
    for key, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[key])


@pytest.mark.parametrize("name", list(WITH_STATE))
def test_layers_with_state(name):
    model = training.adopt(make_class(name, num_key_value_heads=2, **WITH_STATE[name]))
    message = "(conv|linear_attn|mamba)' .* mixes tokens outside TrainableAttention"
    with pytest.raises(ValueError, match=message):
        training.check_servable(model, model.config)


def test_dropout_in_attention():
    model = training.adopt(make_class("LlamaForCausalLM", attention_dropout=0.1))
    ids = torch.arange(5)[None]
    model(ids, use_cache=False)  # none outside of training
    with pytest.raises(ValueError, match="dropout=0.1 while training.*to 0"):
        model.train()(ids, use_cache=False)


class Block(nn.Module):
    def __init__(self, after=None):
        super().__init__()
        self.qkv, self.o, self.after = nn.Linear(64, 192), nn.Linear(64, 64), after

    def forward(self, x):
        heads = self.qkv(x).view(*x.shape[:-1], 3, 2, 32).movedim(-3, 0)
        q, k, v = heads.transpose(-3, -2)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        y = self.o(y.transpose(-3, -2).flatten(-2))
        return x + (y if self.after is None else self.after(y))


class Model(nn.Module):
    def __init__(self, *blocks):
        super().__init__()
        self.embed, self.h = nn.Embedding(99, 64), nn.ModuleList(blocks)
        self.lm_head = nn.Linear(64, 99)

    def forward(self, ids, positions):
        x = self.embed(ids)
        for block in self.h:
            x = block(x)
        return self.lm_head(x)


CONFIG = transformers.LlamaConfig(**TINY)


class AddMean(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x + x.mean(-2, keepdim=True)

    @staticmethod
    def backward(ctx, grad):
        return grad + grad.mean(-2, keepdim=True)


class Recurrent(nn.Module):
    def __init__(self):
        super().__init__()
        self.lstm = nn.LSTM(64, 64, batch_first=True)

    def forward(self, x):
        return self.lstm(x)[0]


class DynamicInt8(nn.Module):
    """Rounds by the largest number of a batch, as dynamic quantisation does."""

    def forward(self, x):
        step = x.abs().amax() / 127
        return (x / step).round() * step


@pytest.mark.parametrize("after", [AddMean.apply, Recurrent(), DynamicInt8()])
def test_what_mixes_tokens(after):
    torch.manual_seed(0)
    model = training.adopt(Model(Block(), Block(after)).eval())
    with pytest.raises(ValueError, match=r"'h\.1.* mixes tokens"):
        training.check_servable(model, CONFIG)


def test_a_module_of_two_places():
    """It is trained as it was; an engine has no two KV caches for one place."""
    torch.manual_seed(0)
    block = Block()
    model = Model(block, block).eval()
    ids, positions = torch.randint(99, (2, 7)), torch.arange(7).expand(2, 7)
    expected = model(ids, positions)
    weights = {"qkv": block.qkv.weight, "o": block.o.weight}
    grads = torch.autograd.grad(expected.square().mean(), weights.values())
    training.adopt(model)
    assert all(getattr(block, name).weight is weights[name] for name in weights)
    torch.testing.assert_close(model(ids, positions), expected)
    loss = model(ids, positions).square().mean()
    for a, e in zip(torch.autograd.grad(loss, weights.values()), grads):
        torch.testing.assert_close(a, e)
    with pytest.raises(ValueError, match=r"h\.0\.trainable_attention' .* 2 times"):
        training.check_servable(model, CONFIG)


class OwnBlock(Block):
    mask = staticmethod(lambda distance: (distance >= 0) & (distance < 4))

    def forward(self, x):
        heads = self.qkv(x).view(*x.shape[:-1], 3, 2, 32).movedim(-3, 0)
        q, k, v = heads.transpose(-3, -2)
        places = torch.arange(x.shape[1])
        mask = self.mask(places[:, None] - places)
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        return x + self.o(y.transpose(-3, -2).flatten(-2))


class OwnPreTrained(transformers.PreTrainedModel):
    """transformers' class, with calls of torch's attention."""

    config_class = transformers.LlamaConfig
    _supports_sdpa = True

    def __init__(self, config):
        super().__init__(config)
        self.model = Model(OwnBlock(), OwnBlock())

    def forward(self, input_ids, position_ids=None):
        return self.model(input_ids, position_ids)


def test_masks_of_transformers_classes(monkeypatch):
    """They are looked at where a class calls torch's attention itself."""
    model = training.adopt(OwnPreTrained(CONFIG).eval())
    for block in model.model.h:
        assert block.trainable_attention.site.sliding_window == 4
    monkeypatch.setattr(OwnBlock, "mask", staticmethod(lambda distance: distance < 2))
    with pytest.raises(ValueError, match=r"model\.h\.0: .*not exactly the causal one"):
        training.adopt(OwnPreTrained(CONFIG).eval())


def test_position_biases_of_falcon():
    sizes = {"ffn_hidden_size": 96, "attn_implementation": "sdpa"}
    model = make_class("FalconForCausalLM", **sizes)
    ids = torch.arange(1, 9)[None]
    expected = model(ids, use_cache=False).logits
    training.adopt(model)
    logits = model(ids, use_cache=False).logits
    torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-5)
    one = model(ids[:, :1], use_cache=False).logits
    torch.testing.assert_close(one, expected[:, :1], rtol=1e-4, atol=1e-5)
    with pytest.raises(ValueError, match=r"h\.0\..*not exactly the causal one"):
        training.adopt(make_class("FalconForCausalLM", alibi=True, **sizes))


class SomebodysConfig(transformers.PretrainedConfig):
    model_type = "somebodys_own"


@pytest.mark.parametrize("auto_map", [{}, {"AutoModelForCausalLM": "own/code--a.B"}])
def test_code_from_a_repository(auto_map):
    """The builder without code runs none that comes with a checkpoint."""
    with pytest.raises(ValueError, match="SomebodysConfig|trust_remote_code"):
        causal_lm(SomebodysConfig(auto_map=auto_map))
