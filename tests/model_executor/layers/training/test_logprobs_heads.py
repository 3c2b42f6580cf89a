# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""token_logprobs and full_logprobs with heads that are more than their weight."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import (
    checkpoint_wrapper,
)
from torch.nn.utils.parametrizations import weight_norm
from torch.utils.checkpoint import checkpoint

from vllm.model_executor.determinism.mode import (
    batch_invariant,
    is_batch_invariant,
)
from vllm.model_executor.layers.training import (
    ParallelLMHead,
    head_scoring,
    token_logprobs,
)
from vllm.model_executor.layers.training.logprobs import full_logprobs
from vllm.model_executor.layers.training.ops.logprobs import blocks as block_sizes
from vllm.v1.sample.sampler import Sampler

VOCAB, HIDDEN, TOKENS = 37, 16, 45


class SoftCapped(nn.Linear):
    def forward(self, x):
        return 3 * torch.tanh(super().forward(x) / 3)


class Scaled(ParallelLMHead):
    def forward(self, hidden_states):
        return super().forward(hidden_states * 0.5)


class Called(nn.Linear):
    def __call__(self, x):
        return super().__call__(x) * 2


class Tied(nn.Module):
    def __init__(self, embedding):
        super().__init__()
        self.weight = embedding.weight

    def forward(self, x):
        return F.linear(x, self.weight)


class LoRA(nn.Module):
    def __init__(self, base, dropout=0.0):
        super().__init__()
        self.base = base.requires_grad_(False)
        self.a, self.b = nn.Linear(HIDDEN, 2, False), nn.Linear(2, VOCAB, False)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x):
        return self.base(x) + self.b(self.a(self.dropout(x)))


def linear():
    return nn.Linear(HIDDEN, VOCAB, bias=False)


def with_own_forward():
    head, adapter = linear(), nn.Linear(HIDDEN, VOCAB)
    of_class, head.adapter = head.forward, adapter
    head.forward = lambda x: of_class(x) + adapter(x)
    return head


def with_hook(kind):
    head = ParallelLMHead(VOCAB, HIDDEN, bias=True)
    if kind == "forward":
        head.register_forward_hook(lambda module, args, output: output * 2)
    elif kind == "pre":
        head.register_forward_pre_hook(lambda module, args: (args[0] * 2,))
    else:
        head.register_full_backward_hook(lambda module, into, out: (into[0] * 2,))
    return head


HEADS = {
    "soft cap": lambda: SoftCapped(HIDDEN, VOCAB),
    "subclass of ours": lambda: Scaled(VOCAB, HIDDEN),
    "own __call__": lambda: Called(HIDDEN, VOCAB),
    "own forward": with_own_forward,
    "hook": lambda: with_hook("forward"),
    "pre-hook": lambda: with_hook("pre"),
    "backward hook": lambda: with_hook("backward"),
    "tied": lambda: Tied(nn.Embedding(VOCAB, HIDDEN)),
    "adapter": lambda: LoRA(linear()),
    "parametrized": lambda: weight_norm(linear()),
    "weight norm by a hook": lambda: nn.utils.weight_norm(linear()),
    "checkpointed": lambda: checkpoint_wrapper(linear()),
    "compiled": lambda: torch.compile(linear(), backend="eager"),
}


@pytest.fixture(params=["kept", "recomputed"])
def blocks(request, monkeypatch):
    few = block_sizes.Blocks(11 * VOCAB, 3 * VOCAB, 5 * VOCAB, 16, 1, 7 * VOCAB)
    if request.param == "kept":
        few.logits = (TOKENS + 1) * VOCAB
    monkeypatch.setattr(block_sizes, "CPU_BLOCKS", few)
    monkeypatch.setattr(block_sizes, "CUDA_BLOCKS", few)


@pytest.fixture
def seeded():
    torch.manual_seed(0)


