# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""Activations: ops, layers, and their backward."""

import pytest
import torch
import torch.nn.functional as F

from vllm.config import VllmConfig, set_current_vllm_config
from vllm.model_executor.layers import activation as engine
from vllm.model_executor.layers.training import Gelu, GeluAndMul, SiluAndMul
from vllm.model_executor.layers.training.ops.activation import gelu as gelu_op
from vllm.model_executor.layers.training.ops.activation import op
from vllm.model_executor.layers.training.ops.activation.reference import (
    gelu_and_mul_reference,
    silu_and_mul_reference,
)

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
# layer, reference, op, backward op, further arguments
FORMS = {
    "silu": (SiluAndMul, silu_and_mul_reference, "silu_and_mul", ()),
    "gelu": (GeluAndMul, gelu_and_mul_reference, "gelu_and_mul", (False,)),
    "gelu_tanh": (GeluAndMul, gelu_and_mul_reference, "gelu_and_mul", (True,)),
}


@pytest.fixture(params=FORMS)
def form(request):
    return FORMS[request.param]


def layer_of(form):
    layer, _, _, options = form
    if layer is SiluAndMul:
        return layer()
    return layer("tanh" if options[0] else "none")


def results(function, x, grad):
    """The output and the gradient."""
    x = x.detach().requires_grad_()
    output = function(x)
    return output.detach(), *torch.autograd.grad(output, x, grad)


def test_references_pass_gradcheck(form):
    _, reference, _, options = form
    torch.manual_seed(0)
    x = torch.randn(3, 10, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: reference(x, *options), (x,))
    assert torch.autograd.gradcheck(layer_of(form), (x,))


@pytest.mark.parametrize("dtype", DTYPES)
def test_references_have_the_bits_of_vllms_native_ops(form, dtype, assert_equal):
    _, reference, _, options = form
    x = torch.randn(63, 96).to(dtype)
    with set_current_vllm_config(VllmConfig()):
        if options:
            native = engine.GeluAndMul("tanh" if options[0] else "none")
        else:
            native = engine.SiluAndMul()
        expected = native.forward_native(x)
    assert_equal("output", reference(x, *options), expected)


@pytest.mark.parametrize("shape", [(1, 2), (5, 10), (63, 126), (3, 7, 246), (2, 4096)])
@pytest.mark.parametrize("dtype", DTYPES)
def test_results_and_gradients_are_accurate(
    form, dtype, shape, device, assert_as_accurate
):
    _, reference, _, options = form
    torch.manual_seed(0)
    x = (3 * torch.randn(shape)).to(device, dtype)
    grad = torch.randn(*shape[:-1], shape[-1] // 2).to(device, dtype)

    def plain(x):
        return reference(x, *options)

    for what, *tensors in zip(
        ("output", "gradient"),
        results(layer_of(form), x, grad),
        results(plain, x, grad),
        results(plain, x.double(), grad.double()),
    ):
        assert_as_accurate(what, *tensors)


@pytest.mark.parametrize("dtype", DTYPES)
def test_strided_tensors(form, dtype, device, assert_equal):
    torch.manual_seed(0)
    layer = layer_of(form)
    whole = torch.randn(8, 3, 100, device=device).to(dtype)
    grad = torch.randn(20, 3, 8, device=device).to(dtype)
    for name, x, g in (
        ("rows apart", whole[:, 1, :46], grad[:8, :, 0].repeat(1, 8)[:, :23]),
        ("last dim strided", whole[..., ::2], grad[:8, :, :1].expand(8, 3, 25)),
        ("transposed", whole.transpose(0, 2)[:, :, :6], grad[..., 1:4].repeat(5, 1, 1)),
        ("one row expanded", whole[0, :1].expand(8, 100), grad[0, 0, 0].expand(8, 50)),
    ):
        expected = results(layer, x.contiguous(), g.contiguous())
        for what, a, b in zip(("output", "gradient"), results(layer, x, g), expected):
            assert_equal(f"{name}: {what}", a, b)


@pytest.mark.parametrize("shape", [(1, 1), (5, 7), (63, 64), (3, 7, 123), (4,), (0, 8)])
@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64])
def test_two_tensors_have_the_bits_of_one(form, dtype, shape, device, assert_equal):
    torch.manual_seed(0)
    layer = layer_of(form)
    gate, up, grad = ((3 * torch.randn(shape)).to(device, dtype) for _ in range(3))
    both = torch.cat((gate, up), -1)
    output, grad_x = results(layer, both, grad)
    # Also as columns of a wider matrix, and with a last dim that is strided.
    strided = [x.repeat_interleave(2, -1)[..., ::2] for x in (gate, up)]
    for pair in ((gate, up), both.chunk(2, -1), strided):
        leaves = [x.detach().requires_grad_() for x in pair]
        actual = layer(*leaves)
        assert_equal("output", actual.detach(), output)
        grads = torch.autograd.grad(actual, leaves, grad)
        assert_equal("gradient", torch.cat(grads, -1), grad_x)


