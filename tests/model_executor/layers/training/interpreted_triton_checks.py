# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""The Triton kernels on CPU tensors, by Triton's interpreter, against the references.

Run by `test_interpreted_triton.py` with TRITON_INTERPRET=1. What a compiler does with
the kernels is not seen here: the tests of the ops run them on a GPU.

The interpreter cuts fp32 off to bf16 where a GPU rounds to nearest. That doubles the
error of a result that is rounded once, which `assert_as_accurate` allows. It also
multiplies bf16 matrices as integers, so that attention is checked in fp32 and fp16.
"""

# ruff: noqa: E402
import copy

import numpy as np
import pytest
import torch
import triton
import triton.language
from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

import vllm.triton_utils

# On a machine without a GPU vLLM has placeholders here, which the kernels would import.
vllm.triton_utils.triton = triton
vllm.triton_utils.tl = triton.language


def _splat(builder, block_type, scalar):
    values = np.full(block_type.shape, scalar.data[0])
    return TensorHandle(values, scalar.dtype.scalar)


# Triton 3.9's gives comparisons of scalars an integer type, and refuses such a mask.
InterpreterBuilder.create_splat = _splat

from vllm.model_executor.layers.training.ops.activation import (
    triton_kernels as activation,
)
from vllm.model_executor.layers.training.ops.activation.reference import (
    gelu_and_mul_reference,
    silu_and_mul_reference,
)
from vllm.model_executor.layers.training.ops.attention import (
    triton_backward,
    triton_forward,
)
from vllm.model_executor.layers.training.ops.attention.call import (
    AttentionCall,
    AttentionSpec,
)
from vllm.model_executor.layers.training.ops.attention.reference import (
    attention_reference,
)
from vllm.model_executor.layers.training.ops.attention.triton_common import Tiles
from vllm.model_executor.layers.training.ops.logprobs import triton_kernels as logprobs
from vllm.model_executor.layers.training.ops.logprobs.reference import (
    entropy_reference,
    log_softmax,
    logits_gradient_reference,
    tempered,
)
from vllm.model_executor.layers.training.ops.norm import triton_kernels as norm
from vllm.model_executor.layers.training.ops.norm.reference import (
    fused_add_rms_norm_reference,
    rms_norm_reference,
)
from vllm.model_executor.layers.training.ops.rotary import triton_kernels as rotary
from vllm.model_executor.layers.training.ops.rotary.reference import (
    rotary_embedding_reference,
)

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
INF, NAN = float("inf"), float("nan")
EPS = 1e-5


@pytest.fixture(autouse=True)
def poisoned_memory():
    """New memory is NaN, and the numbers are the same in every run."""
    torch.manual_seed(0)
    torch.use_deterministic_algorithms(True)
    assert torch.empty(3).isnan().all()
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture(params=[True, False], ids=["large_gpu", "small_gpu"])
def gpu(request, monkeypatch):
    """What launchers ask of a GPU: whether it has an A100's shared memory."""
    for module in (norm, triton_forward, triton_backward):
        monkeypatch.setattr(
            module, "has_large_shared_memory", lambda device: request.param
        )


def random(*shape, dtype, gap=0):
    """Numbers whose rows lie in memory with `gap` NaN before and after each."""
    *rows, columns = shape
    memory = torch.full((*rows, columns + 2 * gap), NAN, dtype=dtype)
    return memory[..., gap : gap + columns].copy_(torch.randn(shape))


def results(function, inputs, grads):
    """Outputs and gradients by autograd."""
    leaves = [x.detach().requires_grad_() for x in inputs]
    outputs = function(*leaves)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    return [*outputs, *torch.autograd.grad(outputs, leaves, grads)]


def doubles(tensors):
    return [tensor.double() for tensor in tensors]


