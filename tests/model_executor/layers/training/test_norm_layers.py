# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""RMSNorm and LayerNorm; `test_norm.py` tests the ops under them."""

import pytest
import torch

from vllm.model_executor.layers.training import LayerNorm, RMSNorm


def layers(device, single):
    torch.manual_seed(0)
    for layer in (
        RMSNorm(24, parallel_context=single),
        LayerNorm(24, parallel_context=single),
        LayerNorm(24, bias=False, parallel_context=single),
        LayerNorm(24, elementwise_affine=False, parallel_context=single),
    ):
        for parameter in layer.parameters():
            torch.nn.init.normal_(parameter)
        yield layer.to(device)


@pytest.mark.parametrize("index", [0, 1, 3])
def test_compiled_without_graph_breaks(index, device, single, assert_equal):
    layer = list(layers(device, single))[index]
    arguments = 2 if isinstance(layer, RMSNorm) else 1
    torch._dynamo.reset()
    compiled = torch.compile(layer, fullgraph=True, dynamic=True)
    for rows in (5, 63):
        x = torch.randn(arguments, rows, 24, device=device, requires_grad=True)
        with torch.inference_mode():
            for a, b in zip(compiled(*x), layer(*x)):
                assert_equal("inference", a, b)
        outcomes = []
        for function in (compiled, layer):
            outputs = function(*x)
            outputs = outputs if isinstance(outputs, tuple) else (outputs,)
            total = sum(output.square().sum() for output in outputs)
            leaves = [x, *layer.parameters()]
            outcomes.append([*outputs, *torch.autograd.grad(total, leaves)])
        for a, b in zip(*outcomes, strict=True):
            assert_equal("training", a, b)


def test_layer_norm_has_the_parameters_it_is_asked_for(single):
    names = [sorted(dict(layer.named_parameters())) for layer in layers("cpu", single)]
    assert names == [["weight"], ["bias", "weight"], ["weight"], []]
    layer = LayerNorm(8, params_dtype=torch.bfloat16, parallel_context=single)
    assert layer.weight.dtype == layer.bias.dtype == torch.bfloat16
    assert layer.weight.eq(1).all() and layer.bias.eq(0).all()
    assert set(layer.parameter_sharding()) == {"weight", "bias"}
    assert layer(torch.empty(2, 3, 8, dtype=torch.bfloat16)).shape == (2, 3, 8)


def test_layers_refuse_bad_input(single):
    for layer in (
        RMSNorm(8, parallel_context=single),
        LayerNorm(8, elementwise_affine=False, parallel_context=single),
    ):
        with pytest.raises(ValueError, match=r"shape \(2, 7\).*hidden_size=8"):
            layer(torch.zeros(2, 7))
        with pytest.raises(
            ValueError, match="params_dtype=torch.int8 is not supported"
        ):
            type(layer)(8, params_dtype=torch.int8, parallel_context=single)
    with pytest.raises(ValueError, match=r"residual: torch.float32 \(1, 8\)"):
        RMSNorm(8, parallel_context=single)(torch.zeros(2, 8), torch.zeros(1, 8))
