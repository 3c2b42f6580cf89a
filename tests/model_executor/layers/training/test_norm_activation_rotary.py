# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""RMSNorm, SiluAndMul and RotaryEmbedding: vLLM's native bits, and a backward."""

import copy

import pytest
import torch

from vllm import ir
from vllm.config import VllmConfig, set_current_vllm_config
from vllm.model_executor.layers.activation import SiluAndMul as EngineSiluAndMul
from vllm.model_executor.layers.rotary_embedding import (
    RotaryEmbedding as EngineRotaryEmbedding,
)
from vllm.model_executor.layers.training import RMSNorm, RotaryEmbedding, SiluAndMul
from vllm.model_executor.parallel_context import ParallelContext

DTYPES = [torch.float32, torch.bfloat16]
RAGGED = [1, 5, 63, 123]


@pytest.fixture
def engine_config():
    with set_current_vllm_config(VllmConfig()):
        yield


def rotary(head_size=64, **arguments):
    return RotaryEmbedding(
        head_size,
        max_position_embeddings=512,
        parallel_context=ParallelContext.single(),
        **arguments,
    )


@pytest.mark.parametrize("with_residual", [False, True])
@pytest.mark.parametrize("rows", RAGGED)
@pytest.mark.parametrize("dtype", DTYPES)
def test_rms_norm_has_the_native_bits(dtype, rows, with_residual, single, assert_equal):
    torch.manual_seed(rows)
    norm = RMSNorm(96, 1e-5, params_dtype=dtype, parallel_context=single)
    torch.nn.init.normal_(norm.weight)
    x, residual = torch.randn(2, rows, 96).to(dtype)
    if with_residual:
        native = ir.ops.fused_add_rms_norm.impls["native"].impl_fn
        expected = native(x, residual, norm.weight, 1e-5)
        actual = norm(x, residual)
    else:
        native = ir.ops.rms_norm.impls["native"].impl_fn
        expected = (native(x, norm.weight, 1e-5),)
        actual = (norm(x),)
    for what, a, b in zip(("output", "residual"), actual, expected):
        assert_equal(what, a, b)


@pytest.mark.parametrize("rows", RAGGED)
@pytest.mark.parametrize("dtype", DTYPES)
def test_silu_and_mul_has_the_native_bits(dtype, rows, engine_config, assert_equal):
    x = torch.randn(rows, 2 * 96).to(dtype)
    expected = EngineSiluAndMul.forward_native(x)
    assert_equal("output", SiluAndMul()(x), expected)


@pytest.mark.parametrize("rotary_dim", [64, 32])
@pytest.mark.parametrize("is_neox_style", [True, False])
@pytest.mark.parametrize("rows", RAGGED)
@pytest.mark.parametrize("dtype", DTYPES)
def test_rotary_has_the_native_bits(
    dtype, rows, is_neox_style, rotary_dim, engine_config, assert_equal
):
    engine = EngineRotaryEmbedding(64, rotary_dim, 512, 1e6, is_neox_style, dtype)
    layer = rotary(rotary_dim=rotary_dim, base=1e6, is_neox_style=is_neox_style)
    positions = torch.randint(512, (rows,))
    query, key = (torch.randn(rows, heads * 64).to(dtype) for heads in (4, 2))
    expected = engine.forward_native(positions, query, key)
    for what, a, b in zip(("query", "key"), layer(positions, query, key), expected):
        assert_equal(what, a, b)


