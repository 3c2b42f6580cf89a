# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""Modules as people write them: signatures, results, and what follows the head."""

import copy
import gc
import weakref
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from transformers import (
    Cohere2Config,
    Cohere2ForCausalLM,
    Gemma2Config,
    Gemma2ForCausalLM,
    GraniteConfig,
    GraniteForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedConfig,
)
from transformers.modeling_outputs import CausalLMOutput

from tests.models.builder.models import (
    PLAIN_FIELDS,
    CappedGPT,
    PlainGPT,
    attend_with_layers,
)
from vllm.model_executor.determinism.mode import batch_invariant
from vllm.model_executor.layers.training import VocabParallelEmbedding
from vllm.model_executor.models.builder import BuilderOptions, model_builder
from vllm.model_executor.models.builder.body import Body
from vllm.model_executor.models.builder.convention import (
    CallingConvention,
    logits_of,
)
from vllm.model_executor.models.builder.spec import INFERRED, builder_options
from vllm.training import check_servable, token_logprobs

CONFIG = PreTrainedConfig(**PLAIN_FIELDS)
IDS = torch.tensor([[5, 3, 200, 7, 7, 12, 9], [1, 299, 4, 4, 30, 31, 32]])
PLACES = torch.arange(IDS.shape[1]).expand(IDS.shape)


@pytest.fixture(autouse=True)
def same_weights():
    torch.manual_seed(0)


def run(model, ids, places):
    """The logits of a `PlainGPT`."""
    return PlainGPT.forward(model, ids, places)


class Ids(PlainGPT):
    """Has no position encoding."""

    def forward(self, idx, targets=None):
        return run(self, idx, torch.zeros_like(idx)), None


class Odd(PlainGPT):
    def forward(self, tokens, where):
        return [run(self, tokens, where)]


class LikeLitgpt(PlainGPT):
    def forward(self, idx, input_pos=None, input_pos_maxp1=None):
        return run(self, idx, input_pos)


class LikeTorchtitan(PlainGPT):
    def forward(self, tokens, attention_masks=None, positions=None):
        assert attention_masks is None
        return run(self, tokens, positions)


class LikeTransformers(PlainGPT):
    def forward(
        self,
        input_ids=None,
        attention_mask=None,
        position_ids=None,
        use_cache=None,
        logits_to_keep=0,
        **kwargs,
    ):
        assert attention_mask is None and use_cache is False and not kwargs
        logits = run(self, input_ids, position_ids)
        return CausalLMOutput(logits=logits[:, slice(-logits_to_keep, None), :].float())


class Keywords(PlainGPT):
    def forward(self, *, tokens, pos, mask=None):
        return {"logits": run(self, tokens, pos), "loss": None}


class Swapped(PlainGPT):
    def forward(self, positions, input_ids):
        return run(self, input_ids, positions)


class Named(PlainGPT):
    def forward(self, ids, step=None, at=None):
        assert step is None
        return run(self, ids, at)


class PassedOn(PlainGPT):
    def forward(self, *args, **kwargs):
        return super().forward(*args, **kwargs)


CONVENTIONS = [
    (PlainGPT, (None, "positions", False)),
    (Ids, (None, None, True)),
    (Odd, (None, "where", False)),
    (LikeLitgpt, (None, "input_pos", False)),
    (LikeTorchtitan, (None, "positions", True)),
    (LikeTransformers, (None, "position_ids", True)),
    (Keywords, ("tokens", "pos", True)),
    (Swapped, ("input_ids", "positions", True)),
    (Named, (None, "at", True)),
    (PassedOn, (None, "positions", False)),
]


@pytest.mark.parametrize(("kind", "convention"), CONVENTIONS)
@torch.no_grad()
def test_modules_are_called_as_they_are_written(kind, convention):
    model = kind(CONFIG)
    name = "at" if kind is Named else None
    options = BuilderOptions(positions=name)
    assert CallingConvention.of(model, options, "b")[:3] == convention
    check_servable(model, CONFIG, positions=name, uses_positions=kind is not Ids)
    places = torch.zeros_like(IDS) if kind is Ids else PLACES
    expected = run(model, IDS, places).log_softmax(-1)
    expected = expected.gather(2, IDS[..., None])[..., 0]
    scored = token_logprobs(model, IDS, IDS, options=options)
    torch.testing.assert_close(scored, expected, atol=1e-5, rtol=0)


