# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""token_logprobs against the whole log-softmax."""

import pytest
import torch
from torch import nn

from vllm.model_executor.layers.training import ParallelLMHead, logprobs, token_logprobs
from vllm.model_executor.parallel_context import ParallelContext
from vllm.v1.sample.sampler import Sampler

VOCAB, HIDDEN = 211, 48


def make_head(kind, bias, dtype):
    torch.manual_seed(1)
    if kind is nn.Linear:
        return nn.Linear(HIDDEN, VOCAB, bias=bias, dtype=dtype)
    return ParallelLMHead(
        VOCAB,
        HIDDEN,
        bias,
        params_dtype=dtype,
        parallel_context=ParallelContext.single(),
    )


def make_batch(*shape, dtype):
    torch.manual_seed(0)
    hidden = (3 * torch.randn(*shape, HIDDEN)).to(dtype).requires_grad_()
    return hidden, torch.randint(VOCAB, shape)


def whole_log_softmax(hidden, weight, bias, targets, temperature):
    logits = torch.nn.functional.linear(hidden, weight, bias)
    dtype = torch.promote_types(hidden.dtype, torch.float32)
    if temperature != 1.0:
        logits = logits.to(dtype) / temperature
    logprobs = logits.log_softmax(-1, dtype=dtype)
    return logprobs.gather(-1, targets.unsqueeze(-1)).squeeze(-1)


@pytest.fixture(params=[None, 20], ids=["one chunk", "many chunks"])
def chunk(request, monkeypatch):
    if request.param is not None:
        monkeypatch.setattr(logprobs, "MAX_LOGITS_PER_CHUNK", request.param * VOCAB)


@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("num_tokens", [1, 5, 63, 123])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_has_the_samplers_bits(dtype, num_tokens, temperature, assert_equal):
    hidden, targets = make_batch(num_tokens, dtype=dtype)
    head = make_head(ParallelLMHead, False, dtype)
    logits = head(hidden).detach()
    if temperature != 1.0:
        logits = Sampler.apply_temperature(
            logits.float(), torch.full((num_tokens,), temperature), True
        )
    expected = Sampler.compute_logprobs(logits).gather(-1, targets[:, None])[:, 0]

    actual = token_logprobs(hidden, head, targets, temperature=temperature)

    assert_equal("logprobs", actual, expected)


@pytest.mark.parametrize("temperature", [1.0, 1.7])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("kind", [ParallelLMHead, nn.Linear])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_values_and_gradients_are_accurate(
    dtype, kind, bias, temperature, chunk, assert_as_accurate
):
    hidden, targets = make_batch(123, dtype=dtype)
    head = make_head(kind, bias, dtype)
    grad = torch.randn(123)
    parameters = list(head.parameters())
    actual = token_logprobs(hidden, head, targets, temperature=temperature)
    actual = [actual, *torch.autograd.grad(actual, [hidden, *parameters], grad)]

    def results(dtype):
        leaves = [t.detach().to(dtype).requires_grad_() for t in (hidden, *parameters)]
        rest = leaves[2] if bias else None
        output = whole_log_softmax(*leaves[:2], rest, targets, temperature)
        return [output, *torch.autograd.grad(output, leaves, grad.to(output.dtype))]

    names = ("logprobs", "dhidden", "dweight", "dbias")
    for what, *tensors in zip(names, actual, results(dtype), results(torch.float64)):
        assert_as_accurate(what, *tensors)


@pytest.mark.parametrize("temperature", [1.0, 0.8])
def test_gradcheck(chunk, temperature):
    hidden, targets = make_batch(5, dtype=torch.float64)
    head = make_head(nn.Linear, True, torch.float64)

    def function(hidden, weight, bias):
        parameters = {"weight": weight, "bias": bias}
        for name, value in parameters.items():
            delattr(head, name)
            setattr(head, name, value)
        return token_logprobs(hidden, head, targets, temperature=temperature)

    leaves = (hidden, head.weight.detach(), head.bias.detach())
    assert torch.autograd.gradcheck(
        function, [leaf.requires_grad_() for leaf in leaves], fast_mode=True
    )


def test_chunks_change_no_bits(monkeypatch, assert_equal):
    hidden, targets = make_batch(123, dtype=torch.bfloat16)
    head = make_head(nn.Linear, False, torch.bfloat16)
    expected = token_logprobs(hidden, head, targets)
    monkeypatch.setattr(logprobs, "MAX_LOGITS_PER_CHUNK", 10 * VOCAB)
    assert_equal("logprobs", token_logprobs(hidden, head, targets), expected)


