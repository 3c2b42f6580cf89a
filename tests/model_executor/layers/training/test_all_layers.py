# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""What holds for every layer; a new layer has to be added here."""

import copy
import os
import subprocess
import sys

import pytest
import torch
from torch import nn
from torch._dynamo.testing import CompileCounter

from vllm.model_executor.layers import training
from vllm.model_executor.layers.training import (
    ColumnParallelLinear,
    GatherSequence,
    Gelu,
    GeluAndMul,
    LayerNorm,
    MergedColumnParallelLinear,
    ParallelLMHead,
    QKVParallelLinear,
    RMSNorm,
    RotaryEmbedding,
    RowParallelLinear,
    SiluAndMul,
    SplitSequence,
    TrainableAttention,
    TrainingLayer,
    VLLMFlashAttention,
    VocabParallelEmbedding,
)

pytestmark = pytest.mark.usefixtures("on_device")

TOKENS, SIZE = 9, 16


def x(*shape, dtype):
    return torch.randn(*shape).to(dtype).requires_grad_()


def qkv(dtype):
    return tuple(x(TOKENS, 2, 32, dtype=dtype) for _ in range(3))


def positions():
    return torch.arange(TOKENS)


# Each layer with a dtype: how to build it, and inputs for it.
LAYERS = {
    ColumnParallelLinear: (
        lambda dtype: ColumnParallelLinear(SIZE, 12, params_dtype=dtype),
        lambda dtype: (x(TOKENS, SIZE, dtype=dtype),),
    ),
    RowParallelLinear: (
        lambda dtype: RowParallelLinear(SIZE, 12, params_dtype=dtype),
        lambda dtype: (x(TOKENS, SIZE, dtype=dtype),),
    ),
    MergedColumnParallelLinear: (
        lambda dtype: MergedColumnParallelLinear(SIZE, [4, 8], params_dtype=dtype),
        lambda dtype: (x(TOKENS, SIZE, dtype=dtype),),
    ),
    QKVParallelLinear: (
        lambda dtype: QKVParallelLinear(SIZE, 4, 4, 2, params_dtype=dtype),
        lambda dtype: (x(TOKENS, SIZE, dtype=dtype),),
    ),
    VocabParallelEmbedding: (
        lambda dtype: VocabParallelEmbedding(TOKENS, SIZE, params_dtype=dtype),
        lambda dtype: (torch.randperm(TOKENS),),
    ),
    ParallelLMHead: (
        lambda dtype: ParallelLMHead(20, SIZE, True, params_dtype=dtype),
        lambda dtype: (x(TOKENS, SIZE, dtype=dtype),),
    ),
    RMSNorm: (
        lambda dtype: RMSNorm(SIZE, params_dtype=dtype),
        lambda dtype: (x(TOKENS, SIZE, dtype=dtype), x(TOKENS, SIZE, dtype=dtype)),
    ),
    LayerNorm: (
        lambda dtype: LayerNorm(SIZE, params_dtype=dtype),
        lambda dtype: (x(TOKENS, SIZE, dtype=dtype),),
    ),
    SiluAndMul: (
        lambda dtype: SiluAndMul(),
        lambda dtype: (x(TOKENS, SIZE, dtype=dtype),),
    ),
    Gelu: (
        lambda dtype: Gelu(),
        lambda dtype: (x(TOKENS, SIZE, dtype=dtype),),
    ),
    GeluAndMul: (
        lambda dtype: GeluAndMul(),
        lambda dtype: (x(TOKENS, SIZE, dtype=dtype),),
    ),
    SplitSequence: (
        lambda dtype: SplitSequence(),
        lambda dtype: (x(TOKENS, SIZE, dtype=dtype),),
    ),
    GatherSequence: (
        lambda dtype: GatherSequence(),
        lambda dtype: (x(TOKENS, SIZE, dtype=dtype),),
    ),
    RotaryEmbedding: (
        lambda dtype: RotaryEmbedding(32, max_position_embeddings=TOKENS),
        lambda dtype: (positions(), *qkv(dtype)[:2]),
    ),
    TrainableAttention: (
        lambda dtype: TrainableAttention(2, 32, sinks=True, params_dtype=dtype),
        lambda dtype: qkv(dtype),
    ),
    VLLMFlashAttention: (
        lambda dtype: VLLMFlashAttention(
            SIZE,
            2,
            head_dim=32,
            bias=True,
            rotary=RotaryEmbedding(32),
            params_dtype=dtype,
        ),
        lambda dtype: (x(TOKENS, SIZE, dtype=dtype), positions()),
    ),
}

each_layer = pytest.mark.parametrize("kind", list(LAYERS), ids=lambda k: k.__name__)
each_dtype = pytest.mark.parametrize(
    "dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str
)


def run(layer, inputs):
    """Outputs as a tuple."""
    output = layer(*inputs)
    return output if isinstance(output, tuple) else (output,)