def make(name, device, dtype=torch.float64):
    head = HEADS[name]().to(device, dtype)
    hidden = torch.randn(3, TOKENS // 3, HIDDEN, dtype=dtype, device=device)
    targets = torch.randint(VOCAB, hidden.shape[:2], device=device)
    return head, hidden.requires_grad_(), targets


def in_plain_torch(hidden, head, targets, temperature):
    rows = (head(hidden) / temperature.unsqueeze(-1)).log_softmax(-1)
    logprobs = rows.gather(-1, targets.unsqueeze(-1)).squeeze(-1)
    return logprobs, -(rows.exp() * rows).sum(-1), rows


@pytest.mark.parametrize("name", HEADS)
def test_a_head_is_what_its_call_computes(name, blocks, seeded, device):
    head, hidden, targets = make(name, device)
    temperature = torch.rand(targets.shape, device=device, dtype=hidden.dtype) + 0.5
    leaves = [hidden, *(p for p in head.parameters() if p.requires_grad)]
    actual = token_logprobs(
        hidden, head, targets, temperature=temperature, return_entropy=True
    )
    rows = full_logprobs(hidden, head, temperature=temperature)
    expected = in_plain_torch(hidden, head, targets, temperature)
    for a, e in zip((*actual, rows), expected, strict=True):
        torch.testing.assert_close(a, e)
        weights = torch.randn_like(e)
        gradients, plain = (
            torch.autograd.grad((x * weights).sum(), leaves, retain_graph=True)
            for x in (a, e)
        )
        torch.testing.assert_close(gradients, plain)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_called_head_has_the_samplers_bits(
    dtype, blocks, seeded, device, assert_equal
):
    head, hidden, targets = make("subclass of ours", device, dtype)
    with batch_invariant():
        logits = head(hidden).detach().flatten(0, 1)
        alone = token_logprobs(hidden[1, 2:3], head, targets[1, 2:3])
        for temperature in (1.0, 0.7):
            rows = full_logprobs(hidden, head, temperature=temperature)
            actual, _ = token_logprobs(
                hidden, head, targets, temperature=temperature, return_entropy=True
            )
            if temperature == 1:
                assert_equal("alone", alone, actual[1, 2:3])
            if device.type == "cpu":
                if temperature != 1:
                    divisors = torch.full((TOKENS,), temperature)
                    logits = Sampler.apply_temperature(logits.float(), divisors, True)
                assert_equal(
                    "rows", rows.flatten(0, 1), Sampler.compute_logprobs(logits)
                )
            assert_equal(
                "logprobs", actual, rows.gather(-1, targets[..., None])[..., 0]
            )


def test_the_backward_computes_the_same_again(blocks, seeded, device, monkeypatch):
    """In the mode of the forward, with the same dropout."""
    head, hidden, targets = make("adapter", device)
    head.dropout.p = 0.5
    modes = []
    head.register_forward_hook(lambda *_: modes.append(is_batch_invariant()))

    def gradients():
        torch.manual_seed(1)
        with batch_invariant():
            loss = token_logprobs(hidden, head, targets).sum()
        return torch.autograd.grad(loss, [hidden, head.a.weight, head.b.weight])

    actual = gradients()
    assert all(modes)
    monkeypatch.setattr(head_scoring, "checkpoint", lambda f, *args, **_: f(*args))
    for a, e in zip(actual, gradients(), strict=True):
        assert torch.equal(a, e)


def test_memory_of_a_called_head(monkeypatch, seeded, device, largest_tensor):
    few = block_sizes.Blocks(20 * VOCAB, 3 * VOCAB, 5 * VOCAB, 16, 4, 7 * VOCAB)
    monkeypatch.setattr(block_sizes, "CPU_BLOCKS", few)
    monkeypatch.setattr(block_sizes, "CUDA_BLOCKS", few)
    head, hidden, targets = make("soft cap", device, torch.float32)
    with largest_tensor:
        logprobs, entropy = token_logprobs(hidden, head, targets, return_entropy=True)
        (logprobs + entropy).sum().backward()
    assert largest_tensor.numel <= max(20 * VOCAB, hidden.numel())


def test_with_what_trainers_use(blocks, seeded, device, assert_equal):
    """Compiled, checkpointed and under autocast: as plain."""
    torch.compiler.reset()
    head, hidden, targets = make("soft cap", device, torch.float32)

    def results(function):
        logprobs = function(hidden, head, targets)
        return logprobs, *torch.autograd.grad(logprobs.sum(), [hidden, head.weight])

    expected = results(token_logprobs)
    compiled = torch.compile(token_logprobs, fullgraph=True, backend="aot_eager")

    def checkpointed(function):
        return lambda *args: checkpoint(function, *args, use_reentrant=False)

    for function in (compiled, checkpointed(token_logprobs)):
        for index, (a, e) in enumerate(zip(results(function), expected, strict=True)):
            assert_equal(f"result {index}", a, e)
    rows = full_logprobs(hidden, head)
    at_targets = checkpointed(full_logprobs)(hidden, head)
    assert_equal("rows", at_targets, rows)
    got, want = (
        torch.autograd.grad(x[..., 3].sum(), hidden) for x in (at_targets, rows)
    )
    assert_equal("gradient of rows", got[0], want[0])
    with torch.autocast(device.type, torch.bfloat16):
        logprobs = token_logprobs(hidden, head, targets)
        plain = head(hidden).log_softmax(-1, dtype=torch.float32)
    assert_equal("autocast", logprobs, plain.gather(-1, targets[..., None])[..., 0])
    assert torch.autograd.grad(logprobs.sum(), head.weight)[0].dtype == torch.float32


def test_no_tokens_and_no_gradients(seeded, device):
    head, hidden, targets = make("soft cap", device, torch.float32)
    none = token_logprobs(hidden[:, :0], head, targets[:, :0], return_entropy=True)
    assert none[0].shape == none[1].shape == (3, 0)
    sum(none).sum().backward()
    assert head.weight.grad.eq(0).all()
    with torch.no_grad():
        assert not token_logprobs(hidden, head, targets).requires_grad


def test_the_advice_for_second_derivatives_holds(device):
    for head in (SoftCapped(4, 5), nn.Linear(4, 5), ParallelLMHead(5, 4)):
        head = head.to(device, torch.float64)
        hidden = torch.randn(
            3, 4, dtype=torch.float64, device=device, requires_grad=True
        )
        targets = torch.tensor([0, 4, 2], device=device)
        logprobs = token_logprobs(hidden, head, targets)
        (gradient,) = torch.autograd.grad(logprobs.sum(), hidden, create_graph=True)
        with pytest.raises(RuntimeError, match="full_logprobs"):
            gradient.sum().backward()

        def advised(hidden, head=head, targets=targets):
            rows = full_logprobs(hidden, head, temperature=0.8)
            return rows.gather(-1, targets[:, None])

        assert torch.autograd.gradgradcheck(advised, hidden)


class Returns(nn.Module):
    def __init__(self, change):
        super().__init__()
        self.linear, self.change = nn.Linear(HIDDEN, VOCAB), change

    def forward(self, x):
        return self.change(self.linear(x))


def test_what_is_no_head_is_refused(seeded):
    head, hidden, targets = make("soft cap", torch.device("cpu"), torch.float32)
    cases = [
        (nn.Embedding(VOCAB, HIDDEN), "got a Embedding as lm_head.*tie_weights"),
        (head.forward, "got a method as lm_head; it takes a torch.nn.Module"),
        (Returns(lambda x: (x, None)), "a Returns, returned a tuple; .* plain torch.T"),
        (Returns(lambda x: x[:1]), r"shape \(1, 37\) .* shape = \[16, vocab_size\]"),
        (Returns(lambda x: x.long()), "returned torch.int64 of shape"),
        (Returns(lambda x: x[:, :5]), "targets hold .*token ids are 0 to 4"),
    ]
    for other, message in cases:
        with pytest.raises((TypeError, ValueError), match=message):
            token_logprobs(hidden, other, targets)
    with pytest.raises(ValueError, match=r"shape \(48,\) must be"):
        token_logprobs(hidden.flatten()[:48], head, targets)
