# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""The check that a model's rows depend on ids, positions and attention alone."""

import copy
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from vllm.model_executor.layers.training import RotaryEmbedding, TrainableAttention
from vllm.model_executor.models.builder.servable import Findings
from vllm.training import check_servable

VOCAB, HIDDEN, HEADS, LENGTH = 96, 64, 2, 128
SIZE = HIDDEN // HEADS
CONFIG = SimpleNamespace(
    vocab_size=VOCAB, hidden_size=HIDDEN, max_position_embeddings=LENGTH
)


DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@pytest.fixture(autouse=True)
def on_a_gpu_if_there_is_one():
    with torch.device(DEVICE):
        yield


class Block(nn.Module):
    def __init__(self, attention=None):
        super().__init__()
        self.norm = nn.LayerNorm(HIDDEN)
        self.qkv, self.out = nn.Linear(HIDDEN, 3 * HIDDEN), nn.Linear(HIDDEN, HIDDEN)
        self.up, self.down = nn.Linear(HIDDEN, 96), nn.Linear(96, HIDDEN)
        self.attention = attention or TrainableAttention(HEADS, SIZE)

    def mix(self, x):
        return x

    def forward(self, x):
        q, k, v = self.qkv(self.norm(self.mix(x))).chunk(3, -1)
        x = x + self.out(self.attention(q, k, v))
        return x + self.down(F.gelu(self.up(x)))


class Model(nn.Module):
    """Written for `[batch, seq]`, with another block in the middle where given."""

    def __init__(self, block=Block):
        super().__init__()
        self.tokens, self.places = (
            nn.Embedding(VOCAB, HIDDEN),
            nn.Embedding(LENGTH, HIDDEN),
        )
        self.blocks = nn.ModuleList([Block(), block(), Block()])
        self.lm_head = nn.Linear(HIDDEN, VOCAB, bias=False)

    def embed(self, input_ids, positions):
        return self.tokens(input_ids) + self.places(positions)

    def forward(self, input_ids, positions):
        x = self.embed(input_ids, positions)
        for block in self.blocks:
            x = block(x)
        return self.lm_head(x)


def refused(model, **options) -> str:
    with pytest.raises(
        ValueError, match="would not be served as it is trained"
    ) as error:
        check_servable(model, CONFIG, **options)
    return str(error.value)


class _Identity(nn.Module):
    def forward(self, q, k, v):
        return v


class SdpaBlock(Block):
    def __init__(self):
        super().__init__(_Identity())

    def forward(self, x):
        q, k, v = (
            part.unflatten(-1, (HEADS, SIZE)).transpose(1, 2)
            for part in self.qkv(self.norm(x)).chunk(3, -1)
        )
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return x + self.out(mixed.transpose(1, 2).flatten(2))


class ScoresBlock(Block):
    def __init__(self):
        super().__init__(_Identity())

    def forward(self, x):
        q, k, v = self.qkv(self.norm(x)).chunk(3, -1)
        mask = torch.full((x.shape[1],) * 2, -torch.inf).to(x).triu(1)
        return x + self.out(((q @ k.mT) * HIDDEN**-0.5 + mask).softmax(-1) @ v)


class ShiftBlock(Block):
    def mix(self, x):
        return torch.cat([x[:, :1], x[:, 1:] + 0.1 * x[:, :-1]], 1)


class GatedShiftBlock(Block):
    """As it is at the start of a training: the gate is zero."""

    def __init__(self):
        super().__init__()
        self.gate = nn.Parameter(torch.zeros(()))

    def mix(self, x):
        return torch.cat([x[:, :1], x[:, 1:] + self.gate * x[:, :-1]], 1)


class ConvolutionBlock(Block):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv1d(HIDDEN, HIDDEN, 4, groups=HIDDEN, padding=3)

    def mix(self, x):
        return self.conv(x.mT)[..., : x.shape[1]].mT


class LinearAttentionBlock(Block):
    def mix(self, x):
        k = F.elu(x) + 1
        return torch.einsum(
            "bsk,bskv->bsv", k, (k[..., None] * x[:, :, None]).cumsum(1)
        )


