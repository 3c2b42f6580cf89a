# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""weighted_nll against token_logprobs, whose gradients come from a backward."""

import math

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from vllm.model_executor.layers.training import (
    ParallelLMHead,
    token_logprobs,
    weighted_nll,
)
from vllm.model_executor.layers.training.ops.logprobs import blocks as block_sizes
from vllm.model_executor.layers.training.ops.logprobs import nll, of_logits
from vllm.model_executor.layers.training.ops.logprobs.reference import (
    token_logprobs_reference,
)
from vllm.model_executor.parallel_context import ParallelContext

VOCAB, HIDDEN, TOKENS = 101, 32, 45
ROUNDINGS = 3  # blocks of the smallest size below


@pytest.fixture(params=["one block", "many blocks", "without kernels"])
def blocks(request, monkeypatch):
    if request.param == "many blocks":
        few = block_sizes.Blocks(11 * VOCAB, 3 * VOCAB, 500, 16, 1, 20 * VOCAB)
        monkeypatch.setattr(block_sizes, "CPU_BLOCKS", few)
        monkeypatch.setattr(block_sizes, "CUDA_BLOCKS", few)
    elif request.param == "without kernels":
        for module in (of_logits, nll):
            monkeypatch.setattr(module, "has_kernel", lambda tensor: False)


def make(device, dtype=torch.float32, kind=nn.Linear, tokens=(TOKENS,)):
    torch.manual_seed(0)
    if kind is ParallelLMHead:
        context = ParallelContext.single()
        head = ParallelLMHead(
            VOCAB, HIDDEN, True, params_dtype=dtype, parallel_context=context
        )
    else:
        head = kind(HIDDEN, VOCAB, dtype=dtype)
    hidden = (2 * torch.randn(*tokens, HIDDEN)).to(device, dtype).requires_grad_()
    targets = torch.randint(VOCAB, tokens, device=device)
    weights = torch.randn(tokens, device=device) / TOKENS
    return hidden, head.to(device), targets, weights


def gradients(loss, hidden, head):
    return torch.autograd.grad(loss, [hidden, *head.parameters()])


@pytest.mark.parametrize("kind", [nn.Linear, ParallelLMHead])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_values_and_gradients_are_accurate(
    dtype, kind, blocks, device, assert_as_accurate
):
    hidden, head, targets, weights = make(device, dtype, kind)
    temperature = torch.rand(TOKENS, device=device) + 0.5
    loss, logprobs = weighted_nll(
        hidden, head, targets, weights, temperature=temperature
    )
    actual = [loss, logprobs, *gradients(2 * loss, hidden, head)]

    def results(dtype):
        leaves = [
            t.detach().to(dtype).requires_grad_() for t in (hidden, *head.parameters())
        ]
        logprobs, _ = token_logprobs_reference(*leaves, targets, temperature)
        loss = -(weights * logprobs).sum()
        return [loss, logprobs, *torch.autograd.grad(2 * loss, leaves)]

    names = ["loss", "logprobs", "dhidden", "dweight", "dbias"]
    for what, *tensors in zip(names, actual, results(dtype), results(torch.float64)):
        if what == "dweight" and dtype != torch.float32:
            # Each block's sum may be rounded, not the result alone.
            exact = tensors[-1]
            bound = ROUNDINGS * torch.finfo(dtype).eps * exact.abs().max()
            assert (tensors[0].double() - exact).abs().max() <= bound
        else:
            assert_as_accurate(what, *tensors)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_logprobs_are_those_of_token_logprobs(
    dtype, blocks, device, assert_equal, monkeypatch
):
    monkeypatch.setenv("VLLM_BATCH_INVARIANT", "1")
    hidden, head, targets, weights = make(device, dtype)
    _, logprobs = weighted_nll(hidden, head, targets, weights)
    assert_equal("logprobs", logprobs, token_logprobs(hidden, head, targets).detach())


def test_fp64_gradients_are_those_of_autograd(blocks, device):
    hidden, head, targets, weights = make(device, torch.float64)
    loss, logprobs = weighted_nll(hidden, head, targets, weights)
    leaves = [hidden, *head.parameters()]
    expected, _ = token_logprobs_reference(*leaves, targets, None)
    grads = torch.autograd.grad(-(weights * expected).sum(), leaves)
    torch.testing.assert_close(logprobs, expected.detach())
    for a, e in zip(gradients(loss, hidden, head), grads):
        torch.testing.assert_close(a, e)


def test_batched_equals_packed(device, assert_equal):
    hidden, head, targets, weights = make(device, tokens=(3, 15))
    loss, logprobs = weighted_nll(hidden, head, targets, weights)
    packed = weighted_nll(
        hidden.flatten(0, 1), head, targets.flatten(), weights.flatten()
    )
    assert logprobs.shape == targets.shape
    assert_equal("loss", loss, packed[0])
    assert_equal("logprobs", logprobs.flatten(), packed[1])


def test_a_called_head_is_called(device):
    class SoftCapped(nn.Linear):
        def forward(self, x):
            return 3 * torch.tanh(super().forward(x) / 3)

    hidden, head, targets, weights = make(device, kind=SoftCapped)
    loss, logprobs = weighted_nll(hidden, head, targets, weights)
    expected = token_logprobs(hidden, head, targets)
    assert not logprobs.requires_grad and torch.equal(logprobs, expected)
    actual = gradients(loss, hidden, head)
    for a, e in zip(actual, gradients(-(weights * expected).sum(), hidden, head)):
        assert torch.equal(a, e)