def make(kind, dtype):
    torch.manual_seed(0)
    build, inputs = LAYERS[kind]
    return build(dtype), inputs(dtype)


def test_no_layer_is_forgotten():
    public = (getattr(training, name) for name in training.__all__)
    layers = {
        each
        for each in public
        if isinstance(each, type) and issubclass(each, TrainingLayer)
    }
    assert layers - {TrainingLayer} == LAYERS.keys()


@each_dtype
@each_layer
def test_everything_gets_a_gradient(kind, dtype):
    layer, inputs = make(kind, dtype)
    outputs = run(layer, inputs)
    sum((output * torch.randn_like(output)).sum() for output in outputs).backward()
    leaves = dict(layer.named_parameters()) | {
        f"input {index}": leaf
        for index, leaf in enumerate(inputs)
        if leaf.is_floating_point()
    }
    for name, leaf in leaves.items():
        assert leaf.grad is not None and leaf.grad.ne(0).any(), name
        assert leaf.grad.dtype == dtype and leaf.grad.isfinite().all(), name
    for output in outputs:
        assert output.dtype == dtype


@each_layer
def test_parameters_are_ordinary_and_described(kind):
    layer, _ = make(kind, torch.float32)
    own = dict(layer.named_parameters(recurse=False))
    assert layer.parameter_sharding().keys() == own.keys()
    for name, parameter in layer.named_parameters():
        assert type(parameter) is nn.Parameter and parameter.requires_grad, name


@each_layer
def test_copies_and_state_dicts(kind, assert_equal):
    layer, inputs = make(kind, torch.float32)
    clone = copy.deepcopy(layer)
    loaded, _ = make(kind, torch.float32)
    with torch.no_grad():
        for parameter in loaded.parameters():
            parameter.add_(1)
    loaded.load_state_dict(layer.state_dict())
    expected = run(layer, inputs)
    for other in (clone, loaded):
        for a, b in zip(run(other, inputs), expected):
            assert_equal("output", a, b)


@each_layer
def test_inference_mode_changes_nothing(kind, assert_equal):
    layer, inputs = make(kind, torch.float32)
    expected = run(layer, inputs)
    with torch.inference_mode():
        for a, b in zip(run(layer, inputs), expected):
            assert_equal("output", a, b)


@each_layer
def test_the_compiler_sees_one_graph(kind, assert_equal):
    layer, inputs = make(kind, torch.float32)
    expected = run(layer, inputs)
    backend = CompileCounter()
    with torch._dynamo.config.patch(disable=False):
        compiled = torch.compile(layer, fullgraph=True, backend=backend)
        for a, b in zip(run(compiled, inputs), expected):
            assert_equal("output", a, b)
    assert backend.frame_count == 1


@pytest.mark.parametrize(
    "kind",
    [RMSNorm, LayerNorm, SiluAndMul, Gelu, GeluAndMul, TrainableAttention],
    ids=lambda kind: kind.__name__,
)
def test_a_second_derivative_is_refused(kind):
    layer, inputs = make(kind, torch.float32)
    (first,) = torch.autograd.grad(
        run(layer, inputs)[0].square().sum(), inputs[:1], create_graph=True
    )
    with pytest.raises(RuntimeError, match="no second derivative"):
        first.sum().backward()


@each_layer
def test_autocast(kind):
    """Parameters in fp32, and gradients too."""
    layer, inputs = make(kind, torch.float32)
    with torch.autocast(inputs[0].device.type, torch.bfloat16):
        outputs = run(layer, inputs)
    sum((output * torch.randn_like(output)).sum() for output in outputs).backward()
    for name, leaf in layer.named_parameters():
        assert leaf.grad.dtype == torch.float32 and leaf.grad.ne(0).any(), name


@pytest.mark.parametrize("affine", [True, False])
def test_layer_norm_of_bf16_under_autocast(affine):
    """torch casts its own layer norm to fp32 there; the op keeps its dtype."""
    layer = LayerNorm(SIZE, elementwise_affine=affine, params_dtype=torch.bfloat16)
    states = x(TOKENS, SIZE, dtype=torch.bfloat16)
    with torch.autocast(states.device.type, torch.bfloat16):
        output = layer(states)
    assert output.dtype == torch.bfloat16
    output.sum().backward()
    assert states.grad.dtype == torch.bfloat16


def test_batch_invariant_mode_keeps_the_gradients():
    """The tests of gradients again, in vLLM's batch-invariant mode.

    On CPU vLLM has no such mode of its own; the switch must not change the layers.
    """
    each = "test_everything_gets_a_gradient"
    command = [
        *(sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider"),
        *(__file__, "-k", each),
    ]
    environment = os.environ | {"VLLM_BATCH_INVARIANT": "1"}
    result = subprocess.run(
        command, env=environment, capture_output=True, text=True, timeout=300
    )
    report = result.stdout + result.stderr
    assert result.returncode == 0, report
    assert f"{3 * len(LAYERS)} passed" in report, report
