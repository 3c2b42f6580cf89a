# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""RotaryEmbedding and its op: accuracy, gradients, layouts, scaling, bad input."""

import copy

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from vllm.model_executor.layers.training import RotaryEmbedding
from vllm.model_executor.layers.training.ops.rotary.op import rotary_embedding
from vllm.model_executor.layers.training.ops.rotary.reference import (
    rotary_embedding_reference,
)
from vllm.model_executor.parallel_context import ParallelContext

MAX_POSITIONS = 512
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
STYLES = pytest.mark.parametrize("neox", [True, False], ids=["neox", "gptj"])
# head_size, rotary_dim: whole vectors, partial, ragged.
SIZES = [(64, 64), (128, 32), (80, 20), (63, 42), (96, 96), (10, 2)]


def make_layer(device, head_size=64, **arguments):
    arguments.setdefault("max_position_embeddings", MAX_POSITIONS)
    context = ParallelContext.single()
    layer = RotaryEmbedding(head_size, parallel_context=context, **arguments)
    return layer.to(device)


def make_cache(device, rotary_dim):
    return make_layer(device, rotary_dim).cos_sin_cache


def make_input(device, tokens, head_size=64, dtype=torch.float32, heads=(4, 2)):
    """Positions, and query and key that are slices of one tensor with values."""
    torch.manual_seed(tokens)
    positions = torch.randint(MAX_POSITIONS, (tokens,), device=device)
    total = heads[0] + 2 * heads[1]
    qkv = torch.randn(tokens, total * head_size).to(dtype).to(device)
    query, key, _ = qkv.unflatten(-1, (total, head_size)).split(
        (heads[0], heads[1], heads[1]), dim=1
    )
    return positions, query, key


def same_bits(actual, expected):
    return all(torch.equal(a, b) for a, b in zip(actual, expected, strict=True))


@STYLES
@pytest.mark.parametrize("rotary_dim", [6, 4])
def test_reference_passes_gradcheck(rotary_dim, neox, device):
    positions, query, key = make_input(device, 3, 6, torch.float64)
    cache = make_cache(device, rotary_dim)
    for inverse in (False, True):

        def function(query, key, inverse=inverse):
            return rotary_embedding_reference(
                positions, query, key, cache, neox, inverse
            )

        leaves = (query.clone().requires_grad_(), key.clone().requires_grad_())
        assert torch.autograd.gradcheck(function, leaves)


@STYLES
@pytest.mark.parametrize("head_size, rotary_dim", SIZES)
@pytest.mark.parametrize("tokens", [1, 5, 63, 123])
@pytest.mark.parametrize("dtype", DTYPES)
def test_results_and_gradients_are_accurate(
    dtype, tokens, head_size, rotary_dim, neox, device, assert_as_accurate
):
    positions, query, key = make_input(device, tokens, head_size, dtype)
    cache = make_cache(device, rotary_dim)
    grads = torch.randn_like(query), torch.randn_like(key)

    def results(function, dtype):
        leaves = [x.detach().to(dtype).requires_grad_() for x in (query, key)]
        outputs = function(positions, *leaves, cache, neox)
        given = [grad.to(dtype) for grad in grads]
        return [*outputs, *torch.autograd.grad(outputs, leaves, given)]

    for what, *tensors in zip(
        ("query", "key", "dquery", "dkey"),
        results(rotary_embedding, dtype),
        results(rotary_embedding_reference, dtype),
        results(rotary_embedding_reference, torch.float64),
        strict=True,
    ):
        assert_as_accurate(what, *tensors)


