# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""The attention op: every implementation that runs here, and how one is chosen."""

import functools
import itertools
import math
from unittest.mock import Mock

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch._dynamo.testing import CompileCounterWithBackend
from torch.utils import deterministic as determinism

from vllm.model_executor.layers.training.ops.attention import cpu, op, table
from vllm.model_executor.layers.training.ops.attention.call import (
    FLAT_FIELDS,
    AttentionCall,
    AttentionSpec,
)
from vllm.model_executor.layers.training.ops.attention.op import attention
from vllm.model_executor.layers.training.ops.attention.reference import (
    attention_reference,
)

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
CAPABILITY = torch.cuda.get_device_capability() if DEVICE == "cuda" else (0, 0)
RAGGED = [1, 5, 0, 63, 123]
HEADS = 8
FEATURES = {
    "plain": {},
    "non_causal": {"causal": False},
    "window": {"sliding_window": 7},
    "non_causal window": {"causal": False, "sliding_window": 40},
    "soft_cap": {"logits_soft_cap": 2.0},
    "sinks": {"sinks": True},
    "alibi": {"alibi": True},
    "non_causal alibi": {"causal": False, "alibi": True},
    "window, sinks": {"sliding_window": 30, "sinks": True},
    "all": {"sliding_window": 70, "logits_soft_cap": 5.0, "sinks": True, "alibi": True},
}
NAMES = ("output", "dq", "dk", "dv", "dsinks")


def request(dtype, head_size, features, deterministic=False):
    """What the op asks the table."""
    asked = dict(features)
    used = {
        "non_causal": not asked.get("causal", True),
        "sliding_window": "sliding_window" in asked,
        "logits_soft_cap": "logits_soft_cap" in asked,
        "sinks": "sinks" in asked,
        "alibi_slopes": "alibi" in asked,
    }
    names = tuple(name for name, is_used in used.items() if is_used)
    return table.Request(
        DEVICE, CAPABILITY, dtype, HEADS, head_size, names, deterministic
    )


def runs(implementation, dtype, head_size, features):
    asked = request(dtype, head_size, features)
    return not table.objections(implementation, asked)


def cases():
    """Every implementation with every feature it has, at each dtype and head size."""
    dtypes = (torch.float32, torch.bfloat16, torch.float16)
    for name, dtype in itertools.product(table.IMPLEMENTATIONS, dtypes):
        # On CUDA a kernel is compiled for each combination, so fp16 has one feature.
        few = DEVICE == "cuda" and dtype == torch.float16
        for head_size, feature in [
            *((64, feature) for feature in (["plain"] if few else FEATURES)),
            *((size, "plain") for size in (32, 80, 128, 256)),
        ]:
            if runs(name, dtype, head_size, FEATURES[feature]):
                case_id = f"{name}-{str(dtype)[6:]}-{head_size}-{feature}"
                yield pytest.param(name, dtype, head_size, feature, id=case_id)


def make_inputs(seqlens, head_size, dtype, features, kv_heads=2, seed=0):
    """Query, key, value, sinks (or None), ALiBi slopes (or None)."""
    generator = torch.Generator().manual_seed(seed)
    tensors = [
        torch.randn(sum(seqlens), heads, head_size, generator=generator)
        for heads in (HEADS, kv_heads, kv_heads)
    ]
    tensors = [t.to(DEVICE, dtype).requires_grad_() for t in tensors]
    sinks = alibi = None
    if features.get("sinks"):
        sinks = torch.randn(HEADS, generator=generator)
        sinks = sinks.to(DEVICE, dtype).requires_grad_()
    if features.get("alibi"):
        alibi = torch.tensor([0.5 ** (i + 1) for i in range(HEADS)], device=DEVICE)
    return *tensors, sinks, alibi


def spec_of(features, head_size):
    names = ("causal", "sliding_window", "logits_soft_cap")
    chosen = {name: features[name] for name in names if name in features}
    return AttentionSpec(1.1 * head_size**-0.5, **chosen)


def bounds(seqlens):
    return torch.tensor([0, *seqlens]).cumsum(0, dtype=torch.int32).to(DEVICE)


def results(function, inputs, grad):
    """The output and the gradients of query, key, value and, if given, the sinks."""
    *leaves, alibi = inputs
    output = function(*leaves, alibi)
    leaves = [t for t in leaves if t is not None]
    # Without tokens the reference uses no input.
    return [
        output,
        *torch.autograd.grad(output, leaves, grad, materialize_grads=True),
    ]


def run(inputs, seqlens, features, grad, implementation=None, **options):
    def call(q, k, v, sinks, alibi):
        return attention(
            q,
            k,
            v,
            bounds(seqlens),
            max([0, *seqlens]),
            spec_of(features, q.shape[-1]),
            sinks=sinks,
            alibi_slopes=alibi,
            implementation=implementation,
            **options,
        )

    return results(call, inputs, grad)


