# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""token_logprobs and full_logprobs against the whole log-softmax."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from vllm.model_executor.layers.training import ParallelLMHead, token_logprobs
from vllm.model_executor.layers.training.logprobs import full_logprobs
from vllm.model_executor.layers.training.ops.logprobs import (
    blocks as block_sizes,
)
from vllm.model_executor.layers.training.ops.logprobs import (
    logits_gradient,
    of_logits,
    op,
)
from vllm.model_executor.layers.training.ops.logprobs.reference import (
    token_logprobs_reference,
)
from vllm.model_executor.parallel_context import ParallelContext
from vllm.v1.sample.sampler import Sampler

VOCAB, HIDDEN = 211, 48


def make_head(kind, bias, dtype, device):
    torch.manual_seed(1)
    if kind is nn.Linear:
        head = nn.Linear(HIDDEN, VOCAB, bias=bias, dtype=dtype)
    else:
        context = ParallelContext.single()
        head = ParallelLMHead(
            VOCAB, HIDDEN, bias, params_dtype=dtype, parallel_context=context
        )
    return head.to(device)


def make_batch(*shape, dtype, device):
    torch.manual_seed(0)
    hidden = (3 * torch.randn(*shape, HIDDEN)).to(device, dtype).requires_grad_()
    return hidden, torch.randint(VOCAB, shape).to(device)


def many_blocks(monkeypatch, logits=20 * VOCAB):
    """Blocks that cut tokens and vocabulary, with remainders."""
    blocks = block_sizes.Blocks(logits, 3 * VOCAB, 50 * 37, 50, 1, 20 * VOCAB)
    monkeypatch.setattr(block_sizes, "CPU_BLOCKS", blocks)
    monkeypatch.setattr(block_sizes, "CUDA_BLOCKS", blocks)


@pytest.fixture(params=["kept", "recomputed", "kept, many blocks", "without kernels"])
def blocks(request, monkeypatch):
    if request.param == "recomputed":
        many_blocks(monkeypatch)
    elif request.param == "kept, many blocks":
        many_blocks(monkeypatch, 1000 * VOCAB)
    elif request.param == "without kernels":
        for module in (of_logits, logits_gradient):
            monkeypatch.setattr(module, "has_kernel", lambda tensor: False)


@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("num_tokens", [1, 5, 63, 123])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_has_the_samplers_bits(dtype, num_tokens, temperature, device, assert_equal):
    hidden, targets = make_batch(num_tokens, dtype=dtype, device=device)
    head = make_head(ParallelLMHead, False, dtype, device)
    logits = head(hidden).detach()
    if temperature != 1.0:
        temperatures = torch.full((num_tokens,), temperature, device=device)
        logits = Sampler.apply_temperature(logits.float(), temperatures, True)
    expected = Sampler.compute_logprobs(logits)

    rows = full_logprobs(hidden, head, temperature=temperature)
    assert_equal("rows", rows, expected)
    for with_entropy in (False, True):
        actual = token_logprobs(
            hidden,
            head,
            targets,
            temperature=temperature,
            return_entropy=with_entropy,
        )
        actual = actual[0] if with_entropy else actual
        assert_equal("logprobs", actual, expected.gather(-1, targets[:, None])[:, 0])


@pytest.mark.parametrize("with_entropy", [False, True])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_values_and_gradients_are_accurate(
    dtype, bias, with_entropy, blocks, device, assert_as_accurate
):
    hidden, targets = make_batch(123, dtype=dtype, device=device)
    kind, temperature, divisors = nn.Linear, 1.0, None
    if bias:
        kind, divisors = ParallelLMHead, torch.rand(123, device=device) + 0.5
        temperature = divisors
    head = make_head(kind, bias, dtype, device)
    grads = [torch.randn(123, device=device) for _ in range(1 + with_entropy)]
    parameters = list(head.parameters())
    actual = token_logprobs(
        hidden,
        head,
        targets,
        temperature=temperature,
        return_entropy=with_entropy,
    )
    actual = list(actual) if with_entropy else [actual]
    actual += torch.autograd.grad(actual, [hidden, *parameters], grads)

    def results(dtype):
        leaves = [t.detach().to(dtype).requires_grad_() for t in (hidden, *parameters)]
        rest = leaves[2] if bias else None
        outputs = token_logprobs_reference(*leaves[:2], rest, targets, divisors)
        outputs = list(outputs[: len(grads)])
        given = [grad.to(outputs[0].dtype) for grad in grads]
        return [*outputs, *torch.autograd.grad(outputs, leaves, given)]

    names = ["logprobs", "entropy"][: len(grads)] + ["dhidden", "dweight", "dbias"]
    for what, *tensors in zip(names, actual, results(dtype), results(torch.float64)):
        assert_as_accurate(what, *tensors)