@pytest.mark.parametrize("with_residual", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
def test_rms_norm_gradients_are_accurate(
    dtype, with_residual, single, assert_as_accurate
):
    torch.manual_seed(0)
    inputs = torch.randn(3, 123, 96).to(dtype)
    weight = torch.randn(96).to(dtype)
    grads = torch.randn(2, 123, 96).to(dtype)

    def results(function, dtype):
        leaves = [t.to(dtype).requires_grad_() for t in (*inputs[:2], weight)]
        if not with_residual:
            del leaves[1]
        outputs = function(*leaves)
        outputs = outputs if with_residual else (outputs,)
        grad = [g.to(dtype) for g in grads[: len(outputs)]]
        return [*outputs, *torch.autograd.grad(outputs, leaves, grad)]

    def layer(x, *rest):
        norm = RMSNorm(96, params_dtype=x.dtype, parallel_context=single)
        *residual, weight = rest
        return torch.func.functional_call(norm, {"weight": weight}, (x, *residual))

    def plain(x, *rest):
        *residual, weight = rest
        x = x + residual[0] if residual else x
        y = torch.nn.functional.rms_norm(x, (96,), weight, 1e-6)
        return (y, x) if residual else y

    names = ("output", "sum", "dx", "dresidual", "dweight")
    for what, *tensors in zip(
        names,
        results(layer, dtype),
        results(plain, dtype),
        results(plain, torch.float64),
    ):
        assert_as_accurate(what, *tensors)


def test_gradchecks(single):
    torch.manual_seed(0)
    x, residual = torch.randn(2, 5, 8, dtype=torch.float64, requires_grad=True)
    norm = RMSNorm(8, params_dtype=torch.float64, parallel_context=single)
    assert torch.autograd.gradcheck(norm, (x, residual))
    assert torch.autograd.gradcheck(SiluAndMul(), (x,))
    for neox in (True, False):
        layer = rotary(4, rotary_dim=2, is_neox_style=neox)
        positions = torch.tensor([0, 3, 1, 511, 7])
        assert torch.autograd.gradcheck(
            lambda q, k, layer=layer, positions=positions: layer(positions, q, k),
            (x, residual),
        )


@pytest.mark.parametrize("positions_shape", [(6,), (2, 3), (0,), (2, 0)])
def test_rotary_takes_every_layout(positions_shape, assert_equal):
    layer = rotary(8)
    positions = torch.randint(512, positions_shape)
    query, key = (torch.randn(*positions_shape, heads, 8) for heads in (4, 2))
    expected = layer(positions, query, key)
    assert [t.shape for t in expected] == [query.shape, key.shape]
    flat = layer(positions, query.flatten(-2), key.flatten(-2))
    for what, a, b in zip(("query", "key"), flat, expected):
        assert_equal(what, a, b.flatten(-2))


def test_rotary_depends_on_distance_only():
    layer = rotary(32)
    query, key = torch.randn(2, 1, 32)

    def score(query_position, key_position):
        positions = torch.tensor([query_position]), torch.tensor([key_position])
        q, _ = layer(positions[0], query, query)
        k, _ = layer(positions[1], key, key)
        return (q * k).sum()

    torch.testing.assert_close(score(13, 4), score(209, 200), rtol=1e-4, atol=1e-4)


def test_rotary_cache_survives_casts_and_meta_init(assert_equal):
    layer = rotary()
    cache = layer.cos_sin_cache.clone()
    assert "cos_sin_cache" not in layer.state_dict()
    assert_equal("bf16 and back", layer.bfloat16().float().cos_sin_cache, cache)
    assert layer.bfloat16().cos_sin_cache.dtype == torch.float32
    with torch.device("meta"):
        meta = rotary()
    assert meta.cos_sin_cache.is_meta
    assert_equal("meta", meta.to_empty(device="cpu").cos_sin_cache, cache)
    assert_equal("copy", copy.deepcopy(layer).cos_sin_cache, cache)


def test_bad_input_is_refused(single):
    norm = RMSNorm(8, parallel_context=single)
    with pytest.raises(ValueError, match=r"shape \(2, 7\).*hidden_size=8"):
        norm(torch.zeros(2, 7))
    with pytest.raises(ValueError, match=r"residual has shape \(1, 8\)"):
        norm(torch.zeros(2, 8), torch.zeros(1, 8))
    with pytest.raises(ValueError, match="params_dtype=torch.int8 is not supported"):
        RMSNorm(8, params_dtype=torch.int8, parallel_context=single)
    with pytest.raises(ValueError, match=r"shape \(2, 7\).*must be even"):
        SiluAndMul()(torch.zeros(2, 7))
    for rotary_dim in (3, 10, 0):
        with pytest.raises(ValueError, match=f"rotary_dim={rotary_dim} must be even"):
            rotary(8, rotary_dim=rotary_dim)
    positions = torch.arange(4)
    with pytest.raises(ValueError, match=r"query of shape \(3, 8\)"):
        rotary(8)(positions, torch.zeros(3, 8), torch.zeros(3, 8))
    with pytest.raises(ValueError, match=r"key of shape \(4, 12\)"):
        rotary(8)(positions, torch.zeros(4, 8), torch.zeros(4, 12))
    with pytest.raises(IndexError, match="positions go from 510 to 513"):
        rotary(8)(positions + 510, torch.zeros(4, 8), torch.zeros(4, 8))