def run_reference(inputs, seqlens, features, grad, dtype):
    spec = spec_of(features, inputs[0].shape[-1])

    def call(q, k, v, sinks, alibi):
        return attention_reference(
            q,
            k,
            v,
            bounds(seqlens),
            sinks,
            alibi,
            scale=spec.scale,
            causal=spec.causal,
            window=spec.sliding_window,
            soft_cap=spec.logits_soft_cap,
        )[0]

    *leaves, alibi = inputs
    leaves = [
        None if t is None else t.detach().to(dtype).requires_grad_() for t in leaves
    ]
    return results(call, (*leaves, alibi), grad.to(dtype))


def random_grad(inputs, seed=1):
    generator = torch.Generator().manual_seed(seed)
    query = inputs[0]
    return torch.randn(query.shape, generator=generator).to(query)


@functools.cache
def plain_and_exact(dtype, head_size, feature):
    """Inputs and gradient of the output, and the reference in dtype and in fp64."""
    features = FEATURES[feature]
    inputs = make_inputs(RAGGED, head_size, dtype, features)
    grad = random_grad(inputs)
    dtypes = (dtype, torch.float64)
    return (
        inputs,
        grad,
        *(run_reference(inputs, RAGGED, features, grad, each) for each in dtypes),
    )


@pytest.mark.parametrize(("name", "dtype", "head_size", "feature"), list(cases()))
def test_every_implementation_is_accurate(
    name, dtype, head_size, feature, assert_as_accurate
):
    inputs, grad, plain, exact = plain_and_exact(dtype, head_size, feature)
    actual = run(inputs, RAGGED, FEATURES[feature], grad, name)
    for what, *tensors in zip(NAMES, actual, plain, exact, strict=False):
        assert_as_accurate(what, *tensors)


def test_every_implementation_of_this_device_is_tested():
    tested = {case.values[0] for case in cases()}
    on_cpu, on_cuda = {"cpu", "vllm_cpu"}, {"triton", "torch_flash", "vllm_triton"}
    assert tested >= {"reference"} | (on_cpu if DEVICE == "cpu" else on_cuda)


# On CUDA nearly each example compiles kernels.
EXAMPLES = 40 if DEVICE == "cpu" else 8


@settings(deadline=None, max_examples=EXAMPLES, derandomize=True)
@given(
    seqlens=st.lists(st.integers(0, 40), min_size=1, max_size=5),
    kv_heads=st.sampled_from([1, 2, 4]),
    head_size=st.sampled_from([1, 8, 24, 64]),
    causal=st.booleans(),
    window=st.sampled_from([None, 1, 3, 100]),
    soft_cap=st.sampled_from([None, 1.5]),
    sinks=st.booleans(),
    alibi=st.booleans(),
)
def test_properties_of_any_shape(
    seqlens, kv_heads, head_size, causal, window, soft_cap, sinks, alibi
):
    """Right in fp32, and a sequence's bits do not depend on its neighbours."""
    features = {"causal": causal, "sliding_window": window, "logits_soft_cap": soft_cap}
    features |= {"sinks": sinks, "alibi": alibi}
    inputs = make_inputs(seqlens, head_size, torch.float32, features, kv_heads)
    grad = random_grad(inputs)
    actual = run(inputs, seqlens, features, grad)
    exact = run_reference(inputs, seqlens, features, grad, torch.float64)
    for a, b in zip(actual, exact, strict=True):
        torch.testing.assert_close(a.double(), b, rtol=1e-4, atol=1e-5)

    apart = []
    parts = zip(*(t.split(seqlens) for t in (*inputs[:3], grad)), strict=True)
    for length, (*qkv, part_grad) in zip(seqlens, parts, strict=True):
        leaves = [t.detach().requires_grad_() for t in qkv]
        apart.append(run((*leaves, *inputs[3:]), [length], features, part_grad)[:4])
    for a, *b in zip(actual, *apart, strict=False):
        assert torch.equal(a, torch.cat(b))


@pytest.mark.parametrize("name", table.IMPLEMENTATIONS)
@pytest.mark.parametrize("deterministic", [False, True])
def test_runs_are_equal_bit_for_bit(name, deterministic, assert_equal):
    """Where gradients are asked to be, or the implementation always is."""
    dtype = torch.float32 if DEVICE == "cpu" else torch.bfloat16
    features = {"sliding_window": 300}
    asked = request(dtype, 64, features, deterministic)
    forward, backward = table.IMPLEMENTATIONS[name]
    if not deterministic and table.BACKWARDS[backward].deterministic is not True:
        asked = request(dtype, 64, features, True)
        deterministic = True
    if table.objections(name, asked):
        with pytest.raises(ValueError, match=f"implementation '{name}' cannot compute"):
            table.choose(asked, name)
        return
    seqlens = [400, 1, 150]
    inputs = make_inputs(seqlens, 64, dtype, features)
    grad = random_grad(inputs)
    first = run(inputs, seqlens, features, grad, name, deterministic=deterministic)
    for _ in range(3):
        again = run(inputs, seqlens, features, grad, name, deterministic=deterministic)
        for what, a, b in zip(NAMES, first, again, strict=False):
            assert_equal(what, a, b)


