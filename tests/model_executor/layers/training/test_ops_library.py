# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""How ops are defined."""

import pytest
import torch

from vllm.model_executor import op_library as library


def _setup_context(ctx, inputs, output):
    x, ctx.factor = inputs
    ctx.save_for_backward(x)


def _backward(ctx, grad):
    assert ctx.needs_input_grad == (True, False)
    (x,) = ctx.saved_tensors
    return 2 * ctx.factor * x * grad, None


def _square(x, factor):
    return factor * x * x


@pytest.fixture(scope="module")
def square():
    return library.define_op(
        "square_for_tests(Tensor x, float factor) -> Tensor",
        fake=lambda x, factor: torch.empty_like(x),
        cpu=_square,
        cuda=_square,
        setup_context=_setup_context,
        backward=_backward,
    )


def test_an_op_is_differentiable(square, device):
    x = torch.randn(3, dtype=torch.float64, device=device, requires_grad=True)
    assert torch.autograd.gradcheck(square, (x, 3.0))
    torch.library.opcheck(square, (x, 3.0))
    with torch.no_grad():
        assert not square(x, 3.0).requires_grad
    with torch.inference_mode():
        assert square(x, 3.0).is_inference()
    assert square(x.detach(), 3.0).grad_fn is None


def test_an_op_is_compiled_with_its_backward(square, device):
    x = torch.randn(3, device=device, requires_grad=True)
    compiled = torch.compile(square, fullgraph=True, backend="aot_eager")
    (grad,) = torch.autograd.grad(compiled(x, 3.0).sum(), x)
    assert torch.equal(grad, 2 * 3.0 * x.detach())


def test_an_extension_of_other_sources_is_refused(monkeypatch):
    monkeypatch.setattr(library, "HAS_CPU_KERNELS", True)
    with pytest.raises(
        ImportError, match="no CPU kernel for vllm_training::missing_for.*pip install"
    ):
        library.define_op("missing_for_tests(Tensor x) -> Tensor", fake=lambda x: x)