def test_signatures_that_do_not_do():
    class Unknown(nn.Module):
        def forward(self, ids, positions, scale): ...

    class Nothing(nn.Module):
        def forward(self): ...

    for kind in (Unknown, Nothing):
        with pytest.raises(TypeError, match=f"{kind.__name__}, built by b, cannot be"):
            CallingConvention.of(kind(), INFERRED, "b")
    options = builder_options(model_builder(positions="at")(lambda config: None))
    with pytest.raises(TypeError, match="positions='at' was given, .* no such param"):
        CallingConvention.of(PlainGPT(CONFIG), options, "b")


def test_the_layout_follows_the_signature():
    class Packed(nn.Module):
        def forward(self, input_ids, positions, cu_seqlens=None): ...

    def layout(module, batched):
        options = BuilderOptions(batched=batched)
        convention = CallingConvention.of(module, options, "b")
        return convention.batched, convention.packed

    assert layout(Packed(), None) == (False, True)
    assert layout(Packed(), True) == (True, False)
    assert layout(Odd(CONFIG), None) == (True, False)
    assert layout(Odd(CONFIG), False) == (False, False)


def test_where_the_logits_are():
    logits = torch.ones(2, 3)
    for output in (
        logits,
        (logits, None),
        [logits],
        {"logits": logits, "loss": 1},
        CausalLMOutput(logits=logits),
        SimpleNamespace(logits=logits),
    ):
        assert logits_of(output) is logits
    assert logits_of(()) == () and logits_of(None) is None


class Counting(PlainGPT):
    def forward(self, idx, targets=None):
        pos = torch.arange(idx.shape[1], device=idx.device)[None]  # counts here
        return run(self, idx, pos), None


def test_the_line_that_counts_positions_is_named():
    with pytest.raises(ValueError) as error:
        check_servable(Counting(CONFIG), CONFIG)
    line = Counting.forward.__code__.co_firstlineno + 1
    message = str(error.value)
    assert "The model itself (Counting) makes a token's row depend on" in message
    assert "forward is given no positions: give it a parameter" in message
    assert f"torch.arange in {__file__}, line {line}." in message


class Tailed(PlainGPT):
    """Does something to the head's output."""

    def __init__(self, tail):
        super().__init__(CONFIG)
        self.tail = tail
        self.scale = nn.Parameter(torch.tensor(1.5))
        self.register_buffer("bias", torch.randn(1, 1, CONFIG.vocab_size))
        self.register_buffer("mask", torch.arange(CONFIG.vocab_size) > 290)

    def forward(self, input_ids, positions):
        return self.tail(self, super().forward(input_ids, positions))


def in_place(model, logits):
    flat = logits.view(-1, logits.shape[-1])
    flat.div_(3).tanh_()
    logits *= 3
    return logits


def with_other_results(model, logits):
    return {"probabilities": logits.softmax(-1), "logits": logits / 2}


TAILS = [
    lambda model, logits: 3 * torch.tanh(logits / 3),
    lambda model, logits: logits.bfloat16().float() * model.scale,
    lambda model, logits: (logits + model.bias)[:, slice(-0, None), :],
    lambda model, logits: logits.masked_fill(model.mask, -torch.inf),
    lambda model, logits: torch.where(model.mask, model.scale, logits),
    lambda model, logits: logits.flatten(0, 1).sigmoid().view_as(logits),
    lambda model, logits: -F.softplus(-logits),
    in_place,
    with_other_results,
]


def body_of(model, **options):
    body = Body(model, BuilderOptions(**options), "b")
    body.set_head(body.find_head("b"))
    return body


