# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""Collectives: what they give, in the trainer and in a step of the engine.

Run on each rank by `test_tensor_parallel.py`.
"""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from tests.model_executor.layers.training.parallel_model import (
    HIDDEN,
    TOKENS,
    engine_step,
)
from vllm.model_executor import vllm_internals
from vllm.model_executor.layers.training import (
    ColumnParallelLinear,
    RowParallelLinear,
    collectives,
    communication,
)
from vllm.model_executor.parallel_context import ParallelContext
from vllm.training import batch_invariant

pytestmark = pytest.mark.usefixtures("on_the_ranks_device")

DTYPES = [torch.float32, torch.float64, torch.bfloat16]


@pytest.fixture
def of_ranks(context):
    """What the ranks give to a collective, by rank; small whole numbers."""

    def make(*shape, seed=0, dtype=torch.float32):
        generator = torch.Generator().manual_seed(seed)
        values = torch.randint(
            -4, 5, (context.tp_size, *shape), generator=generator, device="cpu"
        )
        return list(values.to(context.device, dtype))

    return make


def differentiate(function, x, grad):
    """The result for a rank's x, and the gradient of x for a rank's grad."""
    x = x.clone().requires_grad_()
    y = function(x)
    return y, torch.autograd.grad(y, x, grad)[0]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("ordered", [False, True])
def test_sums_and_copies(context, of_ranks, ordered, dtype, assert_equal):
    rank, size = context.tp_rank, context.tp_size
    xs, grads = (of_ranks(3, 4, seed=seed, dtype=dtype) for seed in (0, 1))
    y, dx = differentiate(
        lambda x: collectives.copy_to_group(x, context), xs[0], grads[rank]
    )
    assert_equal("copy", y, xs[0])
    assert_equal("copy's gradient", dx, sum(grads))

    def reduce(x):
        if ordered:
            return collectives.sum_parts_from_group([x], context)
        return collectives.reduce_from_group(x, context)

    y, dx = differentiate(reduce, xs[rank], grads[0])
    assert_equal("reduce", y, sum(xs))
    assert_equal("reduce's gradient", dx, grads[0])

    for dim in (0, 1, -2):
        wide = of_ranks(4 * size, 8 * size, dtype=dtype)

        def reduce_scatter(x, dim=dim):
            if ordered:
                return collectives.reduce_scatter_parts_from_group([x], context, dim)
            return collectives.reduce_scatter_from_group(x, context, dim)

        own = [each.chunk(size, dim)[rank] for each in wide]
        y, dx = differentiate(reduce_scatter, wide[rank], own[rank])
        assert_equal(f"reduce-scatter along {dim}", y, sum(own))
        slices = [each.chunk(size, dim)[r] for r, each in enumerate(wide)]
        assert_equal("its gradient", dx, torch.cat(slices, dim))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("dim", [0, 1, -1, -2])
def test_gathers_and_splits(context, of_ranks, dim, dtype, assert_equal):
    rank, size = context.tp_rank, context.tp_size
    xs = of_ranks(2, 3, 4, dtype=dtype)
    whole = torch.cat(xs, dim)
    grads = of_ranks(*whole.shape, seed=1, dtype=dtype)

    def check(name, function, x, y, grad, dx):
        actual, gradient = differentiate(lambda x: function(x, context, dim), x, grad)
        assert_equal(name, actual, y)
        assert_equal(f"{name}'s gradient", gradient, dx)

    summed = sum(grads).chunk(size, dim)[rank]
    each = "all_gather", collectives.all_gather_to_group
    check(*each, xs[rank], whole, grads[rank], summed)
    own = grads[0].chunk(size, dim)[rank]
    check("gather", collectives.gather_from_group, xs[rank], whole, grads[0], own)
    check("split", collectives.split_to_group, whole, xs[rank], xs[rank], whole)


def test_all_to_all(context, of_ranks, assert_equal):
    rank, size = context.tp_rank, context.tp_size

    def check(sizes):
        """`sizes[i][j]` rows go from rank i to rank j, and gradients back."""
        rows = [of_ranks(sum(row), 3, seed=i)[0] for i, row in enumerate(sizes)]
        pieces = [x.split(row) for x, row in zip(rows, sizes)]
        arriving = [row[rank] for row in sizes]
        received = torch.cat([pieces[i][rank] for i in range(size)])
        options = {}
        if sizes[0] != [2] * size:
            options = {"input_sizes": sizes[rank], "output_sizes": arriving}
        y, dx = differentiate(
            lambda x: collectives.all_to_all_in_group(x, context.tp_group, **options),
            rows[rank],
            received,
        )
        assert_equal("received", y, received)
        assert_equal("sent back", dx, rows[rank])

    check([[2] * size] * size)
    check([[(i + 2 * j) % 3 for j in range(size)] for i in range(size)])


def test_one_rank_alone_communicates_nothing():
    x = torch.ones(3, 5, requires_grad=True)
    for group in (ParallelContext.single(), None):
        for function, *options in (
            (collectives.copy_to_group,),
            (collectives.reduce_from_group,),
            (collectives.all_gather_to_group, 0),
            (collectives.reduce_scatter_from_group, 0),
            (collectives.gather_from_group,),
            (collectives.split_to_group,),
            (collectives.all_to_all_in_group,),
        ):
            assert function(x, group, *options) is x
        assert collectives.sum_parts_from_group([x], group) is x
        part = collectives.reduce_scatter_parts_from_group([x, x], group, 0)
        assert part.eq(2).all()


def test_what_does_not_fit_is_refused(context):
    size = context.tp_size
    x = torch.zeros(2 * size, size + 1)
    for function in (
        collectives.split_to_group,
        collectives.reduce_scatter_from_group,
        lambda x, *rest: collectives.reduce_scatter_parts_from_group([x], *rest),
    ):
        with pytest.raises(ValueError, match=rf"Dim 1 of .* {size} ranks; pad it"):
            function(x, context, 1)
    with pytest.raises(ValueError, match="Dim 0 of .*not divisible"):
        collectives.all_to_all_in_group(x[1:], context)
    sizes = [2] * size
    for sent, received in ((sizes, None), (sizes, [2]), ([1] * size, sizes)):
        with pytest.raises(ValueError, match="Give both, or neither"):
            collectives.all_to_all_in_group(x, context, sent, received)


def test_a_second_derivative_is_refused(context):
    x = torch.ones(4, 4, requires_grad=True)
    y = collectives.copy_to_group(x, context).square().sum()
    (first,) = torch.autograd.grad(y, x, create_graph=True)
    with pytest.raises(RuntimeError, match="differentiate twice"):
        first.sum().backward()


def test_a_tangent_is_refused(context):
    """On every rank before any of them communicates."""
    features = 2 * context.tp_size
    x = torch.ones(3, features)
    kwargs = {"parallel_context": context}
    whole = RowParallelLinear(features, 4, input_is_parallel=False, **kwargs)
    cases = {
        "collective Copy": lambda x: collectives.copy_to_group(x, context),
        "collective Gather": lambda x: collectives.gather_from_group(x, context),
        "collective Split": whole,
        "column-parallel linear": ColumnParallelLinear(features, features, **kwargs),
        "collective Reduce|RowParallelLinear": RowParallelLinear(
            features * context.tp_size, 4, **kwargs
        ),
    }
    for name, function in cases.items():
        match = f"({name}) has no forward-mode derivative.*on one rank"
        with pytest.raises(NotImplementedError, match=match):
            torch.func.jvp(function, (x,), (x,))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("count", [1, 3])
def test_sums_in_order_have_the_same_bits_scattered(
    context, dtype, count, assert_equal
):
    """Against the sum in fp32, one part after the other."""
    rank, size = context.tp_rank, context.tp_size
    generator = torch.Generator().manual_seed(4)
    shape = (size, count, 8 * size, 12)
    parts = torch.randn(shape, generator=generator, device="cpu")
    parts = (parts * 10 ** (4 * parts)).to(context.device, dtype)
    total = torch.zeros(shape[2:])
    for part in parts.flatten(0, 1):
        total += part
    expected = total.to(dtype)
    own = list(parts[rank])
    summed = collectives.sum_parts_from_group(own, context)
    assert_equal("sum", summed, expected)
    for dim in (0, 1):
        scattered = collectives.reduce_scatter_parts_from_group(own, context, dim)
        assert_equal(f"dim {dim}", scattered, expected.chunk(size, dim)[rank])
    if count == 1:
        with batch_invariant():
            summed = collectives.reduce_from_group(own[0], context)
            assert_equal("reduce", summed, expected)
            scattered = collectives.reduce_scatter_from_group(own[0], context, 0)
            assert_equal("scatter", scattered, expected.chunk(size, 0)[rank])


class Products(TorchDispatchMode):
    """Appends the name of each matrix product to `events`."""

    def __init__(self, events):
        super().__init__()
        self.events = events

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func in (torch.ops.aten.mm.default, torch.ops.aten.addmm.default):
            self.events.append("product")
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("in_order", [False, True])
@pytest.mark.parametrize("sequence_parallel", [False, True])
def test_the_weights_gradient_is_computed_meanwhile(
    context, vllm_groups, monkeypatch, sequence_parallel, in_order
):
    """In the backward: dX, whose sum over ranks begins; dW; then the sum is needed."""
    events = []

    def watched(name):
        start = getattr(communication, name)

        def begin(*args):
            events.append(f"begin {name}")
            finish = start(*args)

            def end():
                events.append(f"end {name}")
                return finish()

            return end

        return begin

    # Batch-invariant mode on GPUs is for 16 bits.
    dtype = torch.bfloat16 if in_order else torch.float32
    layer = ColumnParallelLinear(
        HIDDEN,
        16,
        sequence_parallel=sequence_parallel,
        params_dtype=dtype,
        parallel_context=context,
    )
    x = torch.randn(TOKENS, HIDDEN, dtype=dtype, requires_grad=True)
    with batch_invariant() if in_order else torch.enable_grad():
        output = layer(x)
    names = ("start_all_reduce", "start_all_gather", "start_reduce_scatter")
    for name in names:
        monkeypatch.setattr(communication, name, watched(name))
    # On a GPU autograd would run the backward in a thread of its own.
    with torch.autograd.set_multithreading_enabled(False), Products(events):
        output.backward(torch.ones_like(output))
    summed = names[2] if sequence_parallel else names[0]
    expected = ["product", f"begin {summed}", "product", f"end {summed}"]
    if sequence_parallel:
        expected[:0] = [f"begin {names[1]}"]
        expected[3:3] = [f"end {names[1]}"]
    assert events == expected


@pytest.fixture
def calls(monkeypatch, vllm_groups):
    """Names of the engine's collectives that are called."""
    names = []
    coordinator = vllm_internals.get_tp_group()
    for name in ("all_reduce", "all_gather", "reduce_scatter"):
        original = getattr(coordinator, name)

        def call(*args, name=name, original=original):
            names.append(name)
            return original(*args)

        monkeypatch.setattr(coordinator, name, call)
    return names


