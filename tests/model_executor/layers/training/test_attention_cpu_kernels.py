# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""The C++ kernels of attention on CPU, against plain torch."""

import itertools
import math
import resource
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch

from vllm.model_executor import op_library as library

OPS = getattr(torch.ops, library.NAMESPACE)
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# Tiles have 96 queries or keys, panels and vectors 4 to 48.
RAGGED = (1, 0, 63, 5, 0, 230, 2)
LONG = (300, 97)


@dataclass
class Case:
    """The arguments of the ops but for grad_output, output and lse."""

    query: torch.Tensor
    key: torch.Tensor
    value: torch.Tensor
    cu_seqlens: torch.Tensor
    sinks: torch.Tensor | None = None
    alibi_slopes: torch.Tensor | None = None
    scale: float = 1.0
    causal: bool = True
    window: int = 0
    soft_cap: float = 0.0

    @property
    def features(self) -> tuple[Any, ...]:
        return (
            self.cu_seqlens,
            self.sinks,
            self.alibi_slopes,
            self.scale,
            self.causal,
            self.window,
            self.soft_cap,
        )

    @property
    def backward_features(self) -> tuple[Any, ...]:
        """Without sinks, which are in lse."""
        cu_seqlens, _, *others = self.features
        return cu_seqlens, *others

    def to(self, dtype: torch.dtype) -> "Case":
        sinks = None if self.sinks is None else self.sinks.to(dtype)
        query, key, value = (
            tensor.detach().to(dtype).requires_grad_()
            for tensor in (self.query, self.key, self.value)
        )
        return replace(self, query=query, key=key, value=value, sinks=sinks)


def make_case(
    lengths: tuple[int, ...] = RAGGED,
    num_heads: int = 4,
    num_kv_heads: int = 2,
    head_size: int = 32,
    dtype: torch.dtype = torch.float32,
    sinks: bool = False,
    alibi: bool = False,
    **features: Any,
) -> Case:
    """Query, key and value are slices of one tensor, as a fused projection gives."""
    generator = torch.Generator().manual_seed(head_size)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator)

    heads = [num_heads, num_kv_heads, num_kv_heads]
    qkv = normal(sum(lengths), sum(heads), head_size).to(dtype)
    query, key, value = qkv.split(heads, dim=1)
    return Case(
        query,
        key,
        value,
        torch.tensor((0, *lengths)).cumsum(0).int(),
        sinks=normal(num_heads).to(dtype) if sinks else None,
        alibi_slopes=normal(num_heads).abs() / 10 if alibi else None,
        scale=head_size**-0.5,
        **features,
    )


def reference(case: Case) -> tuple[torch.Tensor, torch.Tensor]:
    """Output and log-sum-exp in plain torch, whole matrices of scores at a time."""
    outputs, lses = [], []
    group = case.query.shape[1] // case.key.shape[1]
    sequences = zip(
        *(
            tensor.split(case.cu_seqlens.diff().tolist())
            for tensor in (case.query, case.key, case.value)
        )
    )
    for query, key, value in sequences:
        query = query.transpose(0, 1)
        key, value = (
            tensor.repeat_interleave(group, dim=1).transpose(0, 1)
            for tensor in (key, value)
        )
        scores = query @ key.transpose(1, 2) * case.scale
        if case.soft_cap > 0:
            scores = case.soft_cap * torch.tanh(scores / case.soft_cap)
        positions = torch.arange(query.shape[1])
        distance = positions[:, None] - positions
        if case.alibi_slopes is not None:
            slopes = case.alibi_slopes.to(scores.dtype)
            scores = scores - slopes[:, None, None] * distance.abs()
        masked = torch.zeros_like(distance, dtype=torch.bool)
        if case.causal:
            masked |= distance < 0
        if case.window > 0:
            masked |= distance.abs() >= case.window
        scores = scores.masked_fill(masked, -torch.inf)
        if case.sinks is not None:
            sinks = case.sinks[:, None, None].expand(-1, query.shape[1], 1)
            scores = torch.cat([scores, sinks], dim=2)
        probabilities = scores.softmax(dim=-1)[..., : len(positions)]
        outputs.append((probabilities @ value).transpose(0, 1))
        lses.append(scores.logsumexp(dim=-1))
    return torch.cat(outputs), torch.cat(lses, dim=1)


