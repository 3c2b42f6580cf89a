# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""Reports of trainer and engine, whose logprobs are equal bit for bit."""

import json
import math
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from vllm.logprobs import Logprob
from vllm.model_executor.checkpoint.fingerprint import (
    differing,
    fingerprint,
    row_fingerprints,
)
from vllm.model_executor.checkpoint.layout import CheckpointLayout
from vllm.model_executor.checkpoint.save import checkpoint_tensors
from vllm.model_executor.determinism.mode import batch_invariant
from vllm.model_executor.layers.training import VLLMFlashAttention
from vllm.model_executor.models.builder import BuilderOptions
from vllm.model_executor.models.builder.loader import EngineLoader
from vllm.model_executor.models.builder.recorder import ModuleRecorder
from vllm.model_executor.models.generic_transformer import (
    GenericTransformerConfig,
    GenericTransformerForCausalLM,
)
from vllm.training import parity
from vllm.training.parity.localise import first_differing_module
from vllm.training.parity.score import Scorer

PROMPT, SAMPLED = [5, 9, 2], [7, 11, 3, 1]
ON_CUDA = torch.cuda.is_available()
DEVICE, DTYPE = ("cuda", torch.bfloat16) if ON_CUDA else ("cpu", torch.float32)


@pytest.fixture
def model() -> GenericTransformerForCausalLM:
    torch.manual_seed(0)
    return GenericTransformerForCausalLM(
        GenericTransformerConfig(
            vocab_size=40,
            hidden_size=64,
            num_hidden_layers=2,
            num_attention_heads=2,
            max_position_embeddings=64,
            initializer_range=0.3,
        )
    ).to(DEVICE, DTYPE)


def trainer_logprobs(model, ids) -> torch.Tensor:
    """Of the token after each, shape = [len(ids), vocab_size]."""
    scorer = Scorer(model)
    hidden_states = scorer.hidden_states([ids], [range(len(ids))])
    return torch.cat(list(scorer.full_logprobs(hidden_states, 1.0)))


def an_output(model, prompt=PROMPT, sampled=SAMPLED, full=False, of_prompt=False):
    """What an engine that agrees would return."""
    rows = trainer_logprobs(model, prompt + sampled)

    def entry(position):
        row, token = rows[position - 1], (prompt + sampled)[position]
        tokens = range(len(row)) if full else [token]
        return {i: Logprob(row[i].item()) for i in tokens}

    begin, end = len(prompt), len(prompt) + len(sampled)
    completion = SimpleNamespace(
        token_ids=sampled, logprobs=[entry(i) for i in range(begin, end)]
    )
    return SimpleNamespace(
        prompt_token_ids=prompt,
        prompt_logprobs=[None, *map(entry, range(1, begin))] if of_prompt else None,
        outputs=[completion],
    )


@pytest.mark.parametrize("full", [False, True])
@pytest.mark.parametrize("of_prompt", [False, True])
def test_equal_outputs(model, full, of_prompt):
    outputs = [
        an_output(model, full=full, of_prompt=of_prompt),
        an_output(model, [1], [2, 3], full=full, of_prompt=of_prompt),
    ]
    report = parity.compare(model, outputs, full_vocab=full)
    assert report.tokens == report.equal == (6 + 2 * of_prompt)
    assert report.all_equal and report.first_difference is None
    assert report.max_abs_diff == report.kl == 0
    assert torch.equal(report.differences, torch.zeros(report.tokens).double())
    report.raise_if_different()
    fields = json.loads(report.to_json())
    assert fields["all_equal"] and fields["tokens"] == report.tokens
    assert "first difference      none" in str(report)


@pytest.mark.parametrize("missing", [{}, None, "all after the first"])
def test_tokens_without_logprobs_are_refused(model, missing):
    output = an_output(model)
    logprobs = output.outputs[0].logprobs
    if missing == "all after the first":
        del logprobs[1:]
    else:
        logprobs[2] = missing
    with pytest.raises(ValueError, match="4 tokens, but not a logprob for each"):
        parity.compare(model, [output])