@pytest.mark.parametrize("temperature", [1.0, 0.8])
def test_gradcheck(blocks, temperature, device):
    hidden, targets = make_batch(5, dtype=torch.float64, device=device)
    head = make_head(nn.Linear, True, torch.float64, device)

    def of(function):
        def with_parameters(hidden, weight, bias):
            for name, value in (("weight", weight), ("bias", bias)):
                delattr(head, name)
                setattr(head, name, value)
            return function(hidden)

        return with_parameters

    leaves = (hidden, head.weight.detach(), head.bias.detach())
    leaves = [leaf.requires_grad_() for leaf in leaves]
    functions = [
        lambda x: token_logprobs(
            x, head, targets, temperature=temperature, return_entropy=True
        ),
        lambda x: full_logprobs(x, head, temperature=temperature)[:, :9],
    ]
    for function in functions:
        assert torch.autograd.gradcheck(of(function), leaves, fast_mode=True)


def test_rows_do_not_depend_on_the_batch(monkeypatch, device, assert_equal):
    hidden, targets = make_batch(123, dtype=torch.bfloat16, device=device)
    head = make_head(nn.Linear, False, torch.bfloat16, device)
    expected = token_logprobs(hidden, head, targets, return_entropy=True)
    logits = head(hidden).detach()
    monkeypatch.setattr(op.F, "linear", lambda hidden, *_: logits[: len(hidden)])
    for count in (1, 5, 63):
        actual = token_logprobs(
            hidden[:count], head, targets[:count], return_entropy=True
        )
        for what, a, e in zip(("logprobs", "entropy"), actual, expected):
            assert_equal(what, a, e[:count])


def test_blocks_change_no_bits(monkeypatch, assert_equal):
    device = torch.device("cpu")  # A GPU's matrix products depend on the block.
    hidden, targets = make_batch(123, dtype=torch.bfloat16, device=device)
    head = make_head(nn.Linear, False, torch.bfloat16, device)
    expected = token_logprobs(hidden, head, targets, return_entropy=True)
    many_blocks(monkeypatch)
    actual = token_logprobs(hidden, head, targets, return_entropy=True)
    assert_equal("logprobs", actual[0], expected[0])
    assert_equal("entropy", actual[1], expected[1])


def test_batched_equals_packed(device, assert_equal):
    hidden, targets = make_batch(3, 7, dtype=torch.float32, device=device)
    head = make_head(ParallelLMHead, True, torch.float32, device)
    for function in (token_logprobs, lambda *args: full_logprobs(*args[:2])):
        batched = function(hidden, head, targets)
        packed = function(hidden.flatten(0, 1), head, targets.flatten())
        assert batched.shape[:2] == (3, 7) and batched.dtype == torch.float32
        assert_equal("logprobs", batched.flatten(0, 1), packed)


def test_views_give_the_same_bits(device, assert_equal):
    hidden, targets = make_batch(20, dtype=torch.float32, device=device)
    head = make_head(nn.Linear, False, torch.float32, device)
    twice = torch.stack([hidden.detach(), -hidden.detach()], -1)
    view = twice[..., 0].requires_grad_()
    strided = torch.stack([targets, targets], -1)[:, 0]
    assert not view.is_contiguous() and not strided.is_contiguous()
    results = []
    for h, t in ((hidden, targets), (view, strided)):
        logprobs, entropy = token_logprobs(h, head, t, return_entropy=True)
        # The gradient of a mean is an expanded scalar.
        loss = logprobs.mean() + entropy.mean()
        results.append(
            [logprobs, entropy, *torch.autograd.grad(loss, [h, head.weight])]
        )
    for what, a, e in zip(("logprobs", "entropy", "dh", "dw"), *results):
        assert_equal(what, a, e)


