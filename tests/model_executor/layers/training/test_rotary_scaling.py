# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""RotaryEmbedding's rope_scaling: vLLM's cache, bit for bit, and what is refused."""

import pytest
import torch

from vllm.config import VllmConfig, set_current_vllm_config
from vllm.model_executor.layers.rotary_embedding import get_rope
from vllm.model_executor.layers.training import RotaryEmbedding
from vllm.model_executor.parallel_context import ParallelContext

MAX_POSITIONS = 1000
YARN = {"rope_type": "yarn", "factor": 4.5, "original_max_position_embeddings": 256}
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 256,
    "rope_theta": 500000.0,
}
# rope_scaling, the number of positions.
SCALINGS = {
    "none": (None, 1000),
    "default": ({"rope_type": "default", "rope_theta": 1e6}, 1000),
    "partial": ({"partial_rotary_factor": 0.5}, 1000),
    "linear": ({"rope_type": "linear", "factor": 2.0}, 2000),
    "linear, not whole": ({"rope_type": "linear", "factor": 1.0005}, 1001),
    "dynamic, as trained": ({"rope_type": "dynamic", "factor": 4.0}, 1000),
    "dynamic": (
        {"rope_type": "dynamic", "factor": 4.0, "max_trained_positions": 100},
        1000,
    ),
    "dynamic, alpha": ({"rope_type": "dynamic", "alpha": 1000.0}, 1000),
    "yarn": (YARN, 1152),
    "yarn, base": (YARN | {"rope_theta": 1e6, "partial_rotary_factor": 0.5}, 1152),
    "yarn, not scaled": (YARN | {"factor": 1.0}, 256),
    "yarn, mscale": (YARN | {"mscale": 0.707, "mscale_all_dim": 0.5}, 1152),
    "yarn, mscale alone": (YARN | {"mscale": 0.707, "mscale_all_dim": 0}, 1152),
    "yarn, attention_factor": (YARN | {"attention_factor": 1.25}, 1152),
    "yarn, not truncated": (YARN | {"truncate": False, "beta_fast": 16}, 1152),
    "yarn, steep ramp": (
        YARN | {"beta_fast": 3.0, "beta_slow": 3, "truncate": False},
        1152,
    ),
    "llama3": (LLAMA3, 1000),
    "llama3, no middle": (LLAMA3 | {"low_freq_factor": 4.0}, 1000),
}


def make_layer(rope_scaling, head_size=64, **arguments):
    return RotaryEmbedding(
        head_size,
        max_position_embeddings=MAX_POSITIONS,
        rope_scaling=rope_scaling,
        parallel_context=ParallelContext.single(),
        **arguments,
    )


@pytest.mark.parametrize("head_size", [64, 128, 80])
@pytest.mark.parametrize("name", SCALINGS)
def test_the_cache_has_vllms_bits(name, head_size, assert_equal):
    rope_scaling, num_positions = SCALINGS[name]
    with set_current_vllm_config(VllmConfig()):
        engine = get_rope(head_size, MAX_POSITIONS, True, rope_scaling, torch.float32)
    cache = make_layer(rope_scaling, head_size).cos_sin_cache
    assert cache.shape[0] == num_positions
    assert_equal(name, cache, engine.cos_sin_cache)


def test_extended_positions_are_rotated(device):
    layer = make_layer({"rope_type": "linear", "factor": 2.0}).to(device)
    query = torch.randn(2, 1, 64, device=device)
    plain = make_layer(None).to(device)
    positions = torch.tensor([1998, 24], device=device)
    actual = layer(positions, query, query)
    torch.testing.assert_close(actual, plain(positions // 2, query, query))


def test_a_magnitude_scales_the_gradient_too(device):
    layer = make_layer(YARN | {"attention_factor": 2.0}).to(device)
    query = torch.randn(5, 2, 64, device=device, requires_grad=True)
    positions = torch.arange(5, device=device)
    rotated, _ = layer(positions, query, query)
    torch.testing.assert_close(rotated.norm(), 2 * query.norm())
    (grad,) = torch.autograd.grad(rotated, query, rotated)
    torch.testing.assert_close(grad, 4 * query)


def test_older_configs_and_null_values_are_read(assert_equal):
    expected = make_layer({"rope_type": "linear", "factor": 2}).cos_sin_cache
    for older in (
        {"type": "linear", "factor": 2.0},
        {"type": "linear", "rope_type": "linear", "factor": 2.0, "rope_theta": None},
    ):
        assert_equal(str(older), make_layer(older).cos_sin_cache, expected)
    layer = make_layer(YARN | {"attention_factor": None})
    assert_equal("yarn", layer.cos_sin_cache, make_layer(YARN).cos_sin_cache)


def test_base_and_rotary_dim_come_from_either_place():
    scaling = {"rope_theta": 1e6, "partial_rotary_factor": 0.25}
    layer = make_layer(scaling)
    assert (layer.base, layer.rotary_dim) == (1e6, 16)
    layer = make_layer(scaling, base=1e6, rotary_dim=16)
    assert (layer.base, layer.rotary_dim) == (1e6, 16)
    layer = make_layer(None)
    assert (layer.base, layer.rotary_dim) == (10000.0, 64)
    with pytest.raises(ValueError, match="base=10.0, but rope_scaling says 1000000.0"):
        make_layer(scaling, base=10.0)
    with pytest.raises(ValueError, match="rotary_dim=64, but rope_scaling says 16"):
        make_layer(scaling, rotary_dim=64)


@pytest.mark.parametrize(
    "rope_scaling, message",
    [
        ({"rope_type": "longrope"}, "one of default, linear, dynamic, yarn, llama3"),
        ({"rope_type": "yarn", "type": "linear", "factor": 2.0}, "they must agree"),
        ({"factor": 2.0}, r"unknown keys \['factor'\]; rope_type='default'"),
        ({"rope_type": "linear"}, r"lacks \['factor'\]"),
        ({"rope_type": "linear", "factor": None}, r"lacks \['factor'\]"),
        ({"rope_type": "yarn", "factor": 2.0}, "lacks .*'original_max_position_em"),
        (YARN | {"beta": 1, "low": 2}, r"unknown keys \['beta', 'low'\].*takes \['b"),
        (LLAMA3 | {"truncate": True}, r"unknown keys \['truncate'\]"),
        ({"rope_type": "linear", "factor": [2.0, 4.0]}, "factor=.* a positive number"),
        ({"rope_type": "linear", "factor": 0}, "factor=0; it must be a positive numb"),
        (YARN | {"factor": float("nan")}, "factor=nan; it must be a positive number"),
        (YARN | {"mscale": -1}, "mscale=-1; it must be a number, at least 0"),
        (YARN | {"truncate": 1}, "truncate=1; it must be true or false"),
        ({"rope_type": "dynamic"}, "takes either factor"),
        ({"rope_type": "dynamic", "factor": 2, "alpha": 2}, "takes either factor"),
        ({"rope_theta": "1e6"}, "rope_theta='1e6'; it must be a positive number"),
        ({"partial_rotary_factor": 1.5}, "rotary_dim=96 must be even"),
    ],
)
def test_bad_scaling_is_refused(rope_scaling, message):
    with pytest.raises(ValueError, match=message):
        make_layer(rope_scaling)