@pytest.mark.parametrize("frozen", ["hidden", "head", "bias", "all"])
def test_only_wanted_gradients_are_computed(frozen, blocks, device, assert_equal):
    hidden, head, targets, weights = make(device)
    whole = gradients(weighted_nll(hidden, head, targets, weights)[0], hidden, head)
    leaves = {"hidden": hidden, "weight": head.weight, "bias": head.bias}
    left_out = {"head": ("weight", "bias"), "all": tuple(leaves)}.get(frozen, (frozen,))
    for name in left_out:
        leaves[name].requires_grad_(False)
    loss, _ = weighted_nll(hidden, head, targets, weights)
    assert loss.requires_grad == (frozen != "all")
    if frozen != "all":
        loss.backward()
    for (name, leaf), expected in zip(leaves.items(), whole):
        if name in left_out:
            assert leaf.grad is None
        else:
            assert_equal(name, leaf.grad, expected)


def test_no_gradients_are_kept_without_need(device):
    hidden, head, targets, weights = make(device)
    with torch.no_grad():
        loss, logprobs = weighted_nll(hidden, head, targets, weights)
    assert not loss.requires_grad and not logprobs.requires_grad


def test_compiled(device, assert_equal):
    torch.compiler.reset()
    hidden, head, targets, weights = make(device)
    compiled = torch.compile(weighted_nll, fullgraph=True, backend="aot_eager")
    results = []
    for function in (weighted_nll, compiled):
        loss, logprobs = function(hidden, head, targets, weights)
        results.append([loss, logprobs, *gradients(3 * loss, hidden, head)])
    for index, (a, e) in enumerate(zip(*results, strict=True)):
        assert_equal(f"result {index}", a, e)


def test_checkpointing(device, assert_equal):
    hidden, head, targets, weights = make(device)
    plain = weighted_nll(hidden, head, targets, weights)[0]
    again = checkpoint(
        weighted_nll, hidden, head, targets, weights, use_reentrant=False
    )[0]
    for a, e in zip(gradients(again, hidden, head), gradients(plain, hidden, head)):
        assert_equal("gradient", a, e)


def test_tied_weights_add_up(device):
    hidden, head, targets, weights = make(device)
    loss = weighted_nll(hidden, head, targets, weights)[0]
    (alone,) = torch.autograd.grad(loss, head.weight)
    (head.weight.sum() + weighted_nll(hidden, head, targets, weights)[0]).backward()
    assert torch.equal(head.weight.grad, alone + 1)


def test_a_rank_with_padding_alone_has_zeros(blocks, device, monkeypatch):
    """Its part of the vocabulary begins after the last token."""

    def no_columns(*args):
        raise AssertionError("there are no logits that have a gradient")

    monkeypatch.setattr(nll, "_gradient", no_columns)
    hidden, head, targets, weights = make(device)
    _, _, *gradients = nll.weighted_nll_op(
        hidden.detach(),
        head.weight.detach(),
        head.bias.detach(),
        targets,
        None,
        weights,
        VOCAB,
        VOCAB + 3,
        "",
        [True] * 3,
    )
    leaves = [hidden, *head.parameters()]
    for gradient, leaf in zip(gradients, leaves, strict=True):
        assert torch.equal(gradient, torch.zeros_like(leaf))


def test_one_backward(device):
    hidden, head, targets, weights = make(device)
    loss, _ = weighted_nll(hidden, head, targets, weights)
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="one backward.*token_logprobs"):
        loss.backward()
    loss, _ = weighted_nll(hidden, head, targets, weights)
    with pytest.raises(RuntimeError, match="no second derivative"):
        torch.autograd.grad(loss, hidden, create_graph=True)


def test_no_tokens(device):
    hidden, head, targets, weights = make(device, tokens=(0,))
    loss, logprobs = weighted_nll(hidden, head, targets, weights)
    loss.backward()
    assert loss == 0 and len(logprobs) == 0
    assert head.weight.grad.eq(0).all() and head.bias.grad.eq(0).all()


@pytest.mark.parametrize("special", [math.inf, -math.inf, math.nan])
def test_special_values_are_those_of_token_logprobs(special, blocks, device):
    hidden, head, targets, weights = make(device)
    with torch.no_grad():
        head.bias[3] = special
    loss, logprobs = weighted_nll(hidden, head, targets, weights)
    expected = token_logprobs(hidden, head, targets)
    torch.testing.assert_close(logprobs, expected.detach(), equal_nan=True)
    of_loss = gradients(-(weights * expected).sum(), hidden, head)
    for a, e in zip(gradients(loss, hidden, head), of_loss):
        torch.testing.assert_close(a, e, equal_nan=True)


def test_bad_weights_are_refused(device):
    hidden, head, targets, weights = make(device)
    with pytest.raises(TypeError, match="weights are torch.int64.*floating-point"):
        weighted_nll(hidden, head, targets, weights.long())
    with pytest.raises(TypeError, match="weights are float"):
        weighted_nll(hidden, head, targets, 1.0)
    with pytest.raises(ValueError, match=r"weights of shape \(44,\)"):
        weighted_nll(hidden, head, targets, weights[1:])
    with pytest.raises(ValueError, match="require a gradient.*token_logprobs"):
        weighted_nll(hidden, head, targets, weights.requires_grad_())
    if device == "cpu":
        targets[7] = VOCAB
        with pytest.raises(ValueError, match=f"targets hold {VOCAB}"):
            weighted_nll(hidden, head, targets, weights.detach())