@pytest.mark.parametrize("tail", TAILS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_follows_the_head_is_repeated_bit_for_bit(tail, dtype):
    model = Tailed(tail).to(dtype)
    check_servable(model, CONFIG)
    body = body_of(model)
    for context in (torch.no_grad, torch.enable_grad, torch.inference_mode):
        with context():
            states, found = body.traced(IDS, PLACES)
            logits = body.head_with(found)(states)
            rows = body.head_with(found)(states.flatten(0, 1)[3:5])
            expected = logits_of(model(IDS, PLACES))
            assert len(found.steps) > 0
            assert logits.dtype == expected.dtype and torch.equal(logits, expected)
            torch.testing.assert_close(rows, expected.flatten(0, 1)[3:5])


@pytest.mark.parametrize("tail", TAILS)
def test_rows_do_not_depend_on_the_batch_in_batch_invariant_mode(tail):
    _, found = body_of(Tailed(tail)).traced(IDS, PLACES)
    logits = 20 * torch.randn(64, CONFIG.vocab_size)
    with batch_invariant(), torch.no_grad():
        whole = found(logits)
        for rows in (slice(0, 1), slice(5, 8), slice(31, 64)):
            assert torch.equal(found(logits[rows]), whole[rows])


def test_hidden_states_are_freed_at_once():
    model = Tailed(lambda model, logits: logits * 2)
    gc.collect()
    gc.disable()
    try:
        states = weakref.ref(body_of(model).traced(IDS, PLACES).hidden_states)
        assert states() is None
    finally:
        gc.enable()


def test_nothing_follows_the_head():
    for tail in (lambda model, x: x.float(), lambda model, x: x[:, :].view_as(x)):
        assert body_of(Tailed(tail)).traced(IDS, PLACES).tail.steps == ()


def to_part(model, logits):
    logits[..., 290:] = -100.0
    return logits


def with_a_tensor(model, logits):
    return logits + torch.ones(CONFIG.vocab_size)


def by_value(model, logits):
    return logits if logits.max() > 0 else -logits


REFUSED = [
    (lambda model, x: x.log_softmax(-1), "aten._log_softmax.default is not a function"),
    (lambda model, x: x - x.mean(-1, keepdim=True), "aten.mean.dim is not a function"),
    (lambda model, x: x.cumsum(1), "aten.cumsum.default is not a function"),
    (lambda model, x: x @ torch.eye(300), "is not a function of each logit"),
    (lambda model, x: x[..., :200], "aten.slice.Tensor is not a function"),
    (lambda model, x: x[:, -1:], "aten.slice.Tensor is not a function"),
    (lambda model, x: x.flip(-1), "aten.flip.default is not a function"),
    (lambda model, x: F.dropout(x, 0.5), "aten.bernoulli_.float writes to a tensor"),
    (lambda model, x: x[..., None] + x[..., None, :], "gives another shape"),
    (lambda model, x: x.mT.tanh().mT, "aten.transpose.int is not a function"),
    (lambda model, x: model.wide.add_(x[0, 0]), "forward returned another Tensor"),
    (lambda model, x: x + model.to_vocab(torch.ones(64)), "joins those of two calls"),
    (lambda model, x: (x / 2, model.to_vocab(torch.ones(64))), "calls the head again"),
    (to_part, "writes to a part of them"),
    (lambda model, x: x * model.scale.exp(), "no parameter and no buffer"),
    (lambda model, x: x.where(model.mask, -100.0), "no parameter and no buffer"),
    (with_a_tensor, "aten.add.Tensor uses a tensor of forward's that is no parameter"),
    (by_value, "aten._local_scalar_dense.default reads their values"),
    (lambda model, x: torch.zeros(1, 13, 300), "forward returned another Tensor"),
]


@pytest.mark.parametrize(("tail", "reason"), REFUSED)
def test_what_cannot_be_repeated_is_refused(tail, reason):
    model = Tailed(tail)
    model.register_buffer("wide", torch.zeros(CONFIG.vocab_size))
    with pytest.raises(TypeError, match=f"its head 'to_vocab', or .*{reason}"):
        check_servable(model, CONFIG)
    assert not model.wide.any()


def test_a_model_that_is_compiled_as_a_whole():
    plain, capped = PlainGPT(CONFIG), Tailed(lambda model, x: torch.tanh(x))
    expected = token_logprobs(plain, IDS, IDS)
    compiled = torch.compile(plain, backend="eager")
    torch.testing.assert_close(token_logprobs(compiled, IDS, IDS), expected)
    with pytest.raises(TypeError, match="compile its layers instead"):
        token_logprobs(torch.compile(capped, backend="eager"), IDS, IDS)


class BySize(PlainGPT):
    def forward(self, input_ids, positions):
        return super().forward(input_ids, positions) / input_ids.shape[1]


class ByTokens(PlainGPT):
    def forward(self, input_ids, positions):
        scale = self.places(positions).abs().max().item()
        return super().forward(input_ids, positions) / scale


class ByParameter(Tailed):
    def __init__(self, config):
        super().__init__(lambda model, logits: logits * model.scale.item())


class WithStates(PlainGPT):
    def forward(self, input_ids, positions):
        bias = self.tokens(input_ids)[..., :1]
        return super().forward(input_ids, positions) + bias


@pytest.mark.parametrize(
    ("kind", "reason"),
    [
        (BySize, "depends on the tokens"),
        (ByTokens, "depends on the tokens"),
        (ByParameter, "or on a number that it reads from a tensor"),
        (WithStates, "uses a tensor of forward's"),
    ],
)
def test_a_tail_that_depends_on_the_tokens_is_refused(kind, reason):
    with pytest.raises(TypeError, match=reason):
        check_servable(kind(CONFIG), CONFIG)


def test_logprobs_are_differentiated_through_what_follows_the_head():
    model = Tailed(lambda model, x: model.scale * torch.tanh(x + model.bias))
    targets = IDS.roll(-1, 1)
    scored, entropy = token_logprobs(
        model, IDS, targets, temperature=0.7, return_entropy=True
    )
    (scored.sum() + entropy.sum()).backward()
    gradients = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()
    logprobs = (model(IDS, PLACES) / 0.7).log_softmax(-1)
    expected = logprobs.gather(2, targets[..., None])[..., 0]
    expected_entropy = -(logprobs.exp() * logprobs).sum(-1)
    (expected.sum() + expected_entropy.sum()).backward()
    torch.testing.assert_close(scored, expected)
    torch.testing.assert_close(entropy, expected_entropy)
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(gradients[name], parameter.grad, msg=name)


class PackedBlock(nn.Module):
    def __init__(self, block):
        super().__init__()
        self.block = block

    def forward(self, x, cu_seqlens):
        block, norms = self.block, self.block.norms
        q, k, v = (
            part.unflatten(-1, (block.heads, -1))
            for part in block.qkv(norms[0](x)).chunk(3, -1)
        )
        x = x + block.out(block.attention(q, k, v, cu_seqlens).flatten(-2))
        return x + block.mlp(norms[1](x))


class Packed(PlainGPT):
    def __init__(self, config):
        super().__init__(config)
        self.blocks = nn.ModuleList(map(PackedBlock, self.blocks))

    def forward(self, input_ids, positions, cu_seqlens=None):
        x = self.tokens(input_ids) + self.places(positions)
        for block in self.blocks:
            x = block(x, cu_seqlens)
        return self.to_vocab(self.norm(x)) / 2


@pytest.mark.parametrize("kind", [LikeTransformers, CappedGPT, Packed])
def test_packed_sequences_are_scored_one_by_one(kind):
    model = kind(CONFIG)
    lengths = [3, 1, 7, 3]
    ids = IDS.flatten()
    bounds = torch.tensor([0, *lengths]).cumsum(0).int()
    temperature = torch.linspace(0.5, 2, len(ids))
    packed = token_logprobs(model, ids, ids, cu_seqlens=bounds, temperature=temperature)
    single = [
        token_logprobs(model, row[None], row[None], temperature=own)[0]
        for row, own in zip(ids.split(lengths), temperature.split(lengths))
    ]
    torch.testing.assert_close(packed, torch.cat(single))
    rows = token_logprobs(model, IDS, IDS, temperature=temperature.view(2, 7))
    torch.testing.assert_close(rows[0, :3], packed[:3])
    later = token_logprobs(model, IDS, IDS, positions=PLACES + 5)
    assert not torch.allclose(later, token_logprobs(model, IDS, IDS))


def test_fsdp2_of_layers_and_of_a_model_alone(tmp_path):
    store = dist.FileStore(str(tmp_path / "store"), 1)
    dist.init_process_group("gloo", store=store, rank=0, world_size=1)
    try:
        plain = PlainGPT(CONFIG)
        alone, layers = copy.deepcopy(plain), copy.deepcopy(plain)
        expected = token_logprobs(plain, IDS, IDS)
        expected.mean().backward()
        for part in (alone, *layers.blocks, layers):
            fully_shard(part, mesh=init_device_mesh("cpu", (1,)))
        with torch.no_grad():
            torch.testing.assert_close(token_logprobs(alone, IDS, IDS), expected)
        with pytest.raises(ValueError, match="on .*PlainGPT alone, so gradients"):
            token_logprobs(alone, IDS, IDS)
        token_logprobs(layers, IDS, IDS).mean().backward()
        for (name, p), q in zip(layers.named_parameters(), plain.parameters()):
            torch.testing.assert_close(p.grad.full_tensor(), q.grad, msg=name)
    finally:
        dist.destroy_process_group()


def test_shapes_that_do_not_fit():
    model = Ids(CONFIG)
    for ids, targets, bounds, message in (
        (IDS[0], IDS[0], None, "must be .batch, seq., or"),
        (IDS, IDS[:, 1:], None, "targets of shape"),
        (IDS, IDS, torch.tensor([0, 7], dtype=torch.int32), "with cu_seqlens"),
    ):
        with pytest.raises(ValueError, match=message):
            token_logprobs(model, ids, targets, cu_seqlens=bounds)
    with pytest.raises(ValueError, match="forward of Ids takes none"):
        token_logprobs(model, IDS, IDS, positions=PLACES)


class LastOnly(PlainGPT):
    """As nanoGPT without targets."""

    def forward(self, input_ids, positions):
        x = self.tokens(input_ids) + self.places(positions)
        return self.to_vocab(x[:, [-1]]), None


def test_a_head_that_is_given_the_last_token_alone():
    with pytest.raises(ValueError, match="Give the head every token"):
        token_logprobs(LastOnly(CONFIG), IDS, IDS)


class Functional(PlainGPT):
    def __init__(self, config, embedding=nn.Embedding):
        super().__init__(config)
        self.tokens = embedding(config.vocab_size, config.hidden_size)
        self.to_vocab = nn.Identity()

    def forward(self, input_ids, positions):
        return F.linear(super().forward(input_ids, positions), self.tokens.weight)


@pytest.mark.parametrize(
    ("embedding", "line"),
    [
        (nn.Embedding, "`self.lm_head.weight = self.tokens.weight`"),
        (VocabParallelEmbedding, "`self.lm_head.tie_weights\\(self.tokens\\)`"),
    ],
)
def test_a_head_without_a_module_is_refused_with_the_line_to_change(embedding, line):
    model = Functional(CONFIG, embedding)
    with pytest.raises(ValueError, match=f"replace that by self.lm_head.*{line}"):
        check_servable(model, CONFIG)


SIZES = dict(
    vocab_size=128,
    hidden_size=64,
    intermediate_size=96,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=64,
    pad_token_id=0,
    bos_token_id=1,
    eos_token_id=2,
)
GEMMA = dict(head_dim=16, final_logit_softcapping=0.5, attn_logit_softcapping=None)
CAP = "aten.div.Tensor, aten.tanh.default, aten.mul.Tensor"


@pytest.mark.parametrize(
    ("kind", "config", "tail"),
    [
        (LlamaForCausalLM, LlamaConfig(**SIZES), "nothing"),
        (Gemma2ForCausalLM, Gemma2Config(**SIZES, **GEMMA), CAP),
        (Cohere2ForCausalLM, Cohere2Config(**SIZES), "aten.mul.Tensor"),
        (
            GraniteForCausalLM,
            GraniteConfig(**SIZES, logits_scaling=3.0),
            "aten.div.Tensor",
        ),
    ],
)
def test_transformers_models_but_for_attention(kind, config, tail):
    model = kind(config).eval()
    ids = IDS % 128
    with torch.no_grad():
        expected = model(ids).logits.log_softmax(-1).gather(2, ids[..., None])[..., 0]
    attend_with_layers(model)
    check_servable(model, config)
    assert str(body_of(model).traced(ids, PLACES).tail) == tail
    torch.testing.assert_close(token_logprobs(model, ids, ids), expected)
