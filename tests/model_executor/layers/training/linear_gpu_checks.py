# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""The Triton product for few rows, and that all in-order products have equal bits.

Run by `test_linear_gpu.py`: on a GPU, or on CPU tensors with TRITON_INTERPRET=1. The
interpreter adds up in an order of its own, so there the bits are compared on small
integers, whose sums are exact: that checks masks, strides and the choice of a kernel.
"""

# ruff: noqa: E402
import pytest
import torch
import torch.nn.functional as F
import triton
import triton.language

import vllm.triton_utils

IS_CUDA = torch.cuda.is_available()
if not IS_CUDA:
    # vLLM has placeholders here, which the kernels would import.
    vllm.triton_utils.triton = triton
    vllm.triton_utils.tl = triton.language

from vllm.model_executor import vllm_internals
from vllm.model_executor.determinism.linear import gpu, triton_kernels
from vllm.model_executor.determinism.linear.triton_kernels import Tiles

DEVICE = "cuda" if IS_CUDA else "cpu"
# The interpreter multiplies bf16 matrices as integers.
DTYPES = [torch.bfloat16, torch.float16] if IS_CUDA else [torch.float16]
NAN = float("nan")
TILES = [
    Tiles(16, 16, 64, False, 4, 3),
    Tiles(16, 64, 128, False, 4, 2),
    Tiles(32, 32, 64, True, 4, 2),
    Tiles(64, 64, 64, True, 4, 2),
    Tiles(64, 32, 64, False, 4, 2),
]
# M, N, K
RAGGED = [(1, 1, 1), (1, 16, 64), (5, 40, 70), (17, 33, 129), (70, 65, 200)]
# N, K, with a bias
LAYERS = [(48, 96, True), (33, 130, False)]
ROWS = [1, 2, 16, 17, 33, 64, 65, 130]
if IS_CUDA:
    LAYERS = [(4096, 2048, True), (5120, 8192, False)]
    LAYERS += [(1000, 520, True), (8200, 264, False), (151936, 2048, False)]
    ROWS = [1, 2, 3, 7, 8, 15, 16, 17, 31, 32, 33, 48, 63, 64, 65, 80, 96, 100, 128]
    ROWS += [192, 256, 300, 512, 777, 1024, 2048, 4096, 8192]


@pytest.fixture(autouse=True)
def poisoned_memory(monkeypatch):
    """New memory is NaN, and the numbers are the same in every run."""
    torch.manual_seed(0)
    torch.utils.deterministic.fill_uninitialized_memory = True
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture(autouse=True)
def gpu_to_interpret(monkeypatch):
    """What launchers ask of a GPU."""
    if IS_CUDA:
        return
    kernels = vllm_internals.batch_invariant_kernels()
    monkeypatch.setattr(kernels, "num_compute_units", lambda index: 3)
    monkeypatch.setattr(triton_kernels, "has_large_shared_memory", lambda device: True)


def integers(*shape, dtype, gap=0):
    """-1, 0 and 1 with NaN before and after each row."""
    *rows, columns = shape
    memory = torch.full((*rows, columns + 2 * gap), NAN, dtype=dtype, device=DEVICE)
    return memory[..., gap : gap + columns].copy_(torch.randint(-1, 2, shape))


def numbers(*shape, dtype):
    """What in-order products are compared on: their bits, where the order is real."""
    if not IS_CUDA:
        return integers(*shape, dtype=dtype)
    return torch.randn(shape, dtype=dtype, device=DEVICE)


def exact(x, weight, bias):
    bias = None if bias is None else bias.double()
    return F.linear(x.double(), weight.double(), bias)


@pytest.mark.parametrize("dtype", DTYPES[:1])
@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize("tiles", TILES, ids=str)
@pytest.mark.parametrize("shape", RAGGED, ids=str)
def test_every_element_in_its_place(shape, tiles, with_bias, dtype, assert_equal):
    num_rows, out_features, in_features = shape
    x = integers(num_rows, in_features, dtype=dtype, gap=8)
    weight = integers(out_features, in_features, dtype=dtype, gap=3)
    bias = integers(out_features, dtype=dtype, gap=1) if with_bias else None
    output = triton_kernels.launch(x, weight, bias, tiles)
    assert output.is_contiguous()
    assert_equal("output", output, exact(x, weight, bias).to(dtype))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("tiles", TILES, ids=str)
def test_accuracy(tiles, dtype, assert_as_accurate):
    x = torch.randn(37, 500, device=DEVICE).to(dtype)
    weight = torch.randn(70, 500, device=DEVICE).to(dtype)
    bias = torch.randn(70, device=DEVICE).to(dtype)
    output = triton_kernels.launch(x, weight, bias, tiles)
    plain = F.linear(x, weight, bias)
    assert_as_accurate("output", output, plain, exact(x, weight, bias))


@pytest.mark.parametrize("dtype", DTYPES)
def test_bias_is_added_before_rounding(dtype):
    x = torch.ones(2, 2, dtype=dtype, device=DEVICE)
    step = torch.finfo(dtype).eps
    # 1 + step / 4, rounded at once to 1, and step / 2 more than that: not 1.
    weight = torch.tensor([[1.0, step / 4]], dtype=dtype, device=DEVICE)
    bias = torch.tensor([step / 2], dtype=dtype, device=DEVICE)
    output = gpu.in_order_linear(x, weight, bias)
    assert output.tolist() == [[1 + step]] * 2


@pytest.mark.parametrize("large_memory", [True, False])
@pytest.mark.parametrize("num_rows", [1, 16, 17, 64, 96])
@pytest.mark.parametrize("out_features", [1, 2048, 6144, 28672, 151936])
def test_tiles_fit(num_rows, out_features, large_memory):
    tiles = triton_kernels.tiles_for(num_rows, out_features, large_memory)
    stage = 2 * (tiles.rows + tiles.columns) * tiles.depth
    assert tiles.num_stages >= 2
    assert stage * tiles.num_stages <= (220 if large_memory else 99) * 1024


@pytest.mark.parametrize("layer", LAYERS, ids=str)
@pytest.mark.parametrize("dtype", DTYPES)
def test_bits_are_those_of_vllm(layer, dtype, assert_equal):
    out_features, in_features, with_bias = layer
    weight = numbers(out_features, in_features, dtype=dtype)
    bias = numbers(out_features, dtype=dtype) if with_bias else None
    x = numbers(max(ROWS), in_features, dtype=dtype)
    matmul = vllm_internals.batch_invariant_kernels().matmul_persistent
    expected = matmul(x, weight.t(), bias)
    for num_rows in ROWS:
        output = gpu.in_order_linear(x[:num_rows], weight, bias)
        assert_equal(f"{num_rows} rows", output, expected[:num_rows])
        # By ours whether or not it is chosen.
        if num_rows <= 128:
            output = triton_kernels.few_rows_linear(x[:num_rows], weight, bias)
            assert_equal(f"{num_rows} rows", output, expected[:num_rows])
    if IS_CUDA:
        assert gpu.prove(16, weight, bias) is True


@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
def test_rows_do_not_depend_on_each_other(with_bias, dtype, assert_equal):
    out_features, in_features, _ = LAYERS[0]
    weight = numbers(out_features, in_features, dtype=dtype)
    bias = numbers(out_features, dtype=dtype) if with_bias else None
    x = numbers(150, in_features, dtype=dtype)
    together = gpu.in_order_linear(x, weight, bias)
    for first, end in [(0, 1), (149, 150), (3, 20), (50, 115), (1, 150)]:
        part = gpu.in_order_linear(x[first:end], weight, bias)
        assert_equal(f"{first} to {end}", part, together[first:end])


@pytest.mark.parametrize("x_shape", [(0, 8), (3, 0), (70, 0)])
def test_empty(x_shape):
    x = torch.zeros(x_shape, dtype=DTYPES[0], device=DEVICE)
    weight = torch.zeros(4, x_shape[1], dtype=DTYPES[0], device=DEVICE)
    bias = torch.tensor([1.0, 2.0, 3.0, 4.0], dtype=DTYPES[0], device=DEVICE)
    output = gpu.in_order_linear(x, weight, bias)
    assert torch.equal(output, bias.expand(x_shape[0], 4))


def test_any_strides_and_fp32(assert_equal):
    """What only vLLM's kernel takes."""
    x = integers(20, 40, dtype=torch.float32)
    weight = integers(24, 40, dtype=torch.float32)
    for dtype in (torch.float32, *DTYPES):
        for rows, layer in (
            (x.to(dtype), weight.to(dtype)),
            (x.to(dtype), weight.to(dtype).t().contiguous().t()),
            (x.to(dtype).t().contiguous().t(), weight.to(dtype)),
        ):
            output = gpu.in_order_linear(rows, layer, None)
            assert_equal(f"{dtype}", output, exact(rows, layer, None).to(dtype))