ENGINE_CALLS = {
    "reduce_from_group": ("all_reduce", ()),
    "all_gather_to_group": ("all_gather", (0,)),
    "gather_from_group": ("all_gather", (-1,)),
    "reduce_scatter_from_group": ("reduce_scatter", (0,)),
}


def has_pynccl(context):
    """Whether vLLM's binding of NCCL found a library that has what it calls."""
    if context.device.type == "cpu":
        return True
    return not vllm_internals.get_tp_group().device_communicator.pynccl_comm.disabled


@pytest.mark.parametrize("name", ENGINE_CALLS)
def test_a_step_of_the_engine_takes_the_engines(
    context, of_ranks, calls, name, assert_equal
):
    function = getattr(collectives, name)
    called, options = ENGINE_CALLS[name]
    x = of_ranks(8, 8)[context.tp_rank]
    before = x.clone()
    expected = function(x, context, *options)
    assert not calls
    with torch.inference_mode():
        function(x, context, *options)
    assert not calls, "an evaluation in the trainer has the bits of its training"
    with engine_step():
        if called == "reduce_scatter" and not has_pynccl(context):
            with pytest.raises(RuntimeError, match="needs its own binding of NCCL"):
                function(x, context, *options)
            return
        assert_equal(name, function(x, context, *options), expected)
        assert calls == [called]
        function(x, torch.distributed.group.WORLD, *options)
        assert calls == [called], "another group than the engine's"
    assert_equal("the input", x, before)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_engines_sum_in_batch_invariant_mode(
    context, calls, dtype, monkeypatch, assert_equal
):
    """A row-parallel layer that stays itself in the engine, with the trainer's bits."""
    monkeypatch.setenv("VLLM_BATCH_INVARIANT", "1")
    torch.manual_seed(1)
    layer = RowParallelLinear(128, HIDDEN, params_dtype=dtype, parallel_context=context)
    x = torch.randn(TOKENS, 128 // context.tp_size).to(dtype)
    expected = layer(x).detach()
    assert not calls
    with engine_step():
        assert_equal("output", layer(x), expected)
    assert calls == ["all_reduce"]