def test_batched_equals_packed(assert_equal):
    hidden, targets = make_batch(3, 7, dtype=torch.float32)
    head = make_head(ParallelLMHead, True, torch.float32)
    batched = token_logprobs(hidden, head, targets)
    packed = token_logprobs(hidden.flatten(0, 1), head, targets.flatten())
    assert batched.shape == (3, 7) and batched.dtype == torch.float32
    assert_equal("logprobs", batched.flatten(), packed)


def test_logits_of_a_batch_are_never_held(monkeypatch, largest_tensor):
    limit = 20 * VOCAB
    monkeypatch.setattr(logprobs, "MAX_LOGITS_PER_CHUNK", limit)
    hidden, targets = make_batch(400, dtype=torch.float32)
    head = make_head(nn.Linear, True, torch.float32)
    with largest_tensor:
        token_logprobs(hidden, head, targets).sum().backward()
    assert largest_tensor.numel <= max(limit, hidden.numel(), head.weight.numel())


def test_no_tokens():
    hidden, targets = make_batch(0, dtype=torch.float32)
    head = make_head(nn.Linear, True, torch.float32)
    token_logprobs(hidden, head, targets).sum().backward()
    assert hidden.grad.shape == (0, HIDDEN)
    assert head.weight.grad.eq(0).all() and head.bias.grad.eq(0).all()


def test_frozen_head_and_inference_mode():
    hidden, targets = make_batch(5, dtype=torch.float32)
    head = make_head(nn.Linear, True, torch.float32).requires_grad_(False)
    token_logprobs(hidden, head, targets).sum().backward()
    assert hidden.grad is not None and head.weight.grad is None
    with torch.inference_mode():
        assert token_logprobs(hidden, head, targets).shape == (5,)


def test_bad_input_is_refused():
    hidden, targets = make_batch(5, dtype=torch.float32)
    head = make_head(nn.Linear, False, torch.float32)

    class Scaled(nn.Linear):
        def forward(self, x):
            return 2 * super().forward(x)

    for other in (nn.Embedding(4, 4), Scaled(HIDDEN, VOCAB)):
        with pytest.raises(TypeError, match=f"got a {type(other).__name__} as lm_head"):
            token_logprobs(hidden, other, targets)
    cases = [
        ((hidden[:, :-1], head, targets), {}, r"\(5, 47\) must be \[num_tokens, 48\]"),
        ((hidden.double(), head, targets), {}, "float64, but the head's weight is"),
        ((hidden, head, targets.int()), {}, r"torch.int32 of shape \(5,\)"),
        ((hidden, head, targets[:4]), {}, r"of shape \(4,\); .* shape \(5,\)"),
        ((hidden, head, targets - VOCAB), {}, "token ids are 0 to 210"),
        ((hidden, head, targets + VOCAB), {}, "token ids are 0 to 210"),
        ((hidden, head, targets), {"temperature": 0.0}, "temperature=0.0 must be"),
        ((hidden, head, targets), {"temperature": float("nan")}, "must be positive"),
    ]
    for arguments, options, message in cases:
        with pytest.raises(ValueError, match=message):
            token_logprobs(*arguments, **options)


def test_autocast_is_that_of_plain_torch():
    torch.manual_seed(0)
    head = nn.Linear(32, 200, bias=True)
    hidden = torch.randn(40, 32, requires_grad=True)
    targets = torch.randint(0, 200, (40,))
    weights = [hidden, head.weight, head.bias]
    with torch.autocast("cpu", torch.bfloat16):
        ours = token_logprobs(hidden, head, targets)
        logits = head(hidden)
    plain = logits.log_softmax(-1, dtype=torch.float32)
    plain = plain.gather(1, targets[:, None])[:, 0]
    assert torch.equal(ours, plain)
    exact = hidden.double() @ head.weight.double().T + head.bias.double()
    exact = exact.log_softmax(-1).gather(1, targets[:, None])[:, 0]
    grads = [torch.autograd.grad(x.sum(), weights) for x in (ours, plain, exact)]
    for got, torch_got, want in zip(*grads):
        error, torch_error = (got - want).norm(), (torch_got - want).norm()
        assert error <= 2 * torch_error