@pytest.mark.skipif(DEVICE == "cuda", reason="threads are the CPU's")
def test_threads_do_not_change_a_bit(assert_equal):
    """Nor do they change the sinks' gradient, a sum over all tokens."""
    seqlens = [400, 1, 150]
    inputs = make_inputs(seqlens, 16, torch.float32, FEATURES["sinks"])
    grad = random_grad(inputs)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        one = run(inputs, seqlens, FEATURES["sinks"], grad)
        torch.set_num_threads(2)
        two = run(inputs, seqlens, FEATURES["sinks"], grad)
    finally:
        torch.set_num_threads(threads)
    for what, a, b in zip(NAMES, one, two, strict=True):
        assert_equal(what, a, b)


@pytest.mark.parametrize("with_all", [False, True], ids=["plain", "all"])
def test_opcheck(with_all):
    features = FEATURES["all" if with_all else "plain"]
    q, k, v, sinks, alibi = make_inputs([3, 0, 9], 16, torch.float32, features)
    call = AttentionCall(spec_of(features, 16), bounds([3, 0, 9]), 9, sinks, alibi)
    fields = call.flat()
    torch.library.opcheck(torch.ops.vllm_training.attention.default, (q, k, v, *fields))
    with torch.no_grad():
        output, lse = torch.ops.vllm_training.attention(q, k, v, *fields)
        torch.library.opcheck(
            torch.ops.vllm_training.attention_backward.default,
            (output, q, k, v, output, lse, *fields),
        )


def test_a_call_is_restored_from_its_fields():
    spec = AttentionSpec(0.5, False, 7, 2.0)
    call = AttentionCall(spec, bounds([3]), 3, None, None, "reference", True, True)
    assert AttentionCall.of_flat(*call.flat()) == call
    assert dict(zip(FLAT_FIELDS, call.flat()))["max_seqlen"] == 3
    for defined in (
        torch.ops.vllm_training.attention,
        torch.ops.vllm_training.attention_backward,
    ):
        names = [argument.name for argument in defined.default._schema.arguments]
        assert tuple(names[-len(FLAT_FIELDS) :]) == FLAT_FIELDS


@pytest.fixture
def poisoned_memory():
    """torch.empty returns NaN."""
    filled = determinism.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True, warn_only=True)
    determinism.fill_uninitialized_memory = True
    yield
    determinism.fill_uninitialized_memory = filled
    torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("name", table.IMPLEMENTATIONS)
def test_no_element_is_left_unwritten(name, poisoned_memory):
    features = FEATURES["window"]
    dtype = torch.float32 if DEVICE == "cpu" else torch.bfloat16
    asked = request(dtype, 80, features, True)
    if table.objections(name, asked):
        return
    inputs = make_inputs(RAGGED, 80, dtype, features)
    for tensor in run(inputs, RAGGED, features, random_grad(inputs), name):
        assert tensor.isfinite().all()


@pytest.mark.parametrize("name", table.IMPLEMENTATIONS)
def test_strides_of_sinks_slopes_and_bounds_change_nothing(name, assert_equal):
    """Such as those of a column of a matrix, or of one number for all heads."""
    dtype = torch.float32 if DEVICE == "cpu" else torch.bfloat16
    for feature in ("sinks", "alibi"):
        if not runs(name, dtype, 64, FEATURES[feature]):
            continue
        *qkv, sinks, alibi = make_inputs(RAGGED, 64, dtype, FEATURES[feature])
        given, key = (alibi, "alibi_slopes") if sinks is None else (sinks, "sinks")
        column = torch.stack((given.detach(), -given.detach()), 1)[:, 0]
        for values in (column, column[:1].expand(HEADS)):
            outputs = [
                attention(
                    *qkv,
                    cu_seqlens,
                    max(RAGGED),
                    spec_of({}, 64),
                    implementation=name,
                    **{key: of_heads},
                )
                for of_heads, cu_seqlens in (
                    (
                        values.clone(memory_format=torch.contiguous_format),
                        bounds(RAGGED),
                    ),
                    (values, bounds(RAGGED).repeat_interleave(2)[::2]),
                )
            ]
            assert_equal(feature, *outputs)


