# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""The choice among in-order products on CUDA, and a run of `linear_gpu_checks.py`.

What proves a kernel needs no GPU: here the kernels are plain torch.
"""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from vllm.model_executor.determinism.linear import gpu

CHECKS = Path(__file__).with_name("linear_gpu_checks.py")
BF16 = torch.bfloat16


def test_kernels():
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider"]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    if not torch.cuda.is_available():
        environment["TRITON_INTERPRET"] = "1"
    result = subprocess.run(
        [*command, str(CHECKS)],
        env=environment,
        capture_output=True,
        text=True,
        timeout=500,
    )
    report = result.stdout + result.stderr
    assert result.returncode == 0, report
    assert re.search(r"^[1-9]\d* passed\b(?!.*skipped)", result.stdout, re.M), report


def in_order(x, weight, bias=None):
    bias = None if bias is None else bias.double()
    return F.linear(x.double(), weight.double(), bias).to(x.dtype)


class Kernel:
    """A product that counts its calls."""

    def __init__(self, product=in_order):
        self.product = product
        self.calls = 0
        self.__name__ = "a_kernel"

    def __call__(self, x, weight, bias, output=None):
        self.calls += 1
        result = self.product(x, weight, bias)
        return result if output is None else output.copy_(result)


@pytest.fixture
def kernels(monkeypatch):
    """Kernels in the place of vLLM's, ours and cuBLASLt's, without verdicts yet."""
    torch.manual_seed(0)
    kernels = {"_reference": Kernel(), "few_rows_linear": Kernel()}
    kernels["cublaslt_linear"] = Kernel()
    for name, kernel in kernels.items():
        monkeypatch.setattr(gpu, name, kernel)
    monkeypatch.setattr(gpu, "_has_in_order_cublas", lambda device: True)
    monkeypatch.setattr(gpu, "_verdicts", {})

    def new_empty(self, *shape):
        return aligned(torch.empty(shape, dtype=self.dtype))

    monkeypatch.setattr(torch.Tensor, "new_empty", new_empty)
    return kernels


@pytest.fixture
def calls(kernels):
    """How often each kernel ran in a call of a function."""

    def count(function, *args):
        for kernel in kernels.values():
            kernel.calls = 0
        function(*args)
        return {name: kernel.calls for name, kernel in kernels.items() if kernel.calls}

    return count


@pytest.fixture
def weight():
    torch.manual_seed(1)
    return aligned(torch.randn(512, 32).to(BF16))


def rows(num_rows, dtype=BF16):
    return aligned(torch.randn(num_rows, 32).to(dtype))


def aligned(tensor):
    """In memory that is aligned like CUDA's, so that equal shapes are of one form."""
    memory = torch.empty(tensor.numel() + 128, dtype=tensor.dtype)
    first = -memory.data_ptr() % 256 // tensor.element_size()
    return memory[first : first + tensor.numel()].view(tensor.shape).copy_(tensor)


def off_by_one_unit(x, weight, bias=None):
    """Another rounding of a single element."""
    result = in_order(x, weight, bias)
    result.view(torch.int16)[-1, -1] += 1
    return result


def test_few_rows_are_ours_without_a_proof(kernels, calls, weight):
    for num_rows in (1, gpu.FEW_ROWS):
        used = calls(gpu.in_order_linear, rows(num_rows), weight, None)
        assert used == {"few_rows_linear": 1}
    assert gpu.verdicts() == {}


def test_cublaslt_is_used_once_it_is_proven(kernels, calls, weight):
    x = rows(100)
    first = calls(gpu.in_order_linear, x, weight, None)
    assert first["cublaslt_linear"] > 1
    assert first["_reference"] >= 1
    assert list(gpu.verdicts().values()) == [True]
    # Other numbers in the same form.
    used = calls(gpu.in_order_linear, x.neg_(), weight.mul_(3), None)
    assert used == {"cublaslt_linear": 1}