def test_two_tensors_that_differ_are_refused(form, device):
    layer, gate = layer_of(form), torch.randn(3, 4, device=device)
    for up in (gate[:1], gate[:, :1], gate.bfloat16(), gate.to("meta")):
        with pytest.raises(ValueError, match="gate: torch.*must have one shape"):
            layer(gate, up)
    with pytest.raises(ValueError, match="floating-point dtype"):
        layer(gate.int(), gate.int())


@pytest.mark.parametrize("shape", [(0, 8), (3, 0), (2, 0, 6), (0,)])
def test_empty_tensors(form, shape, device):
    x = torch.zeros(shape, device=device, requires_grad=True)
    output = layer_of(form)(x)
    assert output.shape == (*shape[:-1], shape[-1] // 2)
    output.sum().backward()
    assert x.grad.shape == x.shape


@pytest.mark.parametrize("dtype", DTYPES)
def test_opcheck(form, dtype, device):
    _, _, name, options = form
    x = torch.randn(5, 12, device=device).to(dtype)
    forward, backward = getattr(op, f"_{name}"), getattr(op, f"_{name}_backward")
    torch.library.opcheck(forward, (x.requires_grad_(), *options))
    torch.library.opcheck(backward, (x[:, :6].detach(), x.detach(), *options))
    kind = "silu" if not options else "gelu_tanh" if options[0] else "gelu"
    pair = [torch.randn(5, 12, device=device).to(dtype) for _ in range(2)]
    torch.library.opcheck(op._activation_and_mul_backward, (pair[0], *pair, kind))
    pair = [x.requires_grad_() for x in pair]
    torch.library.opcheck(op._activation_and_mul, (*pair, kind))


@pytest.mark.parametrize("size", [1, 7, 64, 1023])
def test_every_element_is_written(form, size, device, monkeypatch):
    x = torch.randn(5, 2 * size, device=device)
    grad = torch.randn(5, size, device=device)
    monkeypatch.setattr(torch.utils.deterministic, "fill_uninitialized_memory", True)
    torch.use_deterministic_algorithms(True)
    try:
        assert torch.empty(3, device=device).isnan().all()
        outputs = results(layer_of(form), x, grad)
    finally:
        torch.use_deterministic_algorithms(False)
    assert not any(tensor.isnan().any() for tensor in outputs)


@pytest.mark.parametrize("dtype", DTYPES)
def test_nan_and_infinity_propagate_as_in_torch(form, dtype, device):
    _, reference, _, options = form
    inf, nan = float("inf"), float("nan")
    values = torch.tensor([nan, inf, -inf, 0.0, -0.0, 1.0, -1.0, 3.0, -3.0, 1e4])
    x = torch.cartesian_prod(values, values).T.flatten().to(device, dtype)
    grad = torch.ones(len(values) ** 2, device=device, dtype=dtype)
    actual = results(layer_of(form), x, grad)
    # In fp64: torch's fp32 gelu of infinity is NaN with AVX-512.
    expected = results(lambda x: reference(x, *options), x.double(), grad.double())
    for a, b in zip(actual, (each.to(dtype) for each in expected)):
        assert torch.equal(a.isnan(), b.isnan())
        assert torch.equal(a.isposinf(), b.isposinf())
        assert torch.equal(a.isneginf(), b.isneginf())


@pytest.mark.parametrize("size", [5, 64, 1000])
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_row_does_not_depend_on_others(form, dtype, size, device, assert_equal):
    torch.manual_seed(0)
    layer = layer_of(form)
    x = torch.randn(123, 2 * size, device=device).to(dtype)
    grad = torch.randn(123, size, device=device).to(dtype)
    whole = results(layer, x, grad)
    for rows in (slice(0, 1), slice(7, 8), slice(11, 74), slice(122, 123)):
        alone = results(layer, x[rows], grad[rows])
        for what, a, b in zip(("output", "gradient"), alone, whole):
            assert_equal(f"{what} of {rows}", a, b[rows])


def test_threads_do_not_matter(form, assert_equal):
    torch.manual_seed(0)
    layer = layer_of(form)
    x, grad = torch.randn(200, 2000), torch.randn(200, 1000)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        one = results(layer, x, grad)
        torch.set_num_threads(2)
        two = results(layer, x, grad)
    finally:
        torch.set_num_threads(threads)
    for what, a, b in zip(("output", "gradient"), two, one):
        assert_equal(what, a, b)


def test_compiled_without_graph_breaks(form, device, assert_equal):
    layer = layer_of(form)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager", dynamic=True)
    for rows in (5, 63):
        x, grad = torch.randn(rows, 24, device=device), torch.randn(12, device=device)
        grad = grad.expand(rows, 12)
        for a, b in zip(results(compiled, x, grad), results(layer, x, grad)):
            assert_equal("compiled", a, b)
        with torch.inference_mode():
            assert_equal("inference", compiled(x), layer(x))


def test_meta_tensors_have_the_shape(form):
    assert layer_of(form)(torch.empty(3, 8, device="meta")).shape == (3, 4)


def test_bad_input_is_refused(form):
    layer = layer_of(form)
    with pytest.raises(ValueError, match=r"_and_mul got.*shape \(2, 7\).*must be even"):
        layer(torch.zeros(2, 7))
    with pytest.raises(ValueError, match="torch.int64; .*floating-point"):
        layer(torch.zeros(2, 8, dtype=torch.int64))
    with pytest.raises(ValueError, match=r"shape \(\)"):
        layer(torch.tensor(1.0))
    with pytest.raises(
        ValueError, match="approximate='erf'; it takes 'none' or 'tanh'"
    ):
        GeluAndMul("erf")


each_gelu = pytest.mark.parametrize("approximate", ["none", "tanh"])
each_dtype = pytest.mark.parametrize("dtype", DTYPES)


@pytest.fixture
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.mark.usefixtures("one_thread")  # torch's bits depend on their number
@each_gelu
@each_dtype
@pytest.mark.parametrize("shape", [(64,), (5, 64), (3, 7, 128), (128, 3072), (0, 8)])
def test_gelu_has_the_bits_of_torch(approximate, dtype, shape, device, assert_equal):
    torch.manual_seed(0)
    x = (3 * torch.randn(shape)).to(device, dtype)
    grad = torch.randn(shape).to(device, dtype)
    expected = results(lambda x: F.gelu(x, approximate=approximate), x, grad)
    for what, a, b in zip(
        ("output", "gradient"), results(Gelu(approximate), x, grad), expected
    ):
        assert_equal(what, a, b)
    with torch.inference_mode():
        assert_equal("inference", Gelu(approximate)(x), expected[0])


@each_gelu
@each_dtype
@pytest.mark.parametrize("shape", [(), (1,), (5, 7), (3, 1001)])
def test_gelu_of_any_shape_is_accurate(
    approximate, dtype, shape, device, assert_as_accurate
):
    torch.manual_seed(0)
    x = (3 * torch.randn(shape)).to(device, dtype)
    grad = torch.randn(shape).to(device, dtype)

    def plain(x):
        return F.gelu(x, approximate=approximate)

    for what, *tensors in zip(
        ("output", "gradient"),
        results(Gelu(approximate), x, grad),
        results(plain, x, grad),
        results(plain, x.double(), grad.double()),
    ):
        assert_as_accurate(what, *tensors)


@each_gelu
@each_dtype
@pytest.mark.parametrize("size", [1, 5, 64, 1000])
def test_a_row_of_gelu_does_not_depend_on_others(
    approximate, dtype, size, device, assert_equal
):
    torch.manual_seed(0)
    layer = Gelu(approximate)
    x = torch.randn(123, size, device=device).to(dtype)
    grad = torch.randn(123, size, device=device).to(dtype)
    whole = results(layer, x, grad)
    apart = torch.stack([x, grad], -1)  # rows strided
    strided = results(layer, apart[..., 0], apart[..., 1])
    for what, a, b in zip(("output", "gradient"), strided, whole):
        assert_equal(f"strided {what}", a, b)
    for rows in (slice(0, 1), slice(7, 8), slice(11, 74), slice(122, 123)):
        alone = results(layer, x[rows], grad[rows])
        for what, a, b in zip(("output", "gradient"), alone, whole):
            assert_equal(f"{what} of {rows}", a, b[rows])


@pytest.mark.usefixtures("one_thread")
@each_gelu
@each_dtype
@pytest.mark.parametrize("size", [16385, 32769, 98304, 200207])
def test_gelu_does_not_depend_on_threads(approximate, dtype, size, assert_equal):
    """Plain torch does: it computes the end of each thread's part otherwise."""
    torch.manual_seed(0)
    layer = Gelu(approximate)
    x, grad = (3 * torch.randn(size)).to(dtype), torch.randn(size).to(dtype)
    one = results(layer, x, grad)
    for count in (2, 3, 5, 7):
        torch.set_num_threads(count)
        for what, a, b in zip(("output", "gradient"), results(layer, x, grad), one):
            assert_equal(f"{what} by {count} threads", a, b)


@each_gelu
@each_dtype
def test_opcheck_of_gelu(approximate, dtype, device):
    tanh = approximate == "tanh"
    x = torch.randn(5, 12, device=device).to(dtype)
    for each in (x, x.T):
        torch.library.opcheck(gelu_op._gelu, (each.requires_grad_(), tanh))
        x = each.detach()
        torch.library.opcheck(gelu_op._gelu_backward, (x.flip(0), x, tanh))


@each_gelu
@each_dtype
def test_compiled_gelu_has_the_bits_of_eager(approximate, dtype, device, assert_equal):
    """By the default compiler, whose own GELU has others in fp32."""
    layer = Gelu(approximate)
    torch._dynamo.reset()
    compiled = torch.compile(layer, fullgraph=True, dynamic=True)
    for rows in (5, 63):
        x, grad = (torch.randn(rows, 24, device=device).to(dtype) for _ in range(2))
        for a, b in zip(results(compiled, x, grad), results(layer, x, grad)):
            assert_equal("compiled", a, b)
        with torch.inference_mode():
            assert_equal("inference", compiled(x), layer(x))


@each_gelu
def test_gelu_in_fp64_and_on_meta_is_plain_torch(approximate, assert_equal):
    layer = Gelu(approximate)
    x = torch.randn(3, 10, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(layer, (x,))
    assert torch.autograd.gradgradcheck(layer, (x,))
    assert_equal("output", layer(x), F.gelu(x, approximate=approximate))
    assert layer(torch.empty(3, 8, device="meta")).shape == (3, 8)


@each_gelu
@each_dtype
def test_gelu_keeps_its_dtype_under_autocast(approximate, dtype, device, assert_equal):
    torch.manual_seed(0)
    layer = Gelu(approximate)
    x, grad = (torch.randn(5, 24, device=device).to(dtype) for _ in range(2))
    expected = results(layer, x, grad)
    with torch.autocast(device.type, torch.bfloat16):
        actual = results(layer, x, grad)
    for what, a, b in zip(("output", "gradient"), actual, expected):
        assert_equal(what, a, b)


def test_gelu_refuses_bad_input():
    with pytest.raises(
        ValueError, match="Gelu got approximate='erf'; it takes 'none' or 'tanh'"
    ):
        Gelu("erf")
    with pytest.raises(ValueError, match="dtype torch.int64; .*floating-point"):
        Gelu()(torch.zeros(2, 8, dtype=torch.int64))
