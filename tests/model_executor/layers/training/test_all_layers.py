# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""What holds for every layer; a new layer has to be added here."""

import copy
import os
from contextlib import nullcontext
from functools import partial

import pytest
import torch
from torch import nn
from torch._dynamo.testing import CompileCounter
from torch.autograd import forward_ad
from torch.utils.checkpoint import checkpoint

from tests.forks import run_python
from vllm.model_executor.determinism.mode import batch_invariant
from vllm.model_executor.layers import training
from vllm.model_executor.layers.training import (
    ColumnParallelLinear,
    GatherSequence,
    Gelu,
    GeluAndMul,
    LatentKVLinear,
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
    TransposedColumnParallelLinear,
    TransposedRowParallelLinear,
    VLLMFlashAttention,
    VocabParallelEmbedding,
    full_logprobs,
    token_logprobs,
)
from vllm.model_executor.layers.training.ops.attention.reference import (
    attention_reference,
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
    TransposedColumnParallelLinear: (
        lambda dtype: TransposedColumnParallelLinear(SIZE, [8, 4], params_dtype=dtype),
        lambda dtype: (x(TOKENS, SIZE, dtype=dtype),),
    ),
    TransposedRowParallelLinear: (
        lambda dtype: TransposedRowParallelLinear(SIZE, 12, params_dtype=dtype),
        lambda dtype: (x(TOKENS, SIZE, dtype=dtype),),
    ),
    LatentKVLinear: (
        lambda dtype: LatentKVLinear(SIZE, 12, 4, params_dtype=dtype),
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


@each_layer
def test_activation_checkpointing(kind, assert_equal):
    """Saved tensors may be read once then."""
    layer, inputs = make(kind, torch.float32)
    leaves = [t for t in (*layer.parameters(), *inputs) if t.is_floating_point()]
    outputs = run(layer, inputs)
    grads = [torch.randn_like(output) for output in outputs]
    expected = torch.autograd.grad(outputs, leaves, grads)
    again = checkpoint(partial(run, layer), inputs, use_reentrant=False)
    for a, b in zip(torch.autograd.grad(again, leaves, grads), expected):
        assert_equal("gradient", a, b)


@pytest.mark.parametrize("mode", [nullcontext, batch_invariant])
@pytest.mark.parametrize(
    # Whose backward reads its output, as that of torch's attention.
    "kind",
    [kind for kind in LAYERS if kind is not TrainableAttention],
    ids=lambda kind: kind.__name__,
)
def test_a_result_is_changed_in_place(kind, mode, assert_equal):
    """It is no view to autograd, which would refuse that, for any number of tokens."""
    layer, inputs = make(kind, torch.float32)
    for count in (TOKENS, 1, 0):
        some = tuple(x[:count].clone() for x in inputs)
        with mode():
            output = run(layer, some)[0]
            expected = output.detach() + 1
            assert_equal("output", output.add_(1).detach(), expected)
        output.sum().backward()


# What has derivatives of every order and direction where the layer's op has not.
IN_FLOAT64 = [RMSNorm, LayerNorm, SiluAndMul, Gelu, GeluAndMul]
WITHOUT_FORWARD_MODE = [
    *IN_FLOAT64,
    RotaryEmbedding,
    TrainableAttention,
    VLLMFlashAttention,
]
# These have in the mode an op, else torch's linear.
LINEAR = [
    ColumnParallelLinear,
    RowParallelLinear,
    MergedColumnParallelLinear,
    QKVParallelLinear,
    TransposedColumnParallelLinear,
    TransposedRowParallelLinear,
    LatentKVLinear,
    ParallelLMHead,
]


@pytest.mark.parametrize(
    "kind", [*IN_FLOAT64, TrainableAttention], ids=lambda kind: kind.__name__
)
def test_a_second_derivative_is_refused(kind):
    layer, inputs = make(kind, torch.float32)
    (first,) = torch.autograd.grad(
        run(layer, inputs)[0].square().sum(), inputs[:1], create_graph=True
    )
    advice = "attention_reference" if kind is TrainableAttention else "pass float64"
    with pytest.raises(RuntimeError, match=f"no second derivative.*{advice}"):
        first.sum().backward()


@pytest.mark.parametrize("kind", IN_FLOAT64, ids=lambda kind: kind.__name__)
def test_float64_has_a_second_derivative_and_forward_mode(kind):
    layer, inputs = make(kind, torch.float64)
    inputs = tuple(x[:1] for x in inputs)
    assert torch.autograd.gradgradcheck(layer, inputs)
    assert torch.autograd.gradcheck(layer, inputs, check_forward_ad=True)


def test_the_advice_for_attention_and_logprobs_holds():
    """What their errors name has derivatives of every order and direction."""
    layer = TrainableAttention(1, 4, sinks=True, params_dtype=torch.float64)
    q, k, v = (x(3, 1, 4, dtype=torch.float64) for _ in range(3))
    cu_seqlens = torch.tensor([0, 3], dtype=torch.int32)

    def attention(*qkv):
        return attention_reference(*qkv, cu_seqlens, layer.sinks, scale=0.5)[0]

    head = ParallelLMHead(5, 4, params_dtype=torch.float64)
    hidden, targets = x(2, 4, dtype=torch.float64), torch.tensor([4, 1])

    def logprobs(hidden):
        return full_logprobs(hidden, head).gather(-1, targets[:, None])[:, 0]

    torch.testing.assert_close(attention(q, k, v), layer(q, k, v))
    torch.testing.assert_close(logprobs(hidden), token_logprobs(hidden, head, targets))
    for function, inputs in ((attention, (q, k, v)), (logprobs, (hidden,))):
        assert torch.autograd.gradgradcheck(function, inputs, fast_mode=True)
        assert torch.autograd.gradcheck(function, inputs, check_forward_ad=True)
    with pytest.raises(NotImplementedError, match="token_logprobs.*full_logprobs"):
        torch.func.jvp(
            lambda hidden: token_logprobs(hidden, head, targets), (hidden,), (hidden,)
        )


def as_function(layer, inputs):
    """The layer as a function of its floating-point inputs and parameters alone."""
    given = dict(layer.named_parameters()) | {
        index: t for index, t in enumerate(inputs) if t.is_floating_point()
    }
    given = {name: t.detach() for name, t in given.items()}

    def function(given):
        arguments = [given.get(index, t) for index, t in enumerate(inputs)]
        parameters = {name: t for name, t in given.items() if isinstance(name, str)}
        output = torch.func.functional_call(layer, parameters, tuple(arguments))
        return output if isinstance(output, tuple) else (output,)

    return function, given


@pytest.mark.parametrize("mode", [nullcontext, batch_invariant])
@each_layer
def test_forward_mode_is_right_or_refused(kind, mode):
    """Not zero. <w, J v> is <J^T w, v>, and J^T is that of autograd."""
    layer, inputs = make(kind, torch.float32)
    function, given = as_function(layer, inputs)
    tangents = {name: torch.randn_like(t) for name, t in given.items()}
    with mode():
        outputs, vjp = torch.func.vjp(function, given)
        grads = tuple(torch.randn_like(output) for output in outputs)
        (transposed,) = vjp(grads)
        leaves = [*layer.parameters(), *(t for t in inputs if t.requires_grad)]
        expected = torch.autograd.grad(run(layer, inputs), leaves, grads)
        for actual, wanted in zip(transposed.values(), expected, strict=True):
            torch.testing.assert_close(actual, wanted)
        in_the_mode = LINEAR if mode is batch_invariant else []
        if kind in [*WITHOUT_FORWARD_MODE, *in_the_mode]:
            refused = pytest.raises(NotImplementedError, match="no forward-mode deriv")
            with refused:
                torch.func.jvp(function, (given,), (tangents,))
            with refused, forward_ad.dual_level():
                function(
                    {n: forward_ad.make_dual(given[n], tangents[n]) for n in given}
                )
            return
        _, moved = torch.func.jvp(function, (given,), (tangents,))
    forward = sum((w * t).sum() for w, t in zip(grads, moved))
    backward = sum((transposed[name] * tangents[name]).sum() for name in given)
    torch.testing.assert_close(forward, backward, rtol=1e-4, atol=1e-3)


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
    arguments = ["-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", __file__]
    environment = os.environ | {"VLLM_BATCH_INVARIANT": "1"}
    result = run_python([*arguments, "-k", each], timeout=300, env=environment)
    report = result.stdout + result.stderr
    assert result.returncode == 0, report
    assert f"{3 * len(LAYERS)} passed" in report, report
