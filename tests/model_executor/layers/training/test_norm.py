# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""RMS and layer normalisation: the ops and their backward."""

import pytest
import torch

from vllm import ir
from vllm.model_executor.layers.training.ops.norm import layer_norm as layer_norm_op
from vllm.model_executor.layers.training.ops.norm import op
from vllm.model_executor.layers.training.ops.norm.layer_norm import layer_norm
from vllm.model_executor.layers.training.ops.norm.op import (
    fused_add_rms_norm,
    rms_norm,
)
from vllm.model_executor.layers.training.ops.norm.reference import (
    fused_add_rms_norm_reference,
    layer_norm_reference,
    rms_norm_reference,
)

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
EPS = 1e-5

# function, reference, how many inputs of x's shape, how many of the weight's, names of
# the results and gradients
FORMS = {
    "rms_norm": (rms_norm, rms_norm_reference, 1, 1, "y dx dweight"),
    "fused_add_rms_norm": (
        fused_add_rms_norm,
        fused_add_rms_norm_reference,
        2,
        1,
        "y sum dx dresidual dweight",
    ),
    "layer_norm": (layer_norm, layer_norm_reference, 1, 2, "y dx dweight dbias"),
}


@pytest.fixture(params=FORMS)
def form(request):
    return FORMS[request.param]


def make_inputs(form, shape, device, dtype, weight_dtype=None):
    """Inputs, and gradients of the results."""
    _, _, num_inputs, num_parameters, _ = form
    torch.manual_seed(0)
    inputs = [torch.randn(shape, device=device).to(dtype) for _ in range(num_inputs)]
    for _ in range(num_parameters):
        parameter = torch.randn(shape[-1], device=device)
        inputs.append(parameter.to(weight_dtype or dtype))
    grads = [torch.randn(shape, device=device).to(dtype) for _ in range(num_inputs)]
    return inputs, grads


def results(function, inputs, grads):
    """Outputs and gradients."""
    leaves = [x.detach().requires_grad_() for x in inputs]
    outputs = function(*leaves, EPS)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    outputs_and_grads = [*outputs, *torch.autograd.grad(outputs, leaves, grads)]
    return [tensor.detach() for tensor in outputs_and_grads]


def doubles(tensors):
    return [tensor.double() for tensor in tensors]


def test_references_pass_gradcheck(form, device):
    function, reference, *_ = form
    inputs, _ = make_inputs(form, (5, 8), device, torch.float64)
    inputs = [x.requires_grad_() for x in inputs]
    for checked in (function, reference):
        assert torch.autograd.gradcheck(lambda *x, f=checked: f(*x, EPS), inputs)


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_reference_has_the_bits_of_vllms_native_op(dtype, assert_equal):
    torch.manual_seed(0)
    x = torch.randn(63, 96).to(dtype)
    weight = torch.randn(96).to(dtype)
    native = ir.ops.rms_norm.impls["native"].impl_fn(x, weight, EPS)
    assert_equal("rms_norm", rms_norm_reference(x, weight, EPS), native)