def test_logits_of_a_batch_are_never_held(monkeypatch, device, largest_tensor):
    limit = 50 * 37
    many_blocks(monkeypatch, limit)
    hidden, targets = make_batch(400, dtype=torch.float32, device=device)
    head = make_head(nn.Linear, True, torch.float32, device)
    with largest_tensor:
        logprobs, entropy = token_logprobs(hidden, head, targets, return_entropy=True)
        (logprobs + entropy).sum().backward()
    assert largest_tensor.numel <= max(limit, hidden.numel(), head.weight.numel())


def test_uninitialised_memory_is_never_read(blocks, device, assert_equal):
    hidden, targets = make_batch(123, dtype=torch.bfloat16, device=device)
    head = make_head(nn.Linear, True, torch.bfloat16, device)
    leaves = [hidden, head.weight, head.bias]

    def results():
        logprobs, entropy = token_logprobs(hidden, head, targets, return_entropy=True)
        gradients = torch.autograd.grad((logprobs + entropy).sum(), leaves)
        return [logprobs, entropy, *gradients]

    expected = results()
    torch.use_deterministic_algorithms(True)  # Fills new memory with NaN.
    try:
        actual = results()
    finally:
        torch.use_deterministic_algorithms(False)
    for index, (a, e) in enumerate(zip(actual, expected)):
        assert a.isfinite().all()
        assert_equal(f"result {index}", a, e)


def test_one_thread_gives_the_bits_of_two(blocks, assert_equal):
    hidden, targets = make_batch(123, dtype=torch.float32, device="cpu")
    logits = F.linear(hidden, make_head(nn.Linear, True, torch.float32, "cpu").weight)
    lse, grad = logits.logsumexp(1).detach(), torch.randn(123)
    threads, results = torch.get_num_threads(), []
    for count in (1, 2):
        torch.set_num_threads(count)
        numbers = logits_gradient.RowNumbers(lse, targets, grad, lse, grad, None)
        results.append(op.logits_gradient(logits.detach(), numbers, torch.float32))
    torch.set_num_threads(threads)
    assert_equal("gradient", *results)


@pytest.mark.parametrize("special", ["nan", "inf", "masked", "masked target"])
def test_special_values_are_those_of_torch(special, blocks, device):
    hidden, targets = make_batch(9, dtype=torch.float32, device=device)
    head = make_head(nn.Linear, True, torch.float32, device)
    with torch.no_grad():
        if special in ("nan", "inf"):
            hidden[4, 7] = float(special)
        else:
            targets[:] = torch.arange(1, 10, device=device)
            head.bias[4 if "target" in special else 100] = -torch.inf
    leaves = [hidden, head.weight, head.bias]
    grad = torch.rand(9, device=device)
    actual = token_logprobs(hidden, head, targets)
    plain, _ = token_logprobs_reference(*leaves, targets, None)
    actual = [actual, *torch.autograd.grad(actual, leaves, grad)]
    plain = [plain, *torch.autograd.grad(plain, leaves, grad)]
    for a, p in zip(actual, plain):
        torch.testing.assert_close(a, p, equal_nan=True, rtol=1e-4, atol=1e-5)
    entropy = token_logprobs(hidden, head, targets, return_entropy=True)[1]
    gradient = torch.autograd.grad(5 * entropy.sum(), leaves)[0]
    finite = torch.ones(9, dtype=torch.bool, device=device)
    finite[4] = special.startswith("masked")
    assert torch.equal(entropy.isfinite(), finite)
    assert torch.equal(gradient.isfinite().all(1), finite)


def test_no_tokens(device):
    hidden, targets = make_batch(0, dtype=torch.float32, device=device)
    head = make_head(nn.Linear, True, torch.float32, device)
    logprobs, entropy = token_logprobs(hidden, head, targets, return_entropy=True)
    assert logprobs.shape == entropy.shape == (0,)
    (logprobs + entropy).sum().backward()
    assert hidden.grad.shape == (0, HIDDEN)
    assert head.weight.grad.eq(0).all() and head.bias.grad.eq(0).all()
    assert full_logprobs(hidden, head).shape == (0, VOCAB)