@settings(
    deadline=None,
    max_examples=60,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(
    tokens=st.integers(0, 9),
    heads=st.tuples(st.integers(0, 9), st.integers(0, 3)),
    pairs=st.integers(1, 70),
    kept=st.integers(0, 40),
    dtype=st.sampled_from(DTYPES),
    neox=st.booleans(),
    inverse=st.booleans(),
)
def test_any_shape(tokens, heads, pairs, kept, dtype, neox, inverse, device):
    head_size = 2 * pairs + kept
    positions, query, key = make_input(device, tokens, head_size, dtype, heads)
    inputs = positions, query, key, make_cache(device, 2 * pairs), neox, inverse
    eps = torch.finfo(dtype).eps
    torch.testing.assert_close(
        rotary_embedding(*inputs),
        rotary_embedding_reference(*inputs),
        rtol=eps,
        atol=4 * torch.finfo(torch.float32).eps,
    )


@STYLES
def test_the_inverse_rotates_back(neox, device):
    positions, query, key = make_input(device, 63)
    cache = make_cache(device, 48)
    turned = rotary_embedding(positions, query, key, cache, neox)
    assert not torch.allclose(turned[0], query, atol=0.1)
    back = rotary_embedding(positions, *turned, cache, neox, inverse=True)
    torch.testing.assert_close(back, (query, key))


@STYLES
def test_slices_of_one_tensor_are_not_copied(neox, device):
    positions, query, key = make_input(device, 5)
    cache = make_cache(device, 64)
    called = []

    class Record(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            called.append(func.name())
            return func(*args, **(kwargs or {}))

    with Record():
        actual = rotary_embedding(positions, query, key, cache, neox)
    assert called == ["vllm_training::rotary_embedding"]
    assert all(x.is_contiguous() for x in actual)


@STYLES
def test_any_strides_give_the_same_bits(neox, device):
    positions, query, key = (x.contiguous() for x in make_input(device, 63))
    cache = make_cache(device, 64)
    expected = rotary_embedding(positions, query, key, cache, neox)

    def heads_first(x):
        return x.transpose(0, 1).contiguous().transpose(0, 1)

    def features_first(x):
        return x.permute(2, 0, 1).contiguous().permute(1, 2, 0)

    for change in (heads_first, features_first):
        strided = change(query), change(key)
        assert same_bits(rotary_embedding(positions, *strided, cache, neox), expected)
    spread = torch.stack((positions, positions + 1), dim=-1)[:, 0]
    for same in (spread, positions.int()):
        assert same_bits(rotary_embedding(same, query, key, cache, neox), expected)
    assert same_bits(
        rotary_embedding(positions, query, key, cache.T.contiguous().T, neox), expected
    )

    # A gradient that is one value, expanded; one of a result that is not used.
    leaf = query.clone().requires_grad_()
    rotated = rotary_embedding(positions, leaf, key, cache, neox)
    (grad,) = torch.autograd.grad(rotated[0].sum(), leaf)
    ones = torch.ones_like(query)
    back = rotary_embedding(positions, ones, key, cache, neox, inverse=True)
    assert torch.equal(grad, back[0])


@STYLES
def test_a_gradient_has_a_gradient(neox, device):
    positions, query, key = make_input(device, 5)
    cache = make_cache(device, 64)
    leaves = [x.clone().requires_grad_() for x in (query, key)]
    given = [torch.randn_like(x).requires_grad_() for x in leaves]
    outputs = rotary_embedding(positions, *leaves, cache, neox)
    grads = torch.autograd.grad(outputs, leaves, given, create_graph=True)
    assert same_bits(torch.autograd.grad(grads, given, (query, key)), outputs)


@STYLES
@pytest.mark.parametrize("tokens, heads", [(0, (4, 2)), (5, (4, 0)), (5, (0, 0))])
def test_nothing_to_rotate(tokens, heads, neox, device):
    positions, query, key = make_input(device, tokens, heads=heads)
    leaves = [x.detach().requires_grad_() for x in (query, key)]
    outputs = rotary_embedding(positions, *leaves, make_cache(device, 64), neox)
    assert [x.shape for x in outputs] == [query.shape, key.shape]
    grads = torch.autograd.grad(outputs, leaves, [torch.ones_like(x) for x in outputs])
    assert [x.shape for x in grads] == [query.shape, key.shape]


@STYLES
@pytest.mark.parametrize("dtype", DTYPES)
def test_opcheck(dtype, neox, device):
    positions, query, key = make_input(device, 5, 10, dtype)
    leaves = [x.clone().requires_grad_() for x in (query, key)]
    torch.library.opcheck(
        torch.ops.vllm_training.rotary_embedding,
        (positions, *leaves, make_cache(device, 8), neox, False),
    )


@STYLES
@pytest.mark.parametrize("head_size, rotary_dim", SIZES)
def test_every_element_is_written(head_size, rotary_dim, neox, device, monkeypatch):
    positions, query, key = make_input(device, 63, head_size)
    cache = make_cache(device, rotary_dim)
    monkeypatch.setattr(torch.utils.deterministic, "fill_uninitialized_memory", True)
    torch.use_deterministic_algorithms(True)
    try:
        assert torch.empty(3, device=device).isnan().all()
        outputs = rotary_embedding(positions, query, key, cache, neox)
    finally:
        torch.use_deterministic_algorithms(False)
    assert not any(x.isnan().any() for x in outputs)
    for x, source in zip(outputs, (query, key)):
        assert torch.equal(x[..., rotary_dim:], source[..., rotary_dim:])


@STYLES
def test_nan_and_infinity_propagate_as_in_torch(neox, device):
    positions, query, key = (x.clone() for x in make_input(device, 5, 10))
    for index, value in enumerate((float("nan"), float("inf"), -float("inf"), 3e38)):
        query[index, 1, 2 * index] = key[index, 0, 8 - 2 * index] = value
    positions[2] = 0  # cos = 1, sin = 0
    cache = make_cache(device, 8)
    actual = rotary_embedding(positions, query, key, cache, neox)
    expected = rotary_embedding_reference(positions, query, key, cache, neox)
    torch.testing.assert_close(actual, expected, equal_nan=True)


@STYLES
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_token_does_not_depend_on_the_others(dtype, neox, device):
    positions, query, key = make_input(device, 123, 80, dtype)
    cache = make_cache(device, 52)
    batch = rotary_embedding(positions, query, key, cache, neox)
    for first, last in ((0, 1), (61, 62), (7, 100), (122, 123)):
        part = slice(first, last)
        alone = [x[part].contiguous() for x in (positions, query, key)]
        assert same_bits(
            rotary_embedding(*alone, cache, neox), [x[part] for x in batch]
        )


@STYLES
def test_the_number_of_threads_does_not_matter(neox):
    positions, query, key = make_input("cpu", 1001)
    cache = make_cache("cpu", 64)
    threads = torch.get_num_threads()
    results = []
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            results.append(rotary_embedding(positions, query, key, cache, neox))
    finally:
        torch.set_num_threads(threads)
    assert same_bits(results[0], results[1]) and same_bits(results[0], results[2])


@STYLES
def test_a_position_outside_the_cache_is_not_silent(neox, device):
    positions, query, key = make_input(device, 4)
    cache = make_cache(device, 32)
    for outside in (-1, MAX_POSITIONS, 2**40):
        positions[2] = outside
        if device.type == "cpu":
            with pytest.raises(IndexError, match="holds positions 0 to 511"):
                rotary_embedding(positions, query, key, cache, neox)
            continue
        for x, source in zip(
            rotary_embedding(positions, query, key, cache, neox), (query, key)
        ):
            assert x[2, :, :32].isnan().all()
            assert not x[[0, 1, 3]].isnan().any()
            assert torch.equal(x[..., 32:], source[..., 32:])


@pytest.mark.parametrize("positions_shape", [(6,), (2, 3), (0,), (2, 0)])
def test_the_layer_takes_every_layout(positions_shape, device, assert_equal):
    layer = make_layer(device, 8)
    positions = torch.randint(MAX_POSITIONS, positions_shape, device=device)
    query, key = (
        torch.randn(*positions_shape, heads, 8, device=device) for heads in (4, 2)
    )
    expected = layer(positions, query, key)
    assert [t.shape for t in expected] == [query.shape, key.shape]
    flat = layer(positions, query.flatten(-2), key.flatten(-2))
    for what, a, b in zip(("query", "key"), flat, expected):
        assert_equal(what, a, b.flatten(-2))


def test_the_layer_computes_in_fp64(device):
    layer = make_layer(device, 4, rotary_dim=2).double()
    positions, query, key = make_input(device, 3, 4, torch.float64)
    leaves = (query.clone().requires_grad_(), key.clone().requires_grad_())
    assert torch.autograd.gradcheck(lambda q, k: layer(positions, q, k), leaves)
    assert layer(positions, query, key)[0].dtype == torch.float64


def test_scores_depend_on_distance_only(device):
    layer = make_layer(device, 32)
    query, key = torch.randn(2, 1, 32, device=device)

    def score(query_position, key_position):
        q, _ = layer(torch.tensor([query_position], device=device), query, query)
        k, _ = layer(torch.tensor([key_position], device=device), key, key)
        return (q * k).sum()

    torch.testing.assert_close(score(13, 4), score(209, 200), rtol=1e-4, atol=1e-4)


@STYLES
def test_compiled_whole(neox, device):
    layer = make_layer(device, rotary_dim=32, is_neox_style=neox)
    compiled = torch.compile(layer, fullgraph=True, dynamic=True)
    for tokens in (5, 63):
        positions, query, key = make_input(device, tokens)
        leaves = [x.detach().requires_grad_() for x in (query, key)]
        given = [torch.randn_like(x) for x in leaves]
        actual, expected = compiled(positions, *leaves), layer(positions, *leaves)
        assert same_bits(actual, expected)
        assert same_bits(
            torch.autograd.grad(actual, leaves, given),
            torch.autograd.grad(expected, leaves, given),
        )
        with torch.inference_mode():
            assert same_bits(compiled(positions, query, key), expected)


def test_the_cache_survives_casts_copies_and_meta_init(device, assert_equal):
    layer = make_layer(device)
    cache = layer.cos_sin_cache.clone()
    assert "cos_sin_cache" not in layer.state_dict()
    assert_equal("bf16 and back", layer.bfloat16().float().cos_sin_cache, cache)
    assert layer.bfloat16().cos_sin_cache.dtype == torch.float32
    with torch.device("meta"):
        meta = RotaryEmbedding(64, max_position_embeddings=MAX_POSITIONS)
    assert meta.cos_sin_cache.device.type == "cpu"
    x = torch.zeros(5, 4, 64, device="meta")
    positions = torch.zeros(5, dtype=torch.long, device="meta")
    assert meta(positions, x, x)[0].shape == x.shape
    assert_equal("meta", meta.to_empty(device=device).cos_sin_cache, cache)
    assert_equal("copy", copy.deepcopy(layer).cos_sin_cache, cache)


def test_bad_input_is_refused(device):
    for rotary_dim in (3, 10, 0):
        with pytest.raises(ValueError, match=f"rotary_dim={rotary_dim} must be even"):
            make_layer(device, 8, rotary_dim=rotary_dim)
    layer = make_layer(device, 8)
    positions = torch.arange(4, device=device)
    good, short, odd = (
        torch.zeros(*s, device=device) for s in ((4, 8), (3, 8), (4, 12))
    )
    with pytest.raises(ValueError, match=r"query of shape \(3, 8\)"):
        layer(positions, short, short)
    with pytest.raises(ValueError, match=r"key of shape \(4, 12\)"):
        layer(positions, good, odd)
    with pytest.raises(ValueError, match=r"key of shape \(4, 1, 16\)"):
        layer(positions, good, torch.zeros(4, 1, 16, device=device))
    with pytest.raises(ValueError, match="key: torch.float16 .* of one floating-point"):
        layer(positions, good, good.half())
    with pytest.raises(ValueError, match="positions: torch.float32 .* int32 or int64"):
        layer(positions.float(), good, good)
    with pytest.raises(ValueError, match="on meta.* all on one device"):
        layer(positions, good, good.to("meta"))
    with pytest.raises(ValueError, match=r"\(512, 8\).* 2 to head_size"):
        heads = good.view(4, 2, 4)
        rotary_embedding(positions, heads, heads, layer.cos_sin_cache, True)
    if device.type == "cpu":
        with pytest.raises(IndexError, match="positions go from 510 to 513"):
            layer(positions + 510, good, good)