NAMES = ("output", "lse", "grad_query", "grad_key", "grad_value")


def run_reference(case: Case, grad: torch.Tensor) -> list[torch.Tensor]:
    output, lse = reference(case)
    inputs = (case.query, case.key, case.value)
    grads = torch.autograd.grad(output, inputs, grad.to(output.dtype))
    return [output.detach(), lse.detach(), *grads]


def run(case: Case, grad: torch.Tensor) -> list[torch.Tensor]:
    inputs = (case.query, case.key, case.value)
    output, lse = OPS.cpu_attention_forward(*inputs, *case.features)
    grads = OPS.cpu_attention_backward(
        grad, *inputs, output, lse, *case.backward_features
    )
    return [output, lse, *grads]


def grad_of(case: Case) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(case.query.shape, generator=generator).to(case.query.dtype)


@pytest.fixture
def check(assert_as_accurate: Callable[..., None]) -> Callable[[Case], None]:
    def check(case: Case) -> None:
        dtype, grad = case.query.dtype, grad_of(case)
        plain = run_reference(case.to(dtype), grad)
        plain[1] = plain[1].float()
        exact = run_reference(case.to(torch.float64), grad)
        for name, *tensors in zip(NAMES, run(case, grad), plain, exact):
            assert_as_accurate(name, *tensors)

    return check


@pytest.fixture
def set_threads() -> Iterator[Callable[[int], None]]:
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


FEATURES = [
    dict(causal=causal, window=window, soft_cap=soft_cap, sinks=sinks, alibi=alibi)
    for causal, window, soft_cap, sinks, alibi in itertools.product(
        (True, False), (0, 1, 40, 150), (0.0, 2.0), (False, True), (False, True)
    )
]


@pytest.mark.parametrize("features", FEATURES, ids=str)
def test_features(features: dict[str, Any], check: Callable[[Case], None]):
    check(make_case(**features))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("head_size", [8, 20, 32, 48, 64, 80, 96, 128, 192, 256])
def test_head_sizes(head_size: int, dtype: torch.dtype, check: Callable[[Case], None]):
    check(make_case(LONG, 2, 1, head_size=head_size, dtype=dtype))


@pytest.mark.parametrize("dtype", DTYPES[1:])
@pytest.mark.parametrize("features", FEATURES[-8:], ids=str)
def test_features_of_16_bits(
    features: dict[str, Any], dtype: torch.dtype, check: Callable[[Case], None]
):
    check(make_case(dtype=dtype, **features))


@pytest.mark.parametrize("heads", [(1, 1), (3, 3), (6, 2), (8, 1)])
def test_groups_of_heads(heads: tuple[int, int], check: Callable[[Case], None]):
    check(make_case((3, 100), *heads))


@pytest.mark.parametrize("length", [1, 2, 23, 24, 25, 48, 95, 96, 97, 191, 193])
@pytest.mark.parametrize("window", [0, 30])
def test_lengths(length: int, window: int, check: Callable[[Case], None]):
    check(make_case((length,), window=window))


@pytest.mark.parametrize("scale", [-0.3, 0.0, 3.0])
def test_scales(scale: float, check: Callable[[Case], None]):
    check(replace(make_case(), scale=scale))


def test_sinks_of_another_dtype(assert_equal: Callable[..., None]):
    case = make_case(dtype=torch.bfloat16, sinks=True)
    grad = grad_of(case)
    assert case.sinks is not None
    for dtype in (torch.float32, torch.float64):
        other = replace(case, sinks=case.sinks.to(dtype))
        for name, *results in zip(NAMES, run(case, grad), run(other, grad)):
            assert_equal(f"{name}, {dtype}", *results)


@pytest.mark.parametrize("features", [{}, FEATURES[-1]], ids=str)
def test_lse_is_that_of_the_forward(
    features: dict[str, Any], assert_equal: Callable[..., None]
):
    case = make_case(**features)
    lse = OPS.cpu_attention_lse(case.query, case.key, *case.features)
    assert_equal("lse", lse, run(case, grad_of(case))[1])