def test_one_ulp_is_a_difference(model):
    outputs = [an_output(model), an_output(model)]
    entry = outputs[1].outputs[0].logprobs[2]
    exact = torch.tensor(entry[3].logprob)
    entry[3].logprob = torch.nextafter(exact, torch.tensor(0.0)).item()
    report = parity.compare(model, outputs)
    assert (report.tokens, report.equal) == (8, 7)
    first = report.first_difference
    assert (first.request, first.completion) == (1, 0)
    assert (first.position, first.token) == (5, 3)
    assert (first.engine, first.trainer) == (entry[3].logprob, exact.item())
    assert report.max_abs_diff == abs(first.engine - first.trainer) > 0
    with pytest.raises(parity.ParityError) as error:
        report.raise_if_different()
    for text in ("request 1, position 5, token 3", repr(first.engine)):
        assert text in str(error.value)
    layer = report.with_layer("model.norm")
    assert "first differing layer model.norm" in str(layer)
    assert json.loads(layer.to_json())["first_difference"]["layer"] == "model.norm"


def test_a_difference_in_another_token_of_the_vocabulary(model):
    output = an_output(model, full=True)
    output.outputs[0].logprobs[1][30].logprob -= 0.5
    report = parity.compare(model, [output], full_vocab=True)
    first = report.first_difference
    assert (first.position, first.token, report.equal) == (4, 30, 3)
    assert report.max_abs_diff == pytest.approx(0.5)
    assert parity.compare(model, [output]).all_equal


@pytest.mark.parametrize("full", [False, True])
def test_kl(model, full):
    """Of known distributions: the engine's are the trainer's at temperature 2."""
    output = an_output(model, full=full, of_prompt=full)
    exact = trainer_logprobs(model, PROMPT + SAMPLED)[2:-1].double()
    tempered = (exact / 2).log_softmax(-1)
    for row, entry in zip(tempered, output.outputs[0].logprobs):
        for token, logprob in entry.items():
            logprob.logprob = row[token].float().item()
    report = parity.compare(model, [output], full_vocab=full)
    if full:
        expected = (tempered.exp() * (tempered - exact)).sum(-1).mean()
    else:
        gap = (exact - tempered).gather(1, torch.tensor(SAMPLED)[:, None])
        expected = (gap.exp() - 1 - gap).mean()
    assert report.kl == pytest.approx(expected.item(), rel=1e-5)
    assert report.kl > 0.01


def test_nan_and_infinity_are_different(model):
    for value in (math.nan, -math.inf):
        output = an_output(model)
        output.outputs[0].logprobs[0][7].logprob = value
        report = parity.compare(model, [output])
        assert report.equal == 3 and report.max_abs_diff == math.inf
        assert json.loads(report.to_json())["max_abs_diff"] == "inf"


def test_a_temperature(model):
    """Prompt logprobs have none, as the engine computes them."""
    output = an_output(model, of_prompt=True)
    scorer = Scorer(model)
    whole = PROMPT + SAMPLED
    hidden_states = scorer.hidden_states([whole], [range(len(whole))])
    targets = torch.tensor(SAMPLED, device=DEVICE)
    logprobs = scorer.token_logprobs(hidden_states[2:-1], targets, 0.7)
    for value, token, entry in zip(logprobs, SAMPLED, output.outputs[0].logprobs):
        entry[token].logprob = value.item()
    assert parity.compare(model, [output], temperature=0.7).all_equal
    assert parity.compare(model, [output]).equal == 2