@pytest.mark.skipif(DEVICE == "cuda", reason="of the CPU engine's kernel")
def test_the_engines_kernel_may_use_amx(monkeypatch):
    """A process that has not asked the system for it is killed by the kernel."""
    asked = Mock(wraps=torch.cpu._init_amx)
    monkeypatch.setattr(torch.cpu, "_init_amx", asked)
    cpu._engines_attention.cache_clear()
    inputs = make_inputs([3], 32, torch.bfloat16, {})
    run(inputs, [3], {}, random_grad(inputs), "vllm_cpu")
    asked.assert_called_once()


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("which", [0, 1, 2], ids=["query", "key", "value"])
def test_not_a_number_reaches_what_sees_it_alone(value, which):
    seqlens = [4, 6, 3]
    inputs = make_inputs(seqlens, 16, torch.float32, {})
    with torch.no_grad():
        inputs[which][7] = value
    for what, tensor in zip(NAMES, run(inputs, seqlens, {}, random_grad(inputs))):
        finite = tensor.isfinite().flatten(1).all(1)
        assert finite[:4].all() and finite[10:].all(), what
        # The gradient of the values does not depend on them.
        assert finite[4:10].all() == (what == "dv" and which == 2), what


def test_gradients_of_some_inputs_only(assert_equal):
    features = FEATURES["sinks"]
    inputs = make_inputs([5, 8], 16, torch.float32, features)
    grad = random_grad(inputs)
    expected = run(inputs, [5, 8], features, grad)[1:]
    for wanted in range(4):
        leaves = [t.detach() for t in inputs[:4]]
        leaves[wanted].requires_grad_()
        q, k, v, sinks = leaves
        output = attention(
            q, k, v, bounds([5, 8]), 8, spec_of(features, 16), sinks=sinks
        )
        output.backward(grad)
        assert_equal(NAMES[wanted + 1], leaves[wanted].grad, expected[wanted])
        others = [t.grad for t in leaves if t is not leaves[wanted]]
        assert others == [None] * 3


def test_compiles_whole_and_once(assert_equal):
    """cu_seqlens are an input of the graph: other lengths need no other graph."""
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    features = FEATURES["all"]
    spec = spec_of(features, 16)

    def step(q, k, v, sinks, alibi, cu_seqlens):
        options = {"sinks": sinks, "alibi_slopes": alibi}
        return attention(q * 2, k, v, cu_seqlens, None, spec, **options).sin()

    compiled = torch.compile(step, fullgraph=True, backend=counter)
    for seqlens in ([3, 9, 4], [8, 1, 7], [16, 0, 0]):
        *leaves, alibi = make_inputs(seqlens, 16, torch.float32, features)
        arguments = (alibi, bounds(seqlens))
        expected, actual = (
            torch.autograd.grad(function(*leaves, *arguments).sum(), leaves)
            for function in (step, compiled)
        )
        for what, a, b in zip(NAMES[1:], actual, expected, strict=True):
            assert_equal(what, a, b)
    assert counter.frame_count == 1


@pytest.mark.skipif(DEVICE == "cuda", reason="the extension is the CPU's")
def test_without_the_extension_plain_torch_computes(monkeypatch, assert_equal):
    features = FEATURES["all"]
    inputs = make_inputs([3, 0, 9], 16, torch.bfloat16, features)
    grad = random_grad(inputs)
    expected = run(inputs, [3, 0, 9], features, grad, "reference")
    monkeypatch.setattr(table, "HAS_CPU_KERNELS", False)
    monkeypatch.setattr(op, "_cached_choice", table.choose)
    actual = run(inputs, [3, 0, 9], features, grad)
    for what, a, b in zip(NAMES, actual, expected, strict=True):
        assert_equal(what, a, b)
    with pytest.raises(ValueError, match="'cpu' needs the extension, which is not bu"):
        run(inputs, [3, 0, 9], features, grad, "cpu")


def test_autocast_casts_the_inputs(assert_equal):
    inputs = make_inputs([5, 8], 16, torch.float32, {})
    half = [t.detach().bfloat16() for t in inputs[:3]]
    spec = spec_of({}, 16)
    with torch.autocast(DEVICE, torch.bfloat16):
        output = attention(*inputs[:3], bounds([5, 8]), 8, spec)
    assert_equal("output", output, attention(*half, bounds([5, 8]), 8, spec))
    output.sum().backward()
    assert inputs[0].grad.dtype == torch.float32


def test_long_sequences_take_memory_of_their_length(largest_tensor):
    """The default, with the widest choice of features; 32k tokens."""
    tokens, size = 32768, 8
    features = {"sliding_window": 100, "sinks": True, "alibi": True}
    inputs = make_inputs([tokens - 1, 1], size, torch.float32, features, 1)
    with largest_tensor:
        output, *grads = run(
            inputs, [tokens - 1, 1], features, torch.ones_like(inputs[0])
        )
    assert largest_tensor.numel <= tokens * HEADS * size
    assert all(t.isfinite().all() for t in (output, *grads))