def test_bad_input_is_refused():
    hidden, targets = make_batch(5, dtype=torch.float32, device="cpu")
    head = make_head(nn.Linear, False, torch.float32, "cpu")
    one = torch.ones(5)
    cases = [
        ((hidden[:, :-1], head, targets), {}, r"\(5, 47\) must be \[num_tokens, 48\]"),
        ((hidden.double(), head, targets), {}, "float64, but the head's weight is"),
        ((hidden[0], head, targets), {}, r"\(48,\) must be \[num_tokens, hidden_size"),
        ((hidden, head, targets.short()), {}, r"torch.int16 of shape \(5,\)"),
        ((hidden, head, targets[:4]), {}, r"of shape \(4,\); .* shape = \(5,\)"),
        ((hidden, head, targets - VOCAB), {}, "targets hold -.* ids are 0 to 210"),
        ((hidden, head, targets + VOCAB), {}, "token ids are 0 to 210"),
        (
            (hidden.to("meta"), head, targets),
            {},
            "on meta, the head's weight is on cpu",
        ),
        ((hidden, head, targets.to("meta")), {}, "targets are on meta, the hidden"),
    ]
    temperatures = [
        (0.0, "temperature=0.0; it must be a number from 1e-05"),
        (float("nan"), "temperature=nan"),
        (float("inf"), "temperature=inf"),
        (1e-40, "temperature=1e-40"),
        (torch.ones(4), r"shape \(4,\) does not broadcast to the tokens, \(5,\)"),
        (torch.ones(1, 5), r"shape \(1, 5\) does not broadcast"),
        (one.to("meta"), "temperature is on meta"),
        (one.clone().requires_grad_(), "requires a gradient, which is not computed"),
        *((one * wrong, "temperature holds") for wrong in (0, -1, math.inf, math.nan)),
        (torch.tensor([1, 1, 1, 1, 1e-6]), "temperature holds 9.99.*e-07"),
    ]
    cases += [((hidden, head, targets), {"temperature": t}, m) for t, m in temperatures]
    for arguments, options, message in cases:
        with pytest.raises(ValueError, match=message):
            token_logprobs(*arguments, **options)
    for temperature in (True, "1", None, [1.0] * 5, one.long(), one.bool()):
        with pytest.raises(TypeError, match="temperature is .* must be a number"):
            full_logprobs(hidden, head, temperature=temperature)
    for other in (targets.tolist(), targets.numpy(), 3):
        with pytest.raises(TypeError, match="must be a tensor of torch.int64"):
            token_logprobs(hidden, head, other)


def test_temperatures_one_a_token(device, assert_equal):
    """Each token's logprob is that of its temperature alone, and int32 ids do."""
    given = [0.7, 1.0, 1e-5, 2, 1.3e38, 0.7]
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        hidden, targets = make_batch(2, 3, dtype=dtype, device=device)
        head = make_head(nn.Linear, True, dtype, device)
        options = {"return_entropy": True}
        each = torch.tensor(given, device=device).view(2, 3)
        actual = token_logprobs(
            hidden, head, targets.int(), temperature=each, **options
        )
        rows = full_logprobs(hidden, head, temperature=each)
        for place, temperature in enumerate(given):
            at = divmod(place, 3)
            # A temperature of 1 leaves 16-bit logits as they are, which CUDA sums
            # up in another order.
            if device.type == "cuda" and temperature == 1 and dtype != torch.float32:
                continue
            alone = token_logprobs(
                hidden, head, targets, temperature=temperature, **options
            )
            for what, a, e in zip(("logprob", "entropy"), actual, alone):
                assert_equal(f"{what} at {temperature}", a[at], e[at])
            row = full_logprobs(hidden, head, temperature=temperature)[at]
            assert_equal(f"row at {temperature}", rows[at], row)
        # Some shapes that broadcast, and a number that is a tensor.
        for shape in ((), (1,), (3,), (2, 1), (1, 3)):
            some = torch.full(shape, 0.7, device=device, dtype=torch.float64)
            assert_equal(
                f"shape {shape}",
                token_logprobs(hidden, head, targets, temperature=some),
                token_logprobs(hidden, head, targets, temperature=0.7),
            )
