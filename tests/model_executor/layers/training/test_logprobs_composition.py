# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""token_logprobs with what trainers use: compile, checkpointing, autocast, FSDP2."""

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.utils.checkpoint import checkpoint

from vllm.model_executor.determinism.log_softmax import aligned_rows
from vllm.model_executor.layers.training import token_logprobs
from vllm.model_executor.layers.training.logprobs import full_logprobs
from vllm.model_executor.layers.training.ops.logprobs import (
    blocks as block_sizes,
)
from vllm.model_executor.layers.training.ops.logprobs import (
    logits_gradient,
    of_logits,
    op,
)

VOCAB, HIDDEN = 97, 32


def make(device, dtype=torch.float32, num_tokens=20):
    torch.manual_seed(0)
    head = nn.Linear(HIDDEN, VOCAB, dtype=dtype, device=device)
    hidden = torch.randn(num_tokens, HIDDEN, dtype=dtype, device=device)
    targets = torch.randint(VOCAB, (num_tokens,), device=device)
    return hidden.requires_grad_(), head, targets


def results(hidden, head, targets, function=token_logprobs, temperature=1.0):
    """Values, and the gradient of each input."""
    outputs = function(
        hidden, head, targets, temperature=temperature, return_entropy=True
    )
    loss = outputs[0].mean() + 0.1 * outputs[1].sum()
    return [*outputs, *torch.autograd.grad(loss, [hidden, head.weight, head.bias])]


def assert_all_equal(assert_equal, actual, expected):
    for index, (a, e) in enumerate(zip(actual, expected, strict=True)):
        assert_equal(f"result {index}", a, e)


@pytest.fixture(params=["kept", "recomputed"])
def blocks(request, monkeypatch):
    if request.param == "recomputed":
        small = block_sizes.Blocks(7 * VOCAB, 3 * VOCAB, 500, 16, 1, 7 * VOCAB)
        monkeypatch.setattr(block_sizes, "CPU_BLOCKS", small)
        monkeypatch.setattr(block_sizes, "CUDA_BLOCKS", small)


def test_compiles_without_graph_breaks(blocks, device, assert_equal):
    torch.compiler.reset()
    hidden, head, targets = make(device)
    compiled = torch.compile(token_logprobs, fullgraph=True, backend="aot_eager")
    for temperature in (1.0, 0.8):
        for count in (20, 12):
            inputs = (hidden[:count].detach().requires_grad_(), head, targets[:count])
            actual = results(*inputs, compiled, temperature)
            expected = results(*inputs, temperature=temperature)
            assert_all_equal(assert_equal, actual, expected)
    rows = torch.compile(full_logprobs, fullgraph=True, backend="aot_eager")
    assert_equal("rows", rows(hidden, head), full_logprobs(hidden, head))
    if device.type == "cpu":
        with pytest.raises(ValueError, match="token ids are 0 to 96"):
            compiled(hidden, head, targets + VOCAB)


def test_checkpointing(blocks, device, assert_equal):
    inputs = make(device)

    def checkpointed(*args, **kwargs):
        return checkpoint(token_logprobs, *args, use_reentrant=False, **kwargs)

    actual = results(*inputs, checkpointed)
    assert_all_equal(assert_equal, actual, results(*inputs))


def test_retained_graph_gives_the_same_gradients(blocks, device, assert_equal):
    hidden, head, targets = make(device)
    loss = token_logprobs(hidden, head, targets).sum()
    first = torch.autograd.grad(loss, [hidden, head.weight], retain_graph=True)
    second = torch.autograd.grad(loss, [hidden, head.weight])
    assert_all_equal(assert_equal, second, first)


def test_only_wanted_gradients_are_computed(blocks, device, assert_equal):
    hidden, head, targets = make(device)
    expected = results(hidden, head, targets)[2:]
    leaves = (hidden, head.weight, head.bias)
    for wanted in range(3):
        for leaf in leaves:
            leaf.requires_grad_(leaf is leaves[wanted])
        logprobs, entropy = token_logprobs(hidden, head, targets, return_entropy=True)
        (logprobs.mean() + 0.1 * entropy.sum()).backward()
        assert_equal(f"gradient {wanted}", leaves[wanted].grad, expected[wanted])
        leaves[wanted].grad = None
        assert all(leaf.grad is None for leaf in leaves)