class RecurrentBlock(Block):
    def __init__(self):
        super().__init__()
        self.rnn = nn.GRU(HIDDEN, HIDDEN, batch_first=True)

    def mix(self, x):
        return self.rnn(x)[0]


class BatchNormBlock(Block):
    def __init__(self):
        super().__init__()
        self.batch_norm = nn.BatchNorm1d(HIDDEN, track_running_stats=False)

    def mix(self, x):
        return self.batch_norm(x.mT).mT


class MeanBlock(Block):
    def mix(self, x):
        return x + x.mean(1, keepdim=True)


class FirstTokenBlock(Block):
    def mix(self, x):
        return x + x[:, :1]


class MaximumBlock(Block):
    def mix(self, x):
        return x / x.abs().amax()


class SilentBlock(SdpaBlock):
    """Its wrong attention has no effect yet."""

    def __init__(self):
        super().__init__()
        nn.init.zeros_(self.out.weight)
        nn.init.zeros_(self.out.bias)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("block", "culprit"),
    [
        (SdpaBlock, "'blocks.1' (SdpaBlock)"),
        (SilentBlock, "'blocks.1' (SilentBlock)"),
        (ScoresBlock, "'blocks.1' (ScoresBlock)"),
        (ShiftBlock, "'blocks.1' (ShiftBlock)"),
        (GatedShiftBlock, "'blocks.1' (GatedShiftBlock)"),
        (ConvolutionBlock, "'blocks.1' (ConvolutionBlock)"),
        (LinearAttentionBlock, "'blocks.1' (LinearAttentionBlock)"),
        (RecurrentBlock, "'blocks.1.rnn' (GRU)"),
        (BatchNormBlock, "'blocks.1.batch_norm' (BatchNorm1d)"),
        (MeanBlock, "'blocks.1' (MeanBlock)"),
        (FirstTokenBlock, "'blocks.1' (FirstTokenBlock)"),
        (MaximumBlock, "'blocks.1' (MaximumBlock)"),
    ],
)
def test_the_module_that_mixes_tokens_is_named(block, culprit, dtype):
    torch.manual_seed(0)
    message = refused(Model(block).to(dtype))
    assert f"{culprit} mixes tokens outside TrainableAttention" in message
    # Nothing that comes after it is blamed.
    assert message.count("\n- ") == 1
    assert ("scaled_dot_product_attention" in message) == issubclass(block, SdpaBlock)


class Counting(Model):
    def embed(self, input_ids, positions):
        places = torch.arange(input_ids.shape[1], device=input_ids.device)
        return self.tokens(input_ids) + self.places(places)


class SmallCounting(Counting):
    def __init__(self):
        super().__init__()
        nn.init.zeros_(self.places.weight)


class CountingRotary(Model):
    """Rotates queries and keys by positions that it counts itself."""

    def __init__(self):
        super().__init__()
        for block in self.blocks:
            block.rotary = RotaryEmbedding(SIZE)
            block.attention = _Rotated(block.rotary)


class _Rotated(nn.Module):
    def __init__(self, rotary):
        super().__init__()
        self.rotary, self.attention = rotary, TrainableAttention(HEADS, SIZE)

    def forward(self, q, k, v):
        positions = torch.arange(q.shape[1], device=q.device)[None]
        q, k = (x.unflatten(-1, (HEADS, SIZE)) for x in (q, k))
        q, k = self.rotary(positions, q, k)
        return self.attention(q.flatten(2), k.flatten(2), v)


class NeighbourIds(Model):
    """Embeds each token with the one before it."""

    def embed(self, input_ids, positions):
        pairs = (input_ids + 7 * F.pad(input_ids, (1, -1))) % VOCAB
        return super().embed(pairs, positions)


@pytest.mark.parametrize("model", [Counting, SmallCounting, CountingRotary])
def test_positions_that_are_counted(model):
    message = refused(model())
    assert "depend on its place in the batch" in message
    assert "argument `positions`" in message


