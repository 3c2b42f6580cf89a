# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""The vectors under the CPU kernels: conversions and elementary functions.

They are C++ headers, so they are tested through ops in which they show: GELU of 8 and
more is the identity in fp32, so `gelu_and_mul` is a product, rounded once.
"""

import math

import pytest
import torch

from vllm.model_executor.layers.training.ops.activation.op import (
    gelu_and_mul,
    silu_and_mul,
)

HALVES = [torch.bfloat16, torch.float16]


def assert_same_bits(actual, expected):
    assert actual.dtype == expected.dtype
    nan = expected.isnan()
    assert torch.equal(actual.isnan(), nan)
    bits = {2: torch.int16, 4: torch.int32}[actual.element_size()]
    actual, expected = actual[~nan], expected[~nan]
    assert torch.equal(actual.view(bits), expected.view(bits))


def every_half(dtype):
    return torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(dtype)


@pytest.mark.parametrize("gate", [8.0, 8.0625, 15.5, 4096.0])
@pytest.mark.parametrize("dtype", HALVES)
def test_every_half_is_loaded_and_results_are_rounded(dtype, gate):
    up = every_half(dtype)
    gates = torch.full_like(up, gate)
    expected = (gates.float() * up.float()).to(dtype)
    assert_same_bits(gelu_and_mul(torch.cat([gates, up]), False), expected)


@pytest.mark.parametrize(("dtype", "lost_bits"), [(HALVES[0], 16), (HALVES[1], 13)])
def test_ties_are_rounded_to_even(dtype, lost_bits):
    gates = (torch.arange(128, 256) / 16).repeat_interleave(256)
    up = torch.arange(256.0).repeat(128)
    product = gates * up
    lost = product.view(torch.int32) & (2**lost_bits - 1)
    assert (lost == 2 ** (lost_bits - 1)).sum() > 100  # halfway between two results
    actual = gelu_and_mul(torch.cat([gates, up]).to(dtype), False)
    assert_same_bits(actual, product.to(dtype))


@pytest.mark.parametrize("dtype", [torch.float32, *HALVES])
@pytest.mark.parametrize("size", range(1, 40))
def test_no_tail_is_lost_and_no_neighbour_is_touched(size, dtype):
    up = torch.arange(1.0, size + 1).to(dtype)
    x = torch.cat([torch.full_like(up, 8), up]).repeat(3, 1)
    assert_same_bits(gelu_and_mul(x, False), (8 * up).repeat(3, 1))


def sweep():
    """Both signs, every exponent of fp32 from 2^-40 to 2^6, and a fine grid."""
    magnitudes = torch.logspace(-40, 6, 40001, base=2.0, dtype=torch.float64)
    x = torch.cat([magnitudes, -magnitudes, torch.linspace(-20, 20, 40001)]).float()
    return torch.cat([x, torch.ones_like(x)]), x.double()


def test_exponential_is_accurate():
    x, exact_x = sweep()
    # Relative to the result, also where it is tiny: silu(-60) is -5e-25.
    torch.testing.assert_close(
        silu_and_mul(x).double(), exact_x * exact_x.sigmoid(), rtol=4e-7, atol=0
    )


def test_normal_distribution_is_accurate():
    x, exact_x = sweep()
    exact = torch.special.ndtr(exact_x)
    error = (gelu_and_mul(x, False).double() - exact_x * exact).abs()
    assert (error <= 2.5e-7 * exact_x.abs()).all()
    # The tail too, where 1 + erf(x / sqrt(2)) has no digit left.
    tail = (exact_x < -1) & (exact_x > -6)
    relative = (error / (exact_x * exact).abs())[tail]
    assert relative.max() < 1e-5


def test_hyperbolic_tangent_is_accurate():
    x, exact_x = sweep()
    inner = math.sqrt(2 / math.pi) * (exact_x + 0.044715 * exact_x**3)
    error = (gelu_and_mul(x, True).double() - exact_x * (1 + inner.tanh()) / 2).abs()
    assert (error <= 2e-7 * exact_x.abs()).all()