class Batched(nn.Module):
    """For `[batch, seq]`, with a head of another name."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(40, 16)
        self.inner = nn.Linear(16, 16)
        self.dropout = nn.Dropout(0.5)
        self.to_vocab = nn.Linear(16, 40, bias=False)

    def forward(self, input_ids, positions):
        assert input_ids.ndim == 2
        return self.to_vocab(self.dropout(self.inner(self.embedding(input_ids))))


class Normed(Batched):
    def forward(self, input_ids, positions):
        return super().forward(input_ids, positions).softmax(-1)


class Capped(Batched):
    def forward(self, idx, position_ids=None, labels=None):
        logits = torch.tanh(super().forward(idx, position_ids)) * 2
        return {"loss": None, "logits": logits}


def test_a_batched_model_is_left_as_it_was():
    model = Batched().to(DEVICE)
    model.inner.eval()
    outputs = [an_output(model), an_output(model, [1, 2], [3])]
    assert parity.compare(model, outputs).all_equal
    modes = [module.training for module in model.modules()]
    assert modes == [True, True, False, True, True]
    assert "forward" not in vars(model.to_vocab)
    assert not model.to_vocab._forward_hooks


class SoftCapped(nn.Linear):
    def forward(self, x):
        return 2 * torch.tanh(super().forward(x) / 2)


class OfTheEmbedding(nn.Module):
    def __init__(self, embedding):
        super().__init__()
        self.weight = embedding.weight

    def forward(self, x):
        return nn.functional.linear(x, self.weight)


class Outer(nn.Module):
    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, input_ids, positions):
        return self.inner(input_ids, positions)


def with_head(kind):
    """A model, and the path of its head."""
    model: nn.Module = Batched()
    if kind == "soft cap":
        model.to_vocab.__class__ = SoftCapped
    elif kind == "tied":
        model.to_vocab = OfTheEmbedding(model.embedding)
    elif kind == "own forward":
        forward = model.to_vocab.forward
        model.to_vocab.forward = lambda x: forward(x) * 2
    elif kind == "hooks":
        model.to_vocab.register_forward_pre_hook(lambda _, args: (args[0] + 1,))
        model.to_vocab.register_forward_hook(lambda _, args, logits: 2 * logits)
    else:
        return Outer(model), "inner.to_vocab"
    return model, "to_vocab"


@pytest.mark.parametrize("named", [False, True])
@pytest.mark.parametrize(
    "kind", ["soft cap", "tied", "own forward", "hooks", "in a submodule"]
)
def test_a_head_is_found_or_named_and_called(kind, named):
    torch.manual_seed(0)
    model, path = with_head(kind)
    model.to(DEVICE).eval()
    ids = PROMPT + SAMPLED
    options = BuilderOptions(head=path if named else None)
    scorer = Scorer(model, options)
    assert scorer.body.head_path == path
    states = scorer.hidden_states([ids], [range(len(ids))])
    (rows,) = scorer.full_logprobs(states, 1.0)
    with torch.no_grad():
        logits = model(torch.tensor([ids], device=DEVICE), None)[0]
    torch.testing.assert_close(rows, logits.log_softmax(-1).cpu())
    output = an_output(model)
    assert parity.compare(model, [output], head=path if named else None).all_equal


class WithoutHead(Batched):
    def forward(self, input_ids, positions):
        return nn.functional.linear(self.embedding(input_ids), self.to_vocab.weight)


def test_a_head_that_is_no_module_is_refused():
    model = WithoutHead().to(DEVICE)
    with pytest.raises(TypeError, match="forward did not call the head"):
        Scorer(model).hidden_states([PROMPT], [[0]])
    model.to_vocab = nn.Identity()
    with pytest.raises(ValueError, match="WithoutHead is the head.*Compute the logits"):
        Scorer(model)
    with pytest.raises(ValueError, match="names the head 'head', .* no such submodule"):
        Scorer(model, BuilderOptions(head="head"))


def test_what_follows_the_head_is_scored_or_refused():
    with pytest.raises(TypeError, match="aten._softmax.default is not a function of"):
        Scorer(Normed().to(DEVICE)).hidden_states([PROMPT], [[0]])
    model = Capped().to(DEVICE).eval()
    ids = PROMPT + SAMPLED
    with torch.no_grad():
        logits = model(torch.tensor([ids], device=DEVICE))["logits"][0]
    rows = trainer_logprobs(model, ids)
    torch.testing.assert_close(rows, logits.log_softmax(-1).cpu())
    assert parity.compare(model, [an_output(model)]).all_equal


def test_nothing_to_compare(model):
    empty = an_output(model)
    empty.outputs[0].token_ids, empty.outputs[0].logprobs = [], []
    for outputs in ([], [empty]):
        with pytest.raises(ValueError, match="nothing to compare"):
            parity.compare(model, outputs)
    without = an_output(model)
    without.outputs[0].logprobs = None
    with pytest.raises(ValueError, match="no logprobs"):
        parity.compare(model, [without])
    with pytest.raises(ValueError, match="No token was compared"):
        parity.ParityReport(0, 0, 0.0, 0.0, False, None)
    with pytest.raises(ValueError, match="max_logprobs=-1"):
        parity.compare(model, [an_output(model)], full_vocab=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.bool])
@pytest.mark.parametrize("shape", [(7, 5), (3,), (), (0, 4)])
def test_fingerprints(dtype, shape):
    tensor = torch.randn(shape).to(dtype)
    print_ = fingerprint(tensor)
    assert print_ == fingerprint(tensor.clone())
    assert print_.startswith(str(dtype).removeprefix("torch."))
    if tensor.numel() < 2 or dtype == torch.bool:
        return
    assert print_ != fingerprint(tensor.flip(0))
    assert print_ != fingerprint(-tensor)
    changed = tensor.clone()
    changed.view(-1)[-1] += changed.view(-1)[-1].abs() / 64
    assert print_ != fingerprint(changed)
    rows = row_fingerprints(tensor.view(tensor.shape[0], -1))
    assert torch.equal(rows[:1], row_fingerprints(tensor[:1].view(1, -1)))


def test_a_fingerprint_spans_chunks_and_odd_offsets():
    tensor = torch.arange((1 << 20) + 3, dtype=torch.float32)
    swapped = tensor.clone()
    swapped[[0, -1]] = swapped[[-1, 0]]
    assert fingerprint(tensor) != fingerprint(swapped)
    half = torch.randn(9).bfloat16()
    assert fingerprint(half[1:]) == fingerprint(half[1:].clone())
    assert differing({"a": "1", "b": "2"}, {"b": "3", "c": "4"}) == ["a", "b", "c"]


def test_weights_that_the_engine_widens_are_the_same():
    """As its sinks of a model in fp16; other values in fp32 are not."""
    model = VLLMFlashAttention(64, 2, sinks=True, params_dtype=torch.float16)
    with torch.no_grad():
        model.attn.sinks.uniform_()
    given = dict(checkpoint_tensors(model))
    own = {name: fingerprint(tensor) for name, tensor in given.items()}
    loader = EngineLoader(model, CheckpointLayout.of(model), None)
    model.attn.sinks.data = model.attn.sinks.data.float()
    for rounding in (0, 1e-5):
        given["attn.sinks"] = given["attn.sinks"].float() + rounding
        with batch_invariant():
            loader.load(list(given.items()))
        names = ["attn.sinks"] if rounding else []
        assert differing(own, loader.fingerprints) == names


def test_localise(model):
    """The module whose weights differ is named, whatever follows."""

    def record():
        recorder = ModuleRecorder(model)
        Scorer(model).hidden_states([PROMPT], [[0]])
        return recorder.finish()

    before = record()
    assert first_differing_module(before, record()) is None
    with torch.no_grad():
        model.model.layers[1].mlp.down_proj.weight[3, 3] += 1e-2
    name = "model.layers.1.mlp.down_proj"
    assert first_differing_module(before, record()) == name
    assert not model.model._forward_hooks
    with pytest.raises(ValueError, match="no module path in common"):
        first_differing_module([], before)