def test_ids_of_other_tokens():
    assert "The model itself (NeighbourIds) mixes tokens" in refused(NeighbourIds())


class Looped(Model):
    def forward(self, input_ids, positions):
        x = self.embed(input_ids, positions)
        for _ in range(3):
            x = self.blocks[1](x)
        return self.lm_head(x)


class OneAttentionTwice(Model):
    def __init__(self):
        super().__init__()
        self.blocks[2].attention = self.blocks[1].attention


class Unattended(Model):
    def __init__(self):
        super().__init__()
        for block in self.blocks:
            block.attention = _Identity()


class Noisy(Model):
    def embed(self, input_ids, positions):
        return F.dropout(super().embed(input_ids, positions), 0.5)


@pytest.mark.parametrize(
    ("model", "reasons"),
    [
        (
            Looped,
            [
                "calls 'blocks.1.attention' (TrainableAttention) 3 times",
                "never calls 'blocks.0.attention'",
            ],
        ),
        (
            OneAttentionTwice,
            ["calls 'blocks.1.attention' (TrainableAttention) 2 times"],
        ),
        (Unattended, ["It has no TrainableAttention"]),
        (lambda: Model(SdpaBlock).apply(_remove_attention), ["no TrainableAttention"]),
        (Noisy, ["The model itself (Noisy) is random", "training=self.training"]),
    ],
)
def test_other_reasons(model, reasons):
    message = refused(model())
    assert all(reason in message for reason in reasons)


def _remove_attention(module):
    if isinstance(module, Block):
        module.attention = _Identity()


class LastOnly(Model):
    def forward(self, input_ids, positions):
        x = self.embed(input_ids, positions)
        for block in self.blocks:
            x = block(x)
        return self.lm_head(x[:, [-1]])


class Normed(Model):
    def forward(self, input_ids, positions):
        return super().forward(input_ids, positions).softmax(-1)


def test_what_the_head_gets_and_gives():
    with pytest.raises(ValueError, match=r"not the last alone \(x\[:, \[-1\]\]\)"):
        check_servable(LastOnly(), CONFIG)
    with pytest.raises(TypeError, match="aten._softmax.default is not a function of"):
        check_servable(Normed(), CONFIG)
    with pytest.raises(TypeError, match="did not call the head"):
        check_servable(_with_spare_head(), CONFIG, head="spare")
    with pytest.raises(
        ValueError, match="logits of 96 tokens, and vocab_size .* is 90"
    ):
        check_servable(Model(), SimpleNamespace(vocab_size=90, hidden_size=HIDDEN))


def _with_spare_head():
    model = Model()
    model.spare = nn.Linear(HIDDEN, VOCAB)
    return model


class Packed(Model):
    def forward(self, input_ids, positions, cu_seqlens=None):
        assert input_ids.ndim == positions.ndim == 1
        return super().forward(input_ids, positions)


class RoutedBlock(Block):
    """Tokens go to one of several experts, each of which takes its tokens together."""

    def __init__(self):
        super().__init__()
        self.router = nn.Linear(HIDDEN, 4, bias=False)
        self.experts = nn.ModuleList(nn.Linear(HIDDEN, HIDDEN) for _ in range(4))

    def mix(self, x):
        rows = x.flatten(0, -2)
        weights, chosen = self.router(rows).softmax(-1).topk(2)
        output = torch.zeros_like(rows)
        for number, expert in enumerate(self.experts):
            token, place = torch.where(chosen == number)
            part = expert(rows[token]) * weights[token, place, None]
            output.index_add_(0, token, part)
        return output.view_as(x)


class NormedHeadsBlock(Block):
    """Norms the heads of queries and keys as rows of their own."""

    def __init__(self):
        super().__init__()
        self.head_norm = nn.LayerNorm(SIZE)

    def forward(self, x):
        q, k, v = self.qkv(self.norm(x)).chunk(3, -1)
        q, k = (
            self.head_norm(part.reshape(-1, SIZE)).view(part.shape) for part in (q, k)
        )
        return x + self.out(self.attention(q, k, v))