ACTIVATIONS = {
    "silu": (
        activation.silu_and_mul,
        activation.silu_and_mul_backward,
        silu_and_mul_reference,
    ),
    "gelu": (
        lambda x: activation.gelu_and_mul(x, False),
        lambda grad, x: activation.gelu_and_mul_backward(grad, x, False),
        lambda x: gelu_and_mul_reference(x, False),
    ),
    "gelu_tanh": (
        lambda x: activation.gelu_and_mul(x, True),
        lambda grad, x: activation.gelu_and_mul_backward(grad, x, True),
        lambda x: gelu_and_mul_reference(x, True),
    ),
}


@pytest.fixture(params=ACTIVATIONS)
def gated(request):
    return ACTIVATIONS[request.param]


@pytest.mark.parametrize(
    ("rows", "size", "gap"), [(1, 5, 0), (5, 63, 3), (3, 1500, 8), (0, 8, 0)]
)
@pytest.mark.parametrize("dtype", DTYPES)
def test_activation(gated, rows, size, gap, dtype, assert_as_accurate):
    function, backward, reference = gated
    x = random(rows, 2 * size, dtype=dtype, gap=gap)
    grad = random(rows, size, dtype=dtype, gap=gap)
    actual = function(x), backward(grad, x)
    plain = results(reference, [x], [grad])
    exact = results(reference, doubles([x]), doubles([grad]))
    for tensors in zip(("y", "dx"), actual, plain, exact, strict=True):
        assert_as_accurate(*tensors)
    for row in range(rows):
        alone = slice(row, row + 1)
        assert torch.equal(function(x[alone]), actual[0][alone])
        assert torch.equal(backward(grad[alone], x[alone]), actual[1][alone])