@pytest.mark.parametrize("lengths", [(500,), RAGGED, (30,) * 9])
@pytest.mark.parametrize("features", [{}, dict(window=120, causal=False)], ids=str)
@pytest.mark.parametrize("num_kv_heads", [1, 3])
def test_threads_do_not_change_a_bit(
    lengths: tuple[int, ...],
    features: dict[str, Any],
    num_kv_heads: int,
    set_threads: Callable[[int], None],
    assert_equal: Callable[..., None],
):
    """One thread computes all gradients of a sequence at once; many divide it."""
    case = make_case(lengths, 3, num_kv_heads, **features)
    grad = grad_of(case)
    set_threads(1)
    expected = run(case, grad)
    for threads in (2, 3, 16):
        set_threads(threads)
        for name, *results in zip(NAMES, run(case, grad), expected):
            assert_equal(f"{name}, {threads} threads", *results)


@pytest.mark.parametrize("features", [{}, FEATURES[-1]], ids=str)
def test_a_sequence_alone_gives_the_bits_of_the_batch(
    features: dict[str, Any], assert_equal: Callable[..., None]
):
    case = make_case(**features)
    grad = grad_of(case)
    batch = run(case, grad)
    batch[1] = batch[1].T
    bounds = case.cu_seqlens.tolist()
    for begin, end in itertools.pairwise(bounds):
        rows = slice(begin, end)
        alone = replace(
            case,
            query=case.query[rows],
            key=case.key[rows],
            value=case.value[rows],
            cu_seqlens=torch.tensor([0, end - begin], dtype=torch.int32),
        )
        results = run(alone, grad[rows])
        results[1] = results[1].T
        for name, actual, expected in zip(NAMES, results, batch):
            assert_equal(f"{name} of {rows}", actual, expected[rows])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("head_size", [1, 20, 64])
def test_strides_do_not_change_a_bit(
    head_size: int, dtype: torch.dtype, assert_equal: Callable[..., None]
):
    case = make_case(head_size=head_size, dtype=dtype)
    inputs = [case.query, case.key, case.value]
    assert not any(tensor.is_contiguous() for tensor in inputs)
    grad = grad_of(case)
    expected = run(case, grad)

    def heads_first(tensor: torch.Tensor) -> torch.Tensor:
        return tensor.transpose(0, 1).contiguous().transpose(0, 1)

    for layout in (torch.Tensor.contiguous, heads_first):
        query, key, value = map(layout, inputs)
        other = replace(case, query=query, key=key, value=value)
        for name, *results in zip(NAMES, run(other, layout(grad)), expected):
            assert_equal(f"{name}, {layout.__name__}", *results)


@pytest.mark.parametrize("lengths", [(), (0,), (0, 0, 0)])
def test_no_tokens(lengths: tuple[int, ...]):
    case = make_case(lengths)
    shapes = [tuple(result.shape) for result in run(case, grad_of(case))]
    assert shapes == [(0, 4, 32), (4, 0), (0, 4, 32), (0, 2, 32), (0, 2, 32)]