def test_sizes_of_pieces():
    """They cover all rows with little overlap, and are few over all numbers of rows."""
    sizes = set()
    for num_rows in range(gpu.EXACT_ROWS + 1, 40000):
        first, *others = gpu.row_pieces(num_rows)
        assert first.start == 0
        end = first.stop
        for piece in others:
            assert piece.start <= end and piece.stop - piece.start == first.stop
            end = piece.stop
        assert end == num_rows
        assert (1 + len(others)) * first.stop <= num_rows + max(128, num_rows // 32)
        sizes.add(first.stop)
    assert len(sizes) < 500
    assert [len(gpu.row_pieces(n)) for n in (1, 77, 512, 8192, 16384)] == [1] * 5


def test_many_rows_in_two_pieces(kernels, calls, weight):
    memory = rows(1101)
    x = memory[:1025]
    output = gpu.in_order_linear(x, weight, None)
    assert torch.equal(output, in_order(x, weight))
    assert calls(gpu.in_order_linear, x, weight, None) == {"cublaslt_linear": 2}
    # As many others are of no new form.
    known = gpu.verdicts()
    assert calls(gpu.in_order_linear, memory, weight, None) == {"cublaslt_linear": 2}
    assert gpu.verdicts() == known


def test_other_bits_are_refused(kernels, calls, weight):
    kernels["cublaslt_linear"].product = off_by_one_unit
    output = gpu.in_order_linear(x := rows(600), weight, None)
    assert torch.equal(output, in_order(x, weight))
    assert list(gpu.verdicts().values()) == [False]
    assert calls(gpu.in_order_linear, x, weight, None) == {"_reference": 1}


def test_rows_of_every_tile_are_compared(kernels, weight):
    """Of more rows than are compared: the last one, and each piece of 64."""
    assert gpu.prove(5000, weight) is True
    torch.set_default_dtype(BF16)  # as while an engine loads a model
    try:
        assert gpu.prove(5020, weight) is True
    finally:
        torch.set_default_dtype(torch.float32)
    kernels["cublaslt_linear"].product = off_by_one_unit
    assert gpu.prove(5001, weight) is False

    def off_in_a_tile(x, weight, bias=None):
        result = in_order(x, weight, bias)
        result.view(torch.int16)[1280:1344, -1] += 1
        return result

    kernels["cublaslt_linear"].product = off_in_a_tile
    assert gpu.prove(5002, weight) is False


def test_a_kernel_that_refuses_is_refused(kernels, calls, weight):
    def refuse(*args):
        raise RuntimeError("no kernel for this")

    kernels["cublaslt_linear"].product = refuse
    gpu.in_order_linear(x := rows(100), weight, None)
    assert list(gpu.verdicts().values()) == [False]
    assert calls(gpu.in_order_linear, x, weight, None) == {"_reference": 1}


def test_too_little_memory_is_no_verdict(kernels, weight):
    """And no error: vLLM's kernel needs less."""

    def fail(*args):
        raise torch.OutOfMemoryError("too little")

    kernels["cublaslt_linear"].product = fail
    output = gpu.in_order_linear(x := rows(100), weight, None)
    assert torch.equal(output, in_order(x, weight))
    assert gpu.verdicts() == {}


@pytest.mark.parametrize("value", [0.0, float("nan"), float("inf")])
def test_degenerate_weights_prove_nothing(value, kernels, calls, weight):
    degenerate = aligned(torch.full_like(weight, value))
    assert gpu.prove(100, degenerate) is None
    output = gpu.in_order_linear(x := rows(100), degenerate, None)
    expected = in_order(x, degenerate)
    assert torch.equal(output.view(torch.int16), expected.view(torch.int16))
    assert gpu.verdicts() == {}
    # The next time there may be numbers.
    gpu.in_order_linear(rows(100), degenerate.copy_(weight), None)
    assert list(gpu.verdicts().values()) == [True]


def test_every_form_is_proven_by_itself(kernels, weight):
    memory = aligned(torch.zeros(100, 40, dtype=BF16))
    bias = torch.zeros(512, dtype=BF16)
    wide = aligned(torch.zeros(512, 64, dtype=BF16))
    products = [
        (rows(100), weight, None),
        (rows(101), weight, None),
        (rows(100), weight, bias),
        (rows(100), weight, bias.float()),
        (rows(100), weight, bias[:1].expand(512)),
        (rows(100), weight[:-1], None),
        (memory[:, :32], weight, None),
        (memory[:, 8:], weight, None),
        (rows(100), wide[:, :32].copy_(weight), None),
        (rows(100, torch.float16), weight.half(), None),
    ]
    for done, product in enumerate(products, start=1):
        gpu.in_order_linear(*product)
        assert len(gpu.verdicts()) == done


def test_random_rows_have_the_form_of_x():
    generator = torch.Generator().manual_seed(0)
    memory = torch.zeros(20, 40, dtype=BF16)
    for x in (memory, memory[:, 8:], memory[1:, :3], memory[:1].expand(20, 40)):
        random = gpu._random_like(x, generator)
        assert (random.shape, random.stride()) == (x.shape, x.stride())
        assert gpu._alignment(random) == gpu._alignment(x)
        assert random.float().std() > 0.5


def test_a_proof_leaves_the_random_numbers_alone(kernels, weight):
    state = torch.get_rng_state()
    assert gpu.prove(100, weight)
    assert torch.equal(state, torch.get_rng_state())


def test_nothing_is_proven_in_a_graph(kernels, calls, weight, monkeypatch):
    monkeypatch.setattr(gpu, "_is_capturing", lambda x: True)
    assert calls(gpu.in_order_linear, rows(100), weight, None) == {"_reference": 1}
    assert gpu.prove(100, weight) is None
    monkeypatch.setattr(gpu, "_is_capturing", lambda x: False)
    gpu.in_order_linear(x := rows(100), weight, None)
    monkeypatch.setattr(gpu, "_is_capturing", lambda x: True)
    used = calls(gpu.in_order_linear, x, weight, None)
    assert used == {"cublaslt_linear": 1}


def test_the_rest_is_vllms(kernels, calls, weight, monkeypatch):
    alone = {"_reference": 1}
    x = rows(100)
    assert calls(gpu.in_order_linear, x.float(), weight.float(), None) == alone
    transposed = weight.t().contiguous().t()
    assert calls(gpu.in_order_linear, x[:3], transposed, None) == alone
    assert calls(gpu.in_order_linear, x.t().contiguous().t(), weight, None) == alone
    assert gpu.prove(3, transposed) is None
    monkeypatch.setattr(gpu, "_has_in_order_cublas", lambda device: False)
    assert calls(gpu.in_order_linear, x, weight, None) == alone


def test_few_rows_can_be_proven_too(kernels, weight):
    assert gpu.prove(3, weight) is True
    kernels["few_rows_linear"].product = off_by_one_unit
    assert gpu.prove(4, weight) is False


@pytest.mark.parametrize("fails", [False, True])
@pytest.mark.parametrize("dtype", [BF16, torch.float16])
def test_torch_settings_hold_for_the_call_only(dtype, fails, weight, monkeypatch):
    matmul = torch.backends.cuda.matmul
    chosen = ["cublas"]

    def library(backend=None):
        if backend is not None:
            chosen.append(backend)
        return chosen[-1]

    def settings():
        return (
            library(),
            matmul.allow_bf16_reduced_precision_reduction,
            matmul.allow_bf16_reduced_precision_reduction_split_k,
            matmul.allow_fp16_reduced_precision_reduction,
            matmul.allow_fp16_reduced_precision_reduction_split_k,
            matmul.allow_fp16_accumulation,
        )

    seen = []

    def multiply(*args, out):
        seen.append(settings())
        if fails:
            raise RuntimeError("failed")

    monkeypatch.setattr(torch.backends.cuda, "preferred_blas_library", library)
    monkeypatch.setattr(torch, "mm", multiply)
    matmul.allow_fp16_accumulation = True
    before = settings()
    try:
        gpu.cublaslt_linear(rows(2, dtype), weight.to(dtype), None, rows(2, dtype))
    except RuntimeError:
        assert fails
    assert settings() == before
    matmul.allow_fp16_accumulation = False
    none, both = (False, False), (True, True)
    expected = (*none, *both) if dtype == BF16 else (*both, *none)
    assert seen == [("cublaslt", *expected, False)]