@pytest.mark.parametrize("form", ACTIVATIONS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_activation_of_two_tensors(form, dtype):
    function, backward, _ = ACTIVATIONS[form]
    gate, up, grad = (random(5, 63, dtype=dtype, gap=gap) for gap in (0, 3, 8))
    both = torch.cat((gate, up), 1)
    assert torch.equal(activation.activation_and_mul(gate, up, form), function(both))
    grads = activation.activation_and_mul_backward(grad, gate, up, form)
    assert torch.equal(torch.cat(grads, 1), backward(grad, both))


def test_activation_of_the_largest_numbers(gated):
    function, backward, reference = gated
    gate = torch.tensor([[-1e4, 1e4, -100.0, 100.0]])
    x, grad = torch.cat((gate, torch.ones_like(gate)), 1), torch.ones_like(gate)
    expected = results(reference, [x], [grad])
    torch.testing.assert_close([function(x), backward(grad, x)], expected)
    x[0, :2] = torch.tensor([INF, NAN])
    # In fp64: torch's fp32 gelu of infinity is NaN with AVX-512.
    expected = reference(x.double()).float()
    torch.testing.assert_close(function(x), expected, equal_nan=True)


def norm_reference(fused):
    reference = fused_add_rms_norm_reference if fused else rms_norm_reference
    return lambda *inputs: reference(*inputs, EPS)


def norm_results(inputs, grads):
    """Outputs and gradients by the kernels, in the order of `results`."""
    *_, weight = inputs
    *outputs, rstd = (norm.fused_add_rms_norm if grads[1:] else norm.rms_norm)(
        *inputs, EPS
    )
    normalised = outputs[1] if grads[1:] else inputs[0]
    grad_sum = grads[1] if grads[1:] else None
    grad_x, grad_weight = norm.rms_norm_backward(
        grads[0], grad_sum, normalised, weight, rstd
    )
    return [*outputs, *[grad_x] * len(outputs), grad_weight]


def check_norm(inputs, grads, assert_as_accurate):
    reference = norm_reference(fused=len(grads) == 2)
    actual = norm_results(inputs, grads)
    plain = results(reference, inputs, grads)
    exact = results(reference, doubles(inputs), doubles(grads))
    names = "y dx dweight" if len(grads) == 1 else "y sum dx dresidual dweight"
    for tensors in zip(names.split(), actual, plain, exact, strict=True):
        assert_as_accurate(*tensors)
    return actual


@pytest.mark.parametrize(
    ("rows", "hidden", "gap"),
    [(1, 5, 0), (37, 63, 3), (5, 1000, 5), (18, 128, 8), (0, 8, 0)],
)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("gpu", [True], indirect=True)
def test_norm(rows, hidden, gap, dtype, fused, gpu, assert_as_accurate):
    tensors = [random(rows, hidden, dtype=dtype, gap=gap) for _ in range(2 + 2 * fused)]
    inputs, grads = tensors[: 1 + fused], tensors[1 + fused :]
    # The kernels normalise the rounded sum again: too coarse for an fp32 gradient.
    weight = torch.randn(hidden).to(dtype if fused or rows % 2 else torch.float32)
    actual = check_norm([*inputs, weight], grads, assert_as_accurate)
    for row in range(0, rows, 4):
        alone = slice(row, row + 1)
        of_row = norm_results(
            [*(x[alone] for x in inputs), weight], [grad[alone] for grad in grads]
        )
        for part, whole in zip(of_row[:-1], actual[:-1], strict=True):
            assert torch.equal(part, whole[alone])


@pytest.mark.parametrize("gpu", [False], indirect=True)
def test_norm_of_more_tiles_than_programs(gpu, assert_as_accurate):
    """A program visits two tiles, and the last tile is not full."""
    x, residual, grad, grad_sum = torch.randn(4, 265, 1100)
    inputs, grads = [x, residual, torch.randn(1100)], [grad, grad_sum]
    tiling, schedule = norm._backward_plan(x, fused=True)
    assert 265 % tiling.tile_rows and tiling.tile_rows * schedule.programs < 265
    check_norm(inputs, grads, assert_as_accurate)


@pytest.mark.parametrize(
    ("tokens", "heads", "head_size", "rotary_dim", "gap"),
    [(5, (3, 1), 10, 10, 0), (4, (6, 2), 80, 48, 3), (2, (40, 3), 64, 64, 8)]
    + [(0, (2, 2), 8, 8, 0), (3, (2, 0), 12, 2, 0)],
)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("is_neox_style", [False, True])
def test_rotary(
    tokens, heads, head_size, rotary_dim, gap, dtype, is_neox_style, assert_as_accurate
):
    """Heads that fill one block or several; the gradient is the inverse rotation."""
    inputs = [random(tokens, n, head_size, dtype=dtype, gap=gap) for n in heads]
    grads = [random(tokens, n, head_size, dtype=dtype, gap=gap) for n in heads]
    cache = torch.randn(20, rotary_dim)
    positions = torch.randint(20, (tokens,))

    def kernels(rows=slice(None)):
        tables = (cache, is_neox_style)
        here = positions[rows]
        output = rotary.rotary_embedding(
            here, *(x[rows] for x in inputs), *tables, False
        )
        grad = rotary.rotary_embedding(here, *(x[rows] for x in grads), *tables, True)
        return *output, *grad

    def reference(query, key):
        return rotary_embedding_reference(positions, query, key, cache, is_neox_style)

    actual = kernels()
    plain = results(reference, inputs, grads)
    cache_in_use, cache = cache, cache.double()
    exact = results(reference, doubles(inputs), doubles(grads))
    cache = cache_in_use
    for tensors in zip(("q", "k", "dq", "dk"), actual, plain, exact, strict=True):
        assert_as_accurate(*tensors)
    for token in range(tokens):
        alone = slice(token, token + 1)
        for part, whole in zip(kernels(alone), actual, strict=True):
            assert torch.equal(part, whole[alone])


def test_rotary_of_positions_without_an_angle():
    query, key, cache = torch.randn(3, 2, 8), torch.randn(3, 1, 8), torch.randn(20, 6)
    positions = torch.tensor([-1, 19, 20])
    outputs = rotary.rotary_embedding(positions, query, key, cache, True, False)
    for output in outputs:
        assert output[[0, 2], :, :6].isnan().all()
        assert output[1].isfinite().all() and output[..., 6:].isfinite().all()


@pytest.mark.parametrize(("rows", "size", "gap"), [(5, 63, 3), (2, 4219, 0), (0, 7, 0)])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("in_fp32", [False, True])
@pytest.mark.parametrize("with_entropy", [False, True])
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_logits_gradient(
    rows, size, gap, dtype, in_fp32, with_entropy, temperature, assert_as_accurate
):
    logits = random(rows, size, dtype=dtype, gap=gap)
    logits[:, 1] = -INF
    # One a row; None is 1.
    divisors = None if temperature == 1 else torch.rand(rows) + temperature
    logps = log_softmax(tempered(logits.double(), divisors))
    lse = tempered(logits.double(), divisors).logsumexp(-1).float()
    # The first and the last column, and targets of other ranks.
    targets = torch.tensor([0, size - 1, -1, size, 2])[:rows]
    vectors = [lse, torch.randn(rows)]
    if with_entropy:
        # Of at most 1: times the least finite logprob a larger one overflows.
        vectors += [entropy_reference(logps).float(), torch.randn(rows)]

    def run(function, logits, vectors, targets, dtype, divisors=divisors):
        lse, grad, *of_entropy = vectors
        of_entropy = of_entropy or (None, None)
        return function(logits, lse, targets, grad, *of_entropy, divisors, dtype)

    result_dtype = torch.float32 if in_fp32 else dtype
    kernel, reference = logprobs.logits_gradient, logits_gradient_reference
    actual = run(kernel, logits, vectors, targets, result_dtype)
    plain = run(reference, logits, vectors, targets, result_dtype)
    exact = run(reference, logits.double(), doubles(vectors), targets, torch.float64)
    assert_as_accurate("dlogits", actual, plain, exact)
    for row in range(rows):
        alone = slice(row, row + 1)
        numbers = [vector[alone] for vector in vectors]
        divisor = None if divisors is None else divisors[alone]
        part = run(
            kernel, logits[alone], numbers, targets[alone], result_dtype, divisor
        )
        assert torch.equal(part, actual[alone])


@pytest.mark.parametrize(("rows", "size"), [(1, 5), (5, 63), (3, 4219), (0, 7)])
def test_entropy(rows, size, assert_as_accurate):
    logits = torch.randn(rows, size)
    logits[:, 1] = -INF
    logps = log_softmax(logits)
    actual = logprobs.entropy_of_rows(logps)
    plain, exact = entropy_reference(logps), entropy_reference(logps.double())
    assert_as_accurate("entropy", actual, plain, exact)
    for row in range(rows):
        alone = slice(row, row + 1)
        assert torch.equal(logprobs.entropy_of_rows(logps[alone]), actual[alone])


FEATURES = {
    "plain": {},
    "non_causal": {"causal": False},
    "window": {"window": 7},
    "non_causal window": {"causal": False, "window": 20},
    "soft_cap": {"soft_cap": 2.0},
    "sinks": {"sinks": True},
    "alibi": {"alibi": True},
    "non_causal alibi": {"causal": False, "alibi": True},
    "all": {"window": 20, "soft_cap": 5.0, "sinks": True, "alibi": True},
}
# Sequences are of several tiles, so that some are at the mask's edges and some are not.
SMALL, OBLONG = Tiles(16, 16, 4, 1), Tiles(32, 16, 4, 1)


class Attention:
    """Inputs, and how the kernels and the reference take them."""

    def __init__(self, features, dtype, head_size, lengths, heads=2, kv_heads=1):
        self.lengths = lengths
        tokens = sum(lengths)
        qkv = random(tokens, heads + 2 * kv_heads, head_size, dtype=dtype, gap=3)
        self.inputs = qkv.split([heads, kv_heads, kv_heads], dim=1)
        self.grad = random(heads, tokens, head_size, dtype=dtype).transpose(0, 1)
        self.sinks = torch.randn(heads).to(dtype) if "sinks" in features else None
        self.slopes = torch.rand(heads) if "alibi" in features else None
        self.spec = AttentionSpec(
            1.1 * head_size**-0.5,
            features.get("causal", True),
            features.get("window"),
            features.get("soft_cap"),
        )

    def bounds(self):
        return torch.tensor([0, *self.lengths]).cumsum(0, dtype=torch.int32)

    def sequences(self):
        """Each sequence alone."""
        parts = (tensor.split(self.lengths) for tensor in (*self.inputs, self.grad))
        for length, (*inputs, grad) in zip(self.lengths, zip(*parts), strict=True):
            alone = copy.copy(self)
            alone.lengths, alone.inputs, alone.grad = [length], inputs, grad
            yield alone

    def by_kernels(self, tiles=None, backward_tiles=None):
        """Output, lse, and the gradients of query, key and value."""
        call = AttentionCall(
            self.spec, self.bounds(), max(self.lengths), self.sinks, self.slopes
        )
        output, lse = triton_forward.attention_forward_triton(
            *self.inputs, call, _tiles=tiles
        )
        grads = triton_backward.attention_backward_triton(
            self.grad, *self.inputs, output, lse, call, _tiles=backward_tiles
        )
        return output, lse, *grads

    def by_reference(self, dtype):
        def function(query, key, value):
            return attention_reference(
                *(query, key, value, self.bounds(), self.sinks, self.slopes),
                scale=self.spec.scale,
                causal=self.spec.causal,
                window=self.spec.sliding_window,
                soft_cap=self.spec.logits_soft_cap,
            )

        leaves = [x.detach().to(dtype).requires_grad_() for x in self.inputs]
        output, lse = function(*leaves)
        return output, lse, *torch.autograd.grad(output, leaves, self.grad.to(dtype))

    def check(self, actual, assert_as_accurate):
        plain = list(self.by_reference(actual[0].dtype))
        # The lse is fp32 in any dtype.
        plain[1] = self.by_reference(torch.float32)[1]
        exact = self.by_reference(torch.float64)
        names = ("output", "lse", "dq", "dk", "dv")
        for tensors in zip(names, actual, plain, exact, strict=True):
            assert_as_accurate(*tensors)


@pytest.mark.parametrize(
    ("dtype", "feature"),
    [
        *((torch.float32, feature) for feature in FEATURES),
        *((torch.float16, feature) for feature in ("plain", "non_causal", "all")),
    ],
)
def test_attention(dtype, feature, assert_as_accurate):
    heads = (4, 2) if feature == "all" else (2, 1)
    case = Attention(FEATURES[feature], dtype, 24, [1, 0, 37, 5], *heads)
    actual = case.by_kernels(OBLONG, triton_backward.BackwardTiles(SMALL, OBLONG))
    case.check(actual, assert_as_accurate)


@pytest.mark.parametrize("feature", ["all", "non_causal alibi"])
def test_attention_of_a_sequence_alone(feature):
    case = Attention(FEATURES[feature], torch.float32, 8, [18, 1, 0, 20])
    tiles = SMALL, triton_backward.BackwardTiles(SMALL, OBLONG)
    whole = case.by_kernels(*tiles)
    alone = [sequence.by_kernels(*tiles) for sequence in case.sequences()]
    for dim, tensor, *parts in zip((0, 1, 0, 0, 0), whole, *alone, strict=True):
        assert torch.equal(torch.cat(parts, dim), tensor)


@pytest.mark.parametrize(
    ("dtype", "head_size"),
    [(torch.float16, head_size) for head_size in (8, 80, 256)]
    + [(torch.float32, head_size) for head_size in (80, 256)],
)
def test_attention_in_the_tiles_of_a_gpu(dtype, head_size, gpu, assert_as_accurate):
    case = Attention(FEATURES["all"], dtype, head_size, [0, 40, 1])
    case.check(case.by_kernels(), assert_as_accurate)


@pytest.mark.parametrize("lengths", [[0], [0, 0]])
def test_attention_without_tokens(lengths):
    case = Attention(FEATURES["all"], torch.float32, 8, lengths)
    assert [len(tensor) for tensor in case.by_kernels()] == [0, 2, 0, 0, 0]