@pytest.mark.parametrize("features", [{}, FEATURES[-1]], ids=str)
@pytest.mark.parametrize("head_size", [20, 64])
def test_every_element_is_written(
    features: dict[str, Any], head_size: int, assert_equal: Callable[..., None]
):
    case = make_case(head_size=head_size, **features)
    grad = grad_of(case)
    expected = run(case, grad)
    torch.use_deterministic_algorithms(True)
    try:
        assert torch.utils.deterministic.fill_uninitialized_memory
        assert torch.empty(1).isnan().all()
        poisoned = run(case, grad)
    finally:
        torch.use_deterministic_algorithms(False)
    for name, *results in zip(NAMES, poisoned, expected):
        assert_equal(name, *results)


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("tensor", ["query", "key"])
@pytest.mark.parametrize("soft_cap", [0.0, 2.0])
def test_bad_numbers_spread_as_in_torch(tensor: str, bad: float, soft_cap: float):
    case = make_case((230, 100), soft_cap=soft_cap)
    query, key = case.query.clone(), case.key.clone()
    {"query": query, "key": key}[tensor][150, 0, 3] = bad
    case = replace(case, query=query, key=key)
    expected = reference(case)
    output, lse, *grads = run(case, grad_of(case))
    for name, *results in zip(NAMES, (output, lse), expected):
        nans, infinities = (
            [function(result) for result in results]
            for function in (torch.isnan, torch.isinf)
        )
        assert torch.equal(*nans) and torch.equal(*infinities), name
    # Heads 2 and 3 and the second sequence do not see it.
    for result in (output, lse.T, *grads):
        heads = result.shape[1]
        assert result[:, heads // 2 :].isfinite().all()
        assert result[230:].isfinite().all()
    if math.isnan(bad):
        grad_query, grad_key, grad_value = grads
        assert grad_query[150, 0].isnan().all()
        assert grad_key[:151, 0].isnan().all() and grad_value[:151, 0].isnan().all()


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_bad_values_and_gradients_spread_to_what_sees_them(bad: float):
    case = make_case((230, 100), 2, 2)
    value, grad = case.value.clone(), grad_of(case)
    value[150, 0, 3] = bad
    output = run(replace(case, value=value), grad)[0]
    seen = output[:, 0, 3]
    assert not seen[150:230].isfinite().any()
    assert seen[230:].isfinite().all() and seen[:96].isfinite().all()
    assert output[:, 1].isfinite().all()

    grad[150, 0, 3] = bad
    *_, grad_query, grad_key, grad_value = run(case, grad)
    assert grad_query[150, 0].isnan().all()
    assert not grad_key[:151, 0].isfinite().any()
    assert not grad_value[:151, 0, 3].isfinite().any()
    for result in (grad_query, grad_key, grad_value):
        assert result[230:].isfinite().all() and result[:, 1].isfinite().all()


def test_large_scores_do_not_overflow(check: Callable[[Case], None]):
    case = make_case(sinks=True)
    assert case.sinks is not None
    case = replace(case, query=case.query * 300, sinks=case.sinks * 100)
    results = run(case, grad_of(case))
    assert results[1].max() > 300
    assert all(result.isfinite().all() for result in results)
    exact, _ = reference(case.to(torch.float64))
    torch.testing.assert_close(results[0].double(), exact, atol=1e-3, rtol=1e-3)


def test_a_sink_of_minus_infinity_is_none(assert_equal: Callable[..., None]):
    case = make_case()
    sinks = torch.full((4,), -torch.inf)
    grad = grad_of(case)
    with_sinks = run(replace(case, sinks=sinks), grad)
    for name, *results in zip(NAMES, with_sinks, run(case, grad)):
        assert_equal(name, *results)


def test_memory_is_linear_in_the_tokens():
    """A matrix of scores of 32k tokens would take 4 GiB."""
    length = 32768
    case = make_case((length,), 1, 1)
    grad = grad_of(case)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    output, lse, grad_query, _, grad_value = run(case, grad)
    after = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    assert after - before < 100 * 1024, "KiB"

    rows = torch.tensor([0, 1, 20000, length - 1])
    scores = case.query[rows, 0].double() @ case.key[:, 0].double().T * case.scale
    scores.masked_fill_(torch.arange(length) > rows[:, None], -torch.inf)
    exact = scores.softmax(dim=-1) @ case.value[:, 0].double()
    torch.testing.assert_close(output[rows, 0].double(), exact, atol=2e-6, rtol=1e-4)
    exact = scores.logsumexp(dim=-1)
    torch.testing.assert_close(lse[0, rows].double(), exact, atol=2e-6, rtol=1e-6)
    # Each row of the probabilities sums to one.
    total, exact = (t.double().sum(dim=0) for t in (grad_value, grad))
    torch.testing.assert_close(total, exact, atol=5e-3, rtol=1e-4)
    assert grad_query.isfinite().all()


def _cu_seqlens(*values: int) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.int32)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(query=torch.ones(8, 32)), "query has 2 dimensions"),
        (dict(key=torch.ones(8, 32)), "key has 2 dimensions"),
        (dict(value=torch.ones(8, 32)), "value has 2 dimensions"),
        (dict(key=torch.ones(8, 3, 32)), "4 heads and key 3"),
        (dict(key=torch.ones(8, 0, 32)), "4 heads and key 0"),
        (dict(key=torch.ones(7, 2, 32)), r"key is \[7, 2, 32\].*\[8, 2, 32\]"),
        (dict(value=torch.ones(8, 4, 32)), r"value is \[8, 4, 32\].*\[8, 2, 32\]"),
        (dict(value=torch.ones(8, 2, 16)), r"value is \[8, 2, 16\].*\[8, 2, 32\]"),
        (dict(key=torch.ones(8, 2, 32).half()), "key has the dtype Half.*Float"),
        (dict(value=torch.ones(8, 2, 64)[..., ::2]), "value has the stride 2"),
        (dict(query=torch.ones(8, 4, 257)), "head size is 257.*1 to 256"),
        (
            dict.fromkeys(("query", "key", "value"), torch.ones(8, 4, 32).double()),
            "float32",
        ),
        (dict(query=torch.ones(8, 4, 0)), "head size is 0.*1 to 256"),
        (dict(sinks=torch.ones(2)), r"sinks has 2 .*\[num_heads\] = \[4\]"),
        (dict(alibi_slopes=torch.ones(1, 4)), "alibi_slopes has 4 .* 2 dimensions"),
        (dict(window=-1), "window is -1"),
        (dict(soft_cap=-2.0), "soft_cap is -2"),
        (dict(cu_seqlens=torch.tensor([0, 8])), "cu_seqlens has the dtype Long"),
        (dict(cu_seqlens=_cu_seqlens()), "cu_seqlens has 0 elements"),
        (dict(cu_seqlens=_cu_seqlens(1, 8)), "start at 0.*element 0 of 2 is 1"),
        (dict(cu_seqlens=_cu_seqlens(0, 5, 3, 8)), "element 2 of 4 is 3.*before 5"),
        (dict(cu_seqlens=_cu_seqlens(0, 7)), "end at 8; element 1 of 2 is 7"),
        (dict(cu_seqlens=_cu_seqlens(0, 9)), "end at 8; element 1 of 2 is 9"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_bad_input_is_refused(changes: dict[str, Any], message: str):
    case = replace(make_case((3, 5)), **changes)
    inputs = (case.query, case.key, case.value)
    with pytest.raises(RuntimeError, match=message):
        OPS.cpu_attention_forward(*inputs, *case.features)
    if "value" not in changes:
        with pytest.raises(RuntimeError, match=message):
            OPS.cpu_attention_lse(*inputs[:2], *case.features)
    if "sinks" in changes:
        return
    with pytest.raises(RuntimeError, match=message):
        lse = torch.ones(4, 8)
        OPS.cpu_attention_backward(
            case.query, *inputs, case.query, lse, *case.backward_features
        )


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(grad_output=torch.ones(8, 2, 32)), r"grad_output is \[8, 2, 32\]"),
        (dict(output=torch.ones(8, 4, 32).half()), "output has the dtype Half"),
        (dict(lse=torch.ones(8, 4)), r"lse must be .* \[4, 8\]"),
        (dict(lse=torch.ones(4, 8).double()), "lse must be .* fp32"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_bad_input_of_the_backward_is_refused(changes: dict[str, Any], message: str):
    case = make_case((3, 5))
    output, lse, *_ = run(case, case.query)
    saved = dict(grad_output=output, output=output, lse=lse) | changes
    with pytest.raises(RuntimeError, match=message):
        OPS.cpu_attention_backward(
            saved["grad_output"],
            *(case.query, case.key, case.value),
            saved["output"],
            saved["lse"],
            *case.backward_features,
        )


@pytest.mark.parametrize("features", [{}, FEATURES[-1]], ids=str)
def test_schemas(features: dict[str, Any]):
    case = make_case((3, 5), **features)
    inputs = (case.query, case.key, case.value)
    output, lse, *_ = run(case, case.query)
    utils = ("test_schema",)
    arguments = (*inputs, *case.features)
    torch.library.opcheck(OPS.cpu_attention_forward, arguments, test_utils=utils)
    arguments = (*inputs[:2], *case.features)
    torch.library.opcheck(OPS.cpu_attention_lse, arguments, test_utils=utils)
    arguments = (output, *inputs, output, lse, *case.backward_features)
    torch.library.opcheck(OPS.cpu_attention_backward, arguments, test_utils=utils)