class RunningBatchNormBlock(Block):
    """In evaluation mode a norm over the batch uses statistics of the past."""

    def __init__(self):
        super().__init__()
        self.batch_norm = nn.BatchNorm1d(HIDDEN)

    def mix(self, x):
        return self.batch_norm(x.mT).mT


class InPlaceBlock(Block):
    def mix(self, x):
        return F.relu_(x.mul(2))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "block", [Block, RoutedBlock, NormedHeadsBlock, RunningBatchNormBlock, InPlaceBlock]
)
def test_right_models_pass(block, dtype, caplog_vllm):
    torch.manual_seed(0)
    check_servable(Model(block).to(dtype), CONFIG)
    assert not caplog_vllm.text


def test_packed_models_and_small_ones_pass():
    check_servable(Packed(), CONFIG)
    tiny = SimpleNamespace(
        vocab_size=VOCAB, hidden_size=HIDDEN, max_position_embeddings=5
    )
    check_servable(Model(), tiny)


class NoPositions(Model):
    def embed(self, input_ids, positions):
        return self.tokens(input_ids)


class WithSlopes(NoPositions):
    def __init__(self):
        super().__init__()
        self.blocks[0].attention = TrainableAttention(
            HEADS, SIZE, alibi_slopes=[0.5, 1]
        )


def test_positions_that_have_no_effect_are_warned_of(caplog_vllm):
    check_servable(NoPositions(), CONFIG, uses_positions=False)
    check_servable(WithSlopes(), CONFIG)
    assert not caplog_vllm.text
    check_servable(NoPositions(), CONFIG)
    assert "does not use positions" in caplog_vllm.text


class QuantisedLinear(nn.Linear):
    """As one of vLLM's whose scale is that of the whole batch."""

    quant_method = object()

    def forward(self, x):
        scale = x.abs().amax() / 127
        return super().forward((x / scale).round() * scale)


class QuantisedBlock(Block):
    def __init__(self):
        super().__init__()
        self.up = QuantisedLinear(HIDDEN, 96)


def test_quantisation_that_mixes_rows_by_design_is_said(caplog_vllm):
    check_servable(Model(QuantisedBlock), CONFIG)
    assert "'blocks.1.up' (QuantisedLinear) quantises the activations" in (
        caplog_vllm.text
    )


def test_the_model_stays_as_it_was():
    model = Model(RunningBatchNormBlock).train()
    model.blocks[0].eval()
    state, attributes = copy.deepcopy(model.state_dict()), _attributes(model)
    random = torch.get_rng_state()
    check_servable(model, CONFIG)
    assert _attributes(model) == attributes
    assert torch.equal(torch.get_rng_state(), random)
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, state[name])
    model.tokens.register_forward_hook(_fail)
    attributes = _attributes(model)
    with pytest.raises(RuntimeError, match="a forward that fails"):
        check_servable(model, CONFIG)
    assert _attributes(model) == attributes


def _fail(module, args, output):
    raise RuntimeError("a forward that fails")


def _attributes(model):
    return {
        (path, name): value if isinstance(value, (bool, int)) else id(value)
        for path, module in model.named_modules()
        for name, value in vars(module).items()
        if "hooks" not in name
    } | {
        (path, name): len(value)
        for path, module in model.named_modules()
        for name, value in vars(module).items()
        if "hooks" in name and hasattr(value, "__len__")
    }


def test_what_stages_and_ranks_found_is_joined():
    first = Findings(("a",), ("n",), 2, False, True).on_stage(0)
    second = Findings(("b",), ("n",), 3, False, False).on_stage(1)
    whole = first.joined(second)
    assert whole.problems == ("Pipeline stage 0: a", "Pipeline stage 1: b")
    assert (whole.notes, whole.attention, whole.positions_matter) == (("n",), 5, True)
    unknown = replace(second, positions_matter=None).joined(second)
    assert unknown.positions_matter is None
    assert second.joined(second).positions_matter is False