def test_a_frozen_head_has_no_weight_gradient(device, largest_tensor):
    hidden, head, targets = make(device, num_tokens=2)
    head.requires_grad_(False)
    logprobs = token_logprobs(hidden, head, targets)
    with largest_tensor:
        logprobs.sum().backward()
    assert hidden.grad.ne(0).any() and head.weight.grad is None
    assert largest_tensor.numel <= max(2 * VOCAB, head.weight.numel() // 2)


def test_entropy_alone_can_be_differentiated(device):
    hidden, head, targets = make(device, torch.float64)
    entropy = token_logprobs(hidden, head, targets, return_entropy=True)[1]
    actual = torch.autograd.grad(entropy.sum(), hidden)[0]
    rows = full_logprobs(hidden, head)
    expected = torch.autograd.grad(-(rows.exp() * rows).sum(), hidden)[0]
    torch.testing.assert_close(actual, expected)


def test_nothing_is_kept_without_gradients(device, assert_equal, monkeypatch):
    hidden, head, targets = make(device)
    flags = []

    def spy(*args):
        flags.append(args[-1])
        return op.token_logprobs_op(*args)

    module = "vllm.model_executor.layers.training.head_scoring.token_logprobs_op"
    expected = token_logprobs(hidden, head, targets).detach()
    monkeypatch.setattr(module, spy)
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            assert_equal("logprobs", token_logprobs(hidden, head, targets), expected)
    head.requires_grad_(False)
    token_logprobs(hidden.detach(), head, targets)
    assert flags == [False] * 3


def test_rows_are_aligned_for_the_samplers_kernels(device, assert_equal):
    """A single row too: its stride is what the compiler of the kernels looks at."""
    padded = torch.randn(3, 128, device=device)
    for logits in (padded[:, :VOCAB], padded[:1, :VOCAB], padded[:, :96]):
        assert aligned_rows(logits) is logits
    for dtype in (torch.float32, torch.bfloat16):
        for count in (0, 1, 3):
            logits = padded[:count, :VOCAB].to(dtype).contiguous().view(count, VOCAB)
            logits = logits.as_strided(logits.shape, (VOCAB, 1))
            aligned = aligned_rows(logits)
            assert aligned.stride(0) % 16 == 0
            assert_equal("logits", aligned, logits)


def test_second_derivatives_are_refused(device):
    hidden, head, targets = make(device)
    logprobs = token_logprobs(hidden, head, targets)
    (gradient,) = torch.autograd.grad(logprobs.sum(), hidden, create_graph=True)
    with pytest.raises(RuntimeError, match="no second derivative"):
        gradient.sum().backward()


def test_tied_weights_add_up(device):
    hidden, head, targets = make(device, torch.float64)
    head.bias = None

    def gradient(function):
        embedded = torch.nn.functional.embedding(targets, head.weight)
        return torch.autograd.grad(function(embedded).sum(), head.weight)[0]

    actual = gradient(lambda x: token_logprobs(x, head, targets))
    expected = gradient(lambda x: full_logprobs(x, head).gather(1, targets[:, None]))
    torch.testing.assert_close(actual, expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_is_that_of_plain_torch(dtype, device, assert_equal):
    hidden, head, targets = make(device)
    leaves = [hidden, head.weight, head.bias]
    with torch.autocast(device.type, dtype):
        ours = token_logprobs(hidden, head, targets)
        plain = head(hidden).log_softmax(-1, dtype=torch.float32)
        plain = plain.gather(1, targets[:, None])[:, 0]
        assert_equal("logprobs", ours, plain)
        # Autocast leaves the dtypes of a backward inside of it alone.
        gradients = torch.autograd.grad(ours.sum(), leaves)
    exact = hidden.double() @ head.weight.double().T + head.bias.double()
    exact = exact.log_softmax(-1).gather(1, targets[:, None])[:, 0]
    plain, exact = (torch.autograd.grad(x.sum(), leaves) for x in (plain, exact))
    for got, torch_got, want in zip(gradients, plain, exact):
        error, torch_error = (got - want).norm(), (torch_got - want).norm()
        assert error <= 2 * torch_error


@pytest.mark.parametrize("with_entropy", [False, True])
def test_opcheck(blocks, with_entropy, device):
    hidden, head, targets = make(device)
    temperature = torch.rand(20, device=device) + 0.5
    arguments = (hidden, head.weight, head.bias, targets, temperature, VOCAB, 0, "")
    arguments = (*arguments, with_entropy, True)
    torch.library.opcheck(op.token_logprobs_op, arguments)
    lse, grad = torch.randn(20, device=device), torch.randn(20, device=device)
    for dtype in (torch.float32, torch.bfloat16):
        logits = head(hidden).detach().to(dtype)
        rest = (lse, targets, grad, *((lse, grad) if with_entropy else (None, None)))
        arguments = (logits[:, 3:50], *rest, temperature, torch.float32)
        torch.library.opcheck(logits_gradient._logits_gradient, arguments)
        arguments = (logits.requires_grad_(), targets, temperature, with_entropy, True)
        torch.library.opcheck(of_logits.logits_logprobs_op, arguments)


@pytest.fixture
def process_group(tmp_path, device):
    store = dist.FileStore(str(tmp_path / "store"), 1)
    backend = "nccl" if device.type == "cuda" else "gloo"
    dist.init_process_group(backend, store=store, rank=0, world_size=1)
    yield
    dist.destroy_process_group()


class Trained(nn.Module):
    def __init__(self, head):
        super().__init__()
        self.body = nn.Linear(HIDDEN, HIDDEN, bias=False)
        self.head = head

    def forward(self, hidden, targets=None):
        hidden = self.body(hidden)
        if targets is None:
            return hidden
        return token_logprobs(hidden, self.head, targets)


class SoftCapped(nn.Linear):
    def forward(self, x):
        return 3 * torch.tanh(super().forward(x) / 3)


WAYS = ["in the forward", "after it", "head unsharded", "head called by itself"]


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("called", [False, True])
def test_fsdp_gathers_the_head_or_it_is_refused(way, called, process_group, device):
    hidden, head, targets = make(device)
    if called:
        head.__class__ = SoftCapped
    model = Trained(head).to(device)
    expected = torch.autograd.grad(
        model(hidden, targets).sum(), list(model.parameters())
    )
    mesh = dist.device_mesh.init_device_mesh(device.type, (1,))
    if "head" in way:
        fully_shard(head, mesh=mesh)
    fully_shard(model, mesh=mesh)
    # The hooks of a sharded head gather its weight if it is called.
    if not (called and "head" in way):
        with pytest.raises(ValueError, match="is a DTensor, sharded .* lm_head.unsh"):
            token_logprobs(hidden, head, targets)
        if way == "head called by itself":
            return
    if way == "in the forward":
        logprobs = model(hidden, targets)
    else:
        after = model(hidden)
        if way == "head unsharded":
            head.unshard()
        logprobs = token_logprobs(after, head, targets)
    logprobs.sum().backward()
    for parameter, want in zip(model.parameters(), expected, strict=True):
        torch.testing.assert_close(parameter.grad.full_tensor(), want)