@pytest.mark.parametrize("shape", [(1, 5), (5, 63), (123, 96), (3, 2048), (7, 4096)])
@pytest.mark.parametrize("weight_dtype", DTYPES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_fused_has_the_bits_of_adding_and_normalising(
    dtype, weight_dtype, shape, device, assert_equal
):
    form = FORMS["fused_add_rms_norm"]
    inputs, grads = make_inputs(form, shape, device, dtype, weight_dtype)

    def one_by_one(x, residual, weight, eps):
        total = x + residual
        return rms_norm(total, weight, eps), total

    for what, a, b in zip(
        ("output", "sum"),
        results(fused_add_rms_norm, inputs, grads),
        results(one_by_one, inputs, grads),
    ):
        assert_equal(what, a, b)


@pytest.mark.parametrize(
    "shape", [(1, 5), (5, 63), (63, 5), (123, 96), (2, 3, 123), (17, 2048), (1500, 8)]
)
@pytest.mark.parametrize("dtype", DTYPES)
def test_results_and_gradients_are_accurate(
    form, dtype, shape, device, assert_as_accurate
):
    function, reference, _, _, names = form
    inputs, grads = make_inputs(form, shape, device, dtype)
    for what, *tensors in zip(
        names.split(),
        results(function, inputs, grads),
        results(reference, inputs, grads),
        results(reference, doubles(inputs), doubles(grads)),
        strict=True,
    ):
        assert_as_accurate(what, *tensors)


@pytest.mark.parametrize("weight_dtype", DTYPES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_parameters_of_another_dtype(
    form, dtype, weight_dtype, device, assert_as_accurate
):
    function, reference, num_inputs, num_parameters, names = form
    inputs, grads = make_inputs(form, (63, 123), device, dtype, weight_dtype)
    dtypes = [dtype] * (2 * num_inputs) + [weight_dtype] * num_parameters

    def plain(*inputs):
        if function is not layer_norm:  # torch's takes no mixture
            return reference(*inputs)
        *tensors, eps = inputs
        return reference(*(x.float() for x in tensors), eps).to(dtype)

    for what, expected_dtype, *tensors in zip(
        names.split(),
        dtypes,
        results(function, inputs, grads),
        results(plain, inputs, grads),
        results(reference, doubles(inputs), doubles(grads)),
        strict=True,
    ):
        assert tensors[0].dtype == expected_dtype, what
        assert_as_accurate(what, *tensors)


@pytest.mark.parametrize("residual_dtype", [*DTYPES, torch.float64])
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_residual_of_another_dtype_is_added_unrounded(
    dtype, residual_dtype, device, assert_equal
):
    x = torch.ones(3, 8, device=device, dtype=dtype)
    residual = torch.full_like(x, 2**-12, dtype=residual_dtype)
    weight = torch.ones(8, device=device, dtype=dtype)
    y, total = fused_add_rms_norm(x, residual, weight, EPS)
    assert y.dtype == dtype
    assert_equal("sum", total, (x.double() + residual.double()).to(dtype))


@pytest.mark.parametrize("weight_dtype", DTYPES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_roundings_are_in_the_specified_order(
    dtype, weight_dtype, device, assert_equal
):
    torch.manual_seed(0)
    # The mean of the squares is 4, so n is 1 or -1: only n weight is rounded.
    x = torch.tensor([[2.0, -2.0] * 32], device=device).to(dtype)
    weight = torch.randn(64, device=device).to(weight_dtype)
    expected = (x / 2).to(weight_dtype) * weight
    assert_equal("n weight", rms_norm(x, weight, 0.0), expected.to(dtype))
    x = torch.randn(63, 64, device=device).to(dtype)
    actual, expected = rms_norm(x, weight, EPS), rms_norm_reference(x, weight, EPS)
    eps = max(torch.finfo(dtype).eps, torch.finfo(weight_dtype).eps)
    torch.testing.assert_close(actual, expected, rtol=4 * eps, atol=0)
    # A last bit of n in fp32 changes its rounding to 16 bits now and then.
    if weight_dtype != torch.float32:
        assert (actual == expected).double().mean() > 0.99


@pytest.mark.parametrize("dtype", DTYPES)
def test_strided_tensors(form, dtype, device, assert_equal):
    function, _, num_inputs, num_parameters, names = form
    torch.manual_seed(0)
    wide = torch.randn(8, 3, 100, device=device).to(dtype)
    parameters = [wide[0, i, ::2][:40] for i in range(num_parameters)]
    for layout, x in (
        ("rows apart", wide[:, 1, :40]),
        ("last dim strided", wide[..., ::2][..., :40]),
        ("transposed", wide.transpose(0, 2)[:40].transpose(0, 2)),
        ("one row expanded", wide[0, :1, :40].expand(7, 40)),
    ):
        inputs = [x] * num_inputs + parameters
        grads = [x.flip(0), x.roll(1)[..., :1].expand(x.shape)][:num_inputs]
        expected = results(
            function, [t.contiguous() for t in inputs], [t.contiguous() for t in grads]
        )
        for what, a, b in zip(
            names.split(), results(function, inputs, grads), expected
        ):
            assert_equal(f"{layout}: {what}", a, b)


@pytest.mark.parametrize("shape", [(0, 8), (2, 0, 8), (3, 0), (8,)])
def test_empty_and_one_dimensional_tensors(form, shape, device):
    function, _, num_inputs, _, _ = form
    inputs, grads = make_inputs(form, shape, device, torch.float32)
    outcome = results(function, inputs, grads)
    outputs, gradients = outcome[:num_inputs], outcome[num_inputs:]
    assert all(output.shape == shape for output in outputs)
    for gradient, tensor in zip(gradients, inputs, strict=True):
        assert gradient.shape == tensor.shape
        if 0 in shape:
            assert not gradient.any()


@pytest.mark.parametrize("used", [0, 1])
def test_a_result_may_be_unused(used, device, assert_as_accurate):
    form = FORMS["fused_add_rms_norm"]
    inputs, grads = make_inputs(form, (5, 24), device, torch.float32)

    def outcome(function, inputs, grad):
        leaves = [x.detach().requires_grad_() for x in inputs]
        output = function(*leaves, EPS)[used]
        dx, dresidual, dweight = torch.autograd.grad(
            output, leaves, grad, materialize_grads=True
        )
        return output.detach(), dx, dresidual, dweight

    for what, *tensors in zip(
        ("output", "dx", "dresidual", "dweight"),
        outcome(fused_add_rms_norm, inputs, grads[0]),
        outcome(fused_add_rms_norm_reference, inputs, grads[0]),
        outcome(fused_add_rms_norm_reference, doubles(inputs), grads[0].double()),
    ):
        assert_as_accurate(what, *tensors)


@pytest.mark.parametrize("parameters", [(None, None), ("weight", None)])
def test_layer_norm_without_parameters(parameters, device, assert_as_accurate):
    form = FORMS["layer_norm"]
    (x, weight, _), grads = make_inputs(form, (5, 24), device, torch.float32)
    inputs = [x] if parameters[0] is None else [x, weight]

    def of(function):
        def call(x, *rest):
            *weight, eps = rest
            return function(x, weight[0] if weight else None, None, eps)

        return call

    for what, *tensors in zip(
        ("y", "dx", "dweight"),
        results(of(layer_norm), inputs, grads),
        results(of(layer_norm_reference), inputs, grads),
        results(of(layer_norm_reference), doubles(inputs), doubles(grads)),
    ):
        assert_as_accurate(what, *tensors)


@pytest.mark.parametrize("dtype", DTYPES)
def test_opcheck(dtype, device):
    x, residual = (torch.randn(5, 12, device=device).to(dtype) for _ in range(2))
    weight = torch.randn(12, device=device).to(dtype)
    rstd = torch.rand(5, device=device)
    torch.library.opcheck(op._rms_norm_backward, (x, None, residual, weight, rstd))
    torch.library.opcheck(op._rms_norm_backward, (x, x, residual, weight, rstd))
    _, mean, inverse = layer_norm_op._layer_norm(x, weight, weight, EPS)
    for parameters in ((weight, weight), (weight, None), (None, None)):
        backward = layer_norm_op._layer_norm_backward
        torch.library.opcheck(backward, (x, residual, mean, inverse, *parameters))
    for tensor in (x, residual, weight):
        tensor.requires_grad_()
    torch.library.opcheck(op._rms_norm, (x, weight, EPS))
    torch.library.opcheck(op._fused_add_rms_norm, (x, residual, weight, EPS))
    for parameters in ((weight, weight), (weight, None), (None, None)):
        torch.library.opcheck(layer_norm_op._layer_norm, (x, *parameters, EPS))


@pytest.mark.parametrize("shape", [(5, 1), (37, 7), (5, 64), (130, 1023)])
def test_every_element_is_written(form, shape, device, monkeypatch):
    function, *_ = form
    inputs, grads = make_inputs(form, shape, device, torch.float32)
    monkeypatch.setattr(torch.utils.deterministic, "fill_uninitialized_memory", True)
    torch.use_deterministic_algorithms(True)
    try:
        assert torch.empty(3, device=device).isnan().all()
        tensors = results(function, inputs, grads)
    finally:
        torch.use_deterministic_algorithms(False)
    assert not any(tensor.isnan().any() for tensor in tensors)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("dtype", DTYPES)
def test_nan_and_infinity_propagate_as_in_torch(form, dtype, value, device):
    function, reference, *_ = form
    for where in range(form[2] + form[3]):
        inputs, grads = make_inputs(form, (5, 24), device, dtype)
        inputs[where].flatten()[7] = value
        for a, b in zip(
            results(function, inputs, grads), results(reference, inputs, grads)
        ):
            assert torch.equal(a.isnan(), b.isnan())
            assert torch.equal(a.isinf(), b.isinf())


@pytest.mark.parametrize("hidden_size", [5, 64, 123, 1000])
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_row_does_not_depend_on_others(
    form, dtype, hidden_size, device, assert_equal
):
    function, _, num_inputs, _, names = form
    inputs, grads = make_inputs(form, (123, hidden_size), device, dtype)
    whole = results(function, inputs, grads)[: 2 * num_inputs]  # those with rows
    for rows in (slice(0, 1), slice(7, 8), slice(11, 74), slice(122, 123)):
        some = [x[rows] for x in inputs[:num_inputs]] + inputs[num_inputs:]
        alone = results(function, some, [grad[rows] for grad in grads])
        for what, a, b in zip(names.split(), alone, whole):
            assert_equal(f"{what} of {rows}", a, b[rows])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(5, 96), (123, 1000), (2000, 64)])
def test_threads_do_not_matter(form, shape, dtype, assert_equal):
    function, _, num_inputs, _, names = form
    inputs, grads = make_inputs(form, shape, "cpu", dtype)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        one = results(function, inputs, grads)
        torch.set_num_threads(2)
        two = results(function, inputs, grads)
    finally:
        torch.set_num_threads(threads)
    # torch sums the gradients of layer norm's parameters in one piece for each thread.
    count = 2 if function is layer_norm else None
    for what, a, b in list(zip(names.split(), two, one, strict=True))[:count]:
        assert_equal(what, a, b)


def test_gradients_are_the_same_in_every_run(form, device, assert_equal):
    function, _, _, _, names = form
    inputs, grads = make_inputs(form, (777, 96), device, torch.bfloat16)
    first = results(function, inputs, grads)
    for _ in range(3):
        for what, a, b in zip(names.split(), results(function, inputs, grads), first):
            assert_equal(what, a, b)


def test_meta_tensors_have_the_shape(form):
    inputs, _ = make_inputs(form, (3, 8), "meta", torch.bfloat16)
    outputs = form[0](*inputs, EPS)
    for output in outputs if isinstance(outputs, tuple) else (outputs,):
        assert (output.shape, output.dtype) == ((3, 8), torch.bfloat16)


def test_bad_input_is_refused(form):
    function, _, num_inputs, num_parameters, _ = form
    inputs, _ = make_inputs(form, (3, 8), "cpu", torch.float32)
    for where in range(num_inputs + num_parameters):
        for bad in (
            inputs[where][..., :7],
            inputs[where].long(),
            inputs[where].to("meta"),
        ):
            arguments = [*inputs[:where], bad, *inputs[where + 1 :], EPS]
            with pytest.raises(ValueError, match=f"{function.__name__} got x: torch"):
                function(*arguments)
    with pytest.raises(ValueError, match=r"\(\) on cpu.* It takes x \[..., hidden"):
        function(*(torch.tensor(1.0) for _ in inputs), EPS)
