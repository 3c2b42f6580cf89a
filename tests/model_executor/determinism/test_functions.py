# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""torch's functions in batch-invariant mode: bits, accuracy, gradients, tracing."""

import threading

import pytest
import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint, set_checkpoint_early_stop

from vllm.model_executor.determinism import batched_matmul
from vllm.model_executor.determinism.functions import (
    _BY_FUNCTION,
    _BY_NAME,
    BatchInvariantFunctions,
    batch_invariant_functions,
)
from vllm.model_executor.determinism.mode import batch_invariant
from vllm.model_executor.determinism.pointwise import on_whole_vectors
from vllm.model_executor.determinism.row_independence import UnknownFunctions

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
WIDTH = 33
# Enough elements for a loop that is divided among threads.
NUM_ROWS = 1511


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


@pytest.fixture
def threads():
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


def weight(x, *shape):
    """Numbers that are exact in every dtype, made by functions that are traced."""
    numbers = torch.arange(torch.Size(shape).numel(), device=x.device)
    return ((numbers * 37 % 101 - 50) / 64).view(shape).to(x.dtype)


def positive(x):
    return x.abs() + 0.1


def wide(x):
    return torch.promote_types(x.dtype, torch.float32)


def complex_of(x):
    return torch.view_as_complex(F.pad(x.to(wide(x)), (0, 1)).unflatten(-1, (-1, 2)))


PRODUCTS = {
    "linear": lambda x: F.linear(x, weight(x, 5, WIDTH), weight(x, 5)),
    "linear of one": lambda x: F.linear(x, weight(x, 1, WIDTH), weight(x, 1)),
    "matmul": lambda x: x @ weight(x, WIDTH, 7),
    "matmul on the left": lambda x: (weight(x, 7, WIDTH) @ x.mT).mT,
    "mm": lambda x: torch.mm(x, weight(x, WIDTH, 7)),
    "mv": lambda x: torch.mv(x, weight(x, WIDTH)),
    "vector on the left": lambda x: weight(x, WIDTH) @ x.mT,
    "addmm": lambda x: torch.addmm(weight(x, 7), x, weight(x, WIDTH, 7)),
    "addmm scaled": lambda x: x[:, :7].addmm(x, weight(x, WIDTH, 7), beta=2, alpha=0.5),
    "inner": lambda x: torch.inner(x, weight(x, 3, WIDTH)),
    "outer": lambda x: x.unsqueeze(-1) @ weight(x, 1, 4),
    "a batch of weights": lambda x: torch.bmm(
        x.expand(3, *x.shape), weight(x, 3, WIDTH, 5)
    ).movedim(0, 1),
    "einsum of heads": lambda x: torch.einsum(
        "thd,hde->the", x.view(-1, 3, 11), weight(x, 3, 11, 4)
    ),
    "einsum of one head": lambda x: torch.einsum(
        "...d,de->...e", x.view(-1, 3, 11), weight(x, 11, 4)
    ),
    "einsum of vectors": lambda x: torch.einsum("td,td->t", x, x),
    "einsum of three": lambda x: torch.einsum(
        "td,de,ef->tf", x, weight(x, WIDTH, 4), weight(x, 4, 3)
    ),
    "einsum that sums": lambda x: torch.einsum("td->t", x),
}
# Every token is an element of the batch.
BATCHED = {
    "bmm": lambda x: torch.bmm(x.unsqueeze(1), x.unsqueeze(2) * weight(x, 4)),
    "baddbmm": lambda x: torch.baddbmm(
        weight(x, 4), x.unsqueeze(1), x.unsqueeze(2) * weight(x, 4)
    ),
    "matmul of batches": lambda x: torch.matmul(
        x.view(-1, 1, 3, 11), x.view(-1, 1, 3, 11).mT
    ),
}
REDUCTIONS = {
    "sum": lambda x: x.sum(-1),
    "sum of two dims": lambda x: x.view(-1, 3, 11).sum((1, 2), keepdim=True),
    "sum of the middle": lambda x: x.view(-1, 3, 11).sum(axis=1),
    "sum in fp32": lambda x: torch.sum(x, dim=-1, dtype=wide(x)),
    "mean": lambda x: x.mean(-1, keepdim=True),
    "softmax": lambda x: F.softmax(x, dim=-1),
    "softmax in fp32": lambda x: torch.softmax(x, -1, wide(x)),
    "method softmax": lambda x: x.view(-1, 3, 11).softmax(1),
    "softmin": lambda x: F.softmin(x, dim=-1),
    "log_softmax": lambda x: F.log_softmax(x, -1),
    "logsumexp": lambda x: x.logsumexp(-1),
    "var": lambda x: x.var(-1),
    "biased var": lambda x: x.var(-1, unbiased=False, keepdim=True),
    "std": lambda x: torch.std(x, dim=-1, correction=2),
    "var_mean": lambda x: torch.stack(torch.var_mean(x, -1), -1),
    "std_mean": lambda x: torch.stack(torch.std_mean(x, -1), -1),
    "norm": lambda x: x.norm(dim=-1),
    "torch.norm": lambda x: torch.norm(x, p=1, dim=-1, keepdim=True),
    "vector_norm": lambda x: torch.linalg.vector_norm(x, dim=-1),
    "largest": lambda x: torch.linalg.norm(x, ord=float("inf"), dim=-1),
    "Frobenius": lambda x: torch.linalg.norm(x.view(-1, 3, 11), dim=(1, 2)),
    "normalize": lambda x: F.normalize(x, dim=-1),
    "cosine_similarity": lambda x: F.cosine_similarity(x, weight(x, WIDTH), dim=-1),
    "rms_norm": lambda x: F.rms_norm(x, (WIDTH,), weight(x, WIDTH), 1e-6),
    "rms_norm without weight": lambda x: F.rms_norm(x, (WIDTH,)),
    "layer_norm": lambda x: F.layer_norm(x, (WIDTH,), weight(x, WIDTH)),
    "group_norm": lambda x: F.group_norm(x, 3, weight(x, WIDTH), weight(x, WIDTH)),
    "cumsum": lambda x: x.cumsum(-1),
}
ELEMENTWISE = {
    "sigmoid": lambda x: x.sigmoid(),
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu tanh": lambda x: F.gelu(x, approximate="tanh"),
    "softplus": F.softplus,
    "mish": F.mish,
    "elu": F.elu,
    "celu": F.celu,
    "selu": F.selu,
    "hardsigmoid": F.hardsigmoid,
    "hardswish": F.hardswish,
    "logsigmoid": F.logsigmoid,
    "tanhshrink": F.tanhshrink,
    "glu": lambda x: F.glu(x[:, 1:]),
    "exp": torch.exp,
    "exp2": torch.exp2,
    "expm1": torch.expm1,
    "log": lambda x: positive(x).log(),
    "log2": lambda x: torch.log2(positive(x)),
    "log1p": lambda x: positive(x).log1p(),
    "sin": torch.sin,
    "cos": torch.cos,
    "tanh": torch.tanh,
    "erf": torch.special.erf,
    "expit": torch.special.expit,
    "rsqrt": lambda x: positive(x).rsqrt(),
    "square": torch.square,
    "pow": lambda x: positive(x) ** 1.7,
    "cube": lambda x: x.pow(3),
    "power of a number": lambda x: 10.0**x,
    "power of tensors": lambda x: torch.pow(positive(x), weight(x, WIDTH)),
    "atan2": lambda x: torch.atan2(x, weight(x, WIDTH)),
    "addcmul": lambda x: torch.addcmul(x, x, weight(x, WIDTH), value=1.3),
    "lerp": lambda x: torch.lerp(x, weight(x, WIDTH), 0.3),
    "complex product": lambda x: torch.view_as_real(
        complex_of(x) * complex_of(weight(x, WIDTH))
    ),
    "complex in place": lambda x: torch.view_as_real(
        complex_of(x).clone().mul_(complex_of(x))
    ),
    "polar": lambda x: torch.view_as_real(torch.polar(x.to(wide(x)), x.to(wide(x)))),
    "add with a factor": lambda x: x.add(weight(x, WIDTH), alpha=1.7),
    "in place": lambda x: x.clone().sigmoid_(),
    "in place of F": lambda x: F.silu(x.clone(), True),
    "keyword": lambda x: F.elu(input=x.clone(), inplace=True),
    "out": lambda x: torch.sigmoid(x, out=torch.empty_like(x)),
}
FUNCTIONS_OF_ROWS = {**PRODUCTS, **REDUCTIONS, **ELEMENTWISE}


def rows_of(dtype, count=NUM_ROWS):
    return (2 * torch.randn(count, WIDTH, device=DEVICE)).to(dtype)


@pytest.fixture
def mode():
    with batch_invariant(), batch_invariant_functions():
        yield


@pytest.mark.usefixtures("mode")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", FUNCTIONS_OF_ROWS)
def test_a_row_does_not_depend_on_the_batch(name, dtype, threads):
    function = FUNCTIONS_OF_ROWS[name]
    x = rows_of(dtype)
    whole = function(x)
    for first, last in ((0, 1), (7, 10), (100, 137), (9, 709), (5, 1006)):
        part = function(x[first:last])
        assert torch.equal(part, whole[first:last]), (first, last)
    apart = torch.empty(NUM_ROWS, 2, WIDTH + 2, dtype=dtype, device=DEVICE)
    apart[:, 1, 1:-1] = x
    assert torch.equal(function(apart[:, 1, 1:-1]), whole), "strided"
    assert torch.equal(function(x.t().contiguous().t()), whole), "transposed"
    threads(1)
    assert torch.equal(function(x), whole), "one thread"
    threads(3)
    assert torch.equal(function(x), whole), "three threads"


@pytest.mark.usefixtures("mode")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", BATCHED)
def test_an_element_of_a_batch_does_not_depend_on_the_others(name, dtype):
    function = BATCHED[name]
    x = rows_of(dtype, 20)
    whole = function(x)
    for first, last in ((0, 1), (7, 8), (1, 4), (3, 20)):
        assert torch.equal(function(x[first:last]), whole[first:last]), (first, last)


@pytest.mark.parametrize("op", ["gelu", "sigmoid", "tanh_"])
def test_an_op_is_computed_on_whole_vectors_too(op, threads):
    op = getattr(torch.ops.aten, op).default
    x = rows_of(torch.float32, 709).cpu()
    threads(3)
    whole = on_whole_vectors(op, (x.clone(),), {})
    for first, last in ((0, 1), (7, 10), (9, 709)):
        part = on_whole_vectors(op, (x[first:last].clone(),), {})
        assert torch.equal(part, whole[first:last])


@pytest.mark.usefixtures("mode")
@pytest.mark.parametrize("products", [1, 100, 1000])
def test_blocks_of_a_batched_product_change_no_bit(products, monkeypatch):
    a = torch.randn(5, 7, WIDTH, device=DEVICE)
    b = torch.randn(5, WIDTH, 3, device=DEVICE)
    expected = a @ b
    monkeypatch.setattr(batched_matmul, "_PRODUCTS", products)
    assert torch.equal(a @ b, expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", {**FUNCTIONS_OF_ROWS, **BATCHED})
def test_results_and_gradients_are_as_accurate_as_torchs(name, dtype):
    function = {**FUNCTIONS_OF_ROWS, **BATCHED}[name]
    x = rows_of(dtype, 17)

    def computed(x):
        x = x.detach().requires_grad_(name != "out")
        y = function(x)
        if not y.requires_grad:
            return [y]
        return [y, *torch.autograd.grad(y, x, weight(x, *y.shape).to(y.dtype))]

    exact, plain = computed(x.double()), computed(x)
    with batch_invariant(), batch_invariant_functions():
        actual = computed(x)
    for got, torchs, true in zip(actual, plain, exact, strict=True):
        assert (got.dtype, got.shape) == (torchs.dtype, torchs.shape)
        allowed = 2 * rms(torchs - true) + torch.finfo(got.dtype).eps * rms(true)
        assert rms(got - true) <= allowed


def rms(x):
    return x.double().square().mean().sqrt()


EDGES = [0.0, -0.0, 1e-30, -1e-30, 20.0, -20.0, 90.0, -90.0, 1e30, -1e30]
EDGES += [float("inf"), float("-inf"), float("nan")]


@pytest.mark.parametrize("name", [n for n in ELEMENTWISE if n != "out"])
def test_edges_have_torchs_results_and_gradients(name):
    function = ELEMENTWISE[name]
    # As many as torch computes as vectors.
    x = torch.tensor(EDGES, device=DEVICE).repeat(64 * WIDTH).view(-1, WIDTH)

    def computed():
        leaf = x.clone().requires_grad_()
        y = function(leaf)
        return y, torch.autograd.grad(y.sum(), leaf)[0]

    expected = computed()
    with batch_invariant(), batch_invariant_functions():
        actual = computed()
    for got, torchs in zip(actual, expected, strict=True):
        torch.testing.assert_close(got, torchs, equal_nan=True)


def test_only_batch_invariant_mode_replaces_functions(monkeypatch):
    monkeypatch.delenv("VLLM_BATCH_INVARIANT", raising=False)
    x = rows_of(torch.float32)
    expected = x.mean(-1)
    with batch_invariant_functions():
        assert torch.equal(x.mean(-1), expected)
    with batch_invariant(), batch_invariant_functions() as outer:
        with batch_invariant_functions() as inner:
            assert isinstance(outer, BatchInvariantFunctions)
            assert inner is None
        assert not torch.equal(x.mean(-1), expected)
    assert torch.equal(x.mean(-1), expected)


def test_a_recomputed_layer_enters_the_functions_on_its_own_thread():
    """As activation checkpointing does, in the thread of the backward."""
    x = rows_of(torch.float32).requires_grad_()
    seen = []

    def layer(x):
        with batch_invariant_functions():
            result = F.softmax(x, dim=-1)
        seen.append(result.detach())
        return result

    with (
        batch_invariant(),
        batch_invariant_functions(),
        set_checkpoint_early_stop(False),
    ):
        output = checkpoint(layer, x, use_reentrant=False)
        loss = output.square().sum()

        worker = threading.Thread(target=loss.backward)
        worker.start()
        worker.join()
    assert len(seen) == 2
    assert torch.equal(*seen)
    assert x.grad is not None


TRACED = {
    "products": ("linear", "matmul", "addmm", "outer", "a batch of weights"),
    "einsum": ("einsum of heads", "einsum of vectors"),
    "sums": ("sum", "mean", "norm", "var"),
    "exponentials": ("softmax", "log_softmax", "rms_norm"),
    "elementwise": ("sigmoid", "silu", "power of a number", "glu", "in place of F"),
}


@pytest.mark.parametrize("kind", TRACED)
def test_dynamo_traces_functions(kind):
    torch._dynamo.reset()
    functions = [FUNCTIONS_OF_ROWS[name] for name in TRACED[kind]]

    def forward(x):
        with batch_invariant_functions():
            return [2 * function(x) for function in functions]

    def gradient(outputs, x):
        return torch.autograd.grad(sum(y.sum() for y in outputs), x)[0]

    compiled = torch.compile(forward, fullgraph=True, backend="aot_eager", dynamic=True)
    x = rows_of(torch.float32, 128).requires_grad_()
    with batch_invariant():
        actual, expected = compiled(x), forward(x)
        few = compiled(x[:64].detach())
    torch.testing.assert_close(actual, expected)
    # Loops over elements are the compiler's.
    if kind != "elementwise":
        for got, eager, part in zip(actual, expected, few, strict=True):
            assert torch.equal(got, eager)
            assert torch.equal(part, eager[:64])
    torch.testing.assert_close(gradient(actual, x), gradient(expected, x))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", {**PRODUCTS, **REDUCTIONS, **BATCHED})
def test_autocast_gives_torchs_dtypes(name, dtype):
    function = {**PRODUCTS, **REDUCTIONS, **BATCHED}[name]
    x = rows_of(dtype, 3)
    with torch.autocast(DEVICE.type, torch.bfloat16):
        expected = function(x)
        with batch_invariant(), batch_invariant_functions():
            actual = function(x)
    assert actual.dtype == expected.dtype
    torch.testing.assert_close(actual, expected, rtol=0.1, atol=0.2)


def test_all_forms_of_a_function_are_replaced():
    """A form that torch adds in another namespace has to be found, too."""
    forms = {
        function
        for function in torch.overrides.get_testing_overrides()
        if getattr(function, "__name__", None) in _BY_NAME
    }
    assert len(forms) > 200
    assert forms <= set(_BY_FUNCTION)


def test_rows_that_are_added_on_cpu_keep_their_order():
    """Each token gets the results of its experts in the order of the experts."""
    x = rows_of(torch.float32, 3 * 700).cpu().view(3, 700, WIDTH)

    def forward(x):
        expert, token = (x[..., 0] > -1).nonzero().unbind(1)
        total = torch.zeros(x.shape[1:])
        return total.index_add_(0, token, x[expert, token])

    whole = forward(x)
    for first, last in ((0, 1), (7, 10), (100, 137)):
        assert torch.equal(forward(x[:, first:last]), whole[first:last])
    assert unknown(forward, x) == []


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("width", [3, 8, 33, 64])
def test_scattered_rows_are_added_in_order(width, dtype):
    """The same by an index for each element, however wide a row is."""
    x = rows_of(dtype, 3 * 700).cpu().repeat(1, 2)[:, :width].reshape(3, 700, width)

    def forward(x):
        rows = x.flatten(0, 1)
        token = torch.arange(x.shape[1]).repeat(3)[:, None].expand(-1, width)
        return torch.zeros(x.shape[1:], dtype=dtype).scatter_add(0, token, rows)

    whole = forward(x)
    for first, last in ((0, 1), (7, 10), (100, 137)):
        assert torch.equal(forward(x[:, first:last]), whole[first:last])
    assert bool(unknown(forward, x)) == torch.cuda.is_available()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.usefixtures("mode")
def test_a_row_of_a_group_does_not_depend_on_the_others(dtype):
    """Groups of other sizes, empty ones, and rows behind the last group."""
    x = rows_of(dtype, 300).repeat(1, 2)[:, :64].requires_grad_()
    weights = weight(x.detach(), 4, 64, 8).requires_grad_()

    def product(rows, *ends):
        offs = torch.tensor(ends, dtype=torch.int32, device=DEVICE)
        with batch_invariant_functions():
            return torch._grouped_mm(rows, weights, offs=offs)

    whole = product(x, 100, 100, 290, 300)
    assert torch.equal(product(x[97:103], 3, 3, 6, 6), whole[97:103])
    assert torch.equal(product(x[289:291], 0, 0, 1, 2), whole[289:291])
    if DEVICE.type == "cpu":
        assert not product(x[:5], 0, 1, 2, 3)[3:].any()
    groups = [(0, slice(100)), (2, slice(100, 290)), (3, slice(290, 300))]
    doubles = [each.detach().double().requires_grad_() for each in (x, weights)]
    exact = torch.cat([doubles[0][rows] @ doubles[1][g] for g, rows in groups])
    torch.testing.assert_close(whole.double(), exact, **TOLERANCES[dtype])
    gradient = weight(whole, *whole.shape)
    found = torch.autograd.grad(whole, (x, weights), gradient)
    expected = torch.autograd.grad(exact, doubles, gradient.double())
    for one, other in zip(found, expected):
        torch.testing.assert_close(one.double(), other, **TOLERANCES[dtype])


# K products of numbers below 1, and a rounding of the result.
TOLERANCES = {
    torch.float32: dict(rtol=1e-5, atol=1e-4),
    torch.bfloat16: dict(rtol=2**-7, atol=2**-7),
}


@torch.library.custom_op("tests::doubled", mutates_args=())
def doubled(x: torch.Tensor) -> torch.Tensor:
    return x * 2


@torch.library.custom_op("tests::convolved", mutates_args=())
def convolved(x: torch.Tensor) -> torch.Tensor:
    return F.conv1d(x[:, None], x[:1, None, :3])[:, 0]


def test_an_op_in_python_is_known_if_what_it_calls_is():
    x = rows_of(torch.float32, 8)
    assert unknown(doubled, x) == []
    assert unknown(convolved, x) == [("convolved.default", "tests.convolved.default")]


def unknown(function, *args):
    found = []
    with UnknownFunctions(lambda *names: found.append(names)):
        function(*args)
    return found


@pytest.mark.usefixtures("mode")
@pytest.mark.parametrize("name", FUNCTIONS_OF_ROWS)
def test_replaced_functions_are_known(name):
    function = FUNCTIONS_OF_ROWS[name]
    assert unknown(function, rows_of(torch.bfloat16, 8)) == []


def test_functions_that_copy_compare_or_round_once_are_known():
    def forward(x):
        x = torch.cat((x[:, :16], -x[:, 16:]), -1).view(-1, 3, 11).transpose(0, 1)
        x.clone().masked_fill_(x > 0, 0).fill_(1).clamp_(0, 1).zero_()
        x = (x + 1) * x / 3 - x.clamp(-1, 1).relu()
        x = torch.where(x > 0, x, x.amax(-1, keepdim=True)).masked_fill(x == 0, 2)
        scores, chosen = x.topk(2, dim=-1)
        counts = F.one_hot(chosen, 11).sum(0).cumsum(-1)
        table = torch.zeros(11, 5, device=x.device)
        table[chosen[0, 0]] = 1.0
        return F.embedding(chosen, table), scores.to(torch.bfloat16), counts.argmax()

    assert unknown(forward, rows_of(torch.float32, 8)) == []


@pytest.mark.parametrize(
    ("function", "name", "op"),
    [
        (
            lambda x: F.conv1d(x[None], x[:, None, :3], groups=8),
            "conv1d",
            "convolution",
        ),
        (lambda x: torch.fft.rfft(x), "fft_rfft", "_fft_r2c"),
        (
            lambda x: x.scatter_reduce(0, x.long() * 0, x, "mean"),
            "scatter_reduce",
            "scatter_reduce",
        ),
        (lambda x: x.double() @ x.double().T, "matmul", "mm"),
        (lambda x: torch.cdist(x, x), "cdist", "_cdist_forward"),
        (lambda x: x.cumprod(-1), "cumprod", "cumprod"),
        (
            lambda x: x.clone().index_put_((x[:, 0].long() * 0,), x, accumulate=True),
            "index_put_",
            "index_put_",
        ),
        (
            lambda x: F.scaled_dot_product_attention(x[None], x[None], x[None]),
            "scaled_dot_product_attention",
            None,
        ),
    ],
)
def test_other_functions_are_reported(function, name, op):
    found = unknown(function, rows_of(torch.float32, 8))
    assert found
    assert {function for function, _ in found} == {name}
    assert op is None or op in {op.split(".")[1] for _, op in found}


@pytest.mark.usefixtures("mode")
def test_products_without_a_kernel_are_refused():
    x = rows_of(torch.float32, 3)
    with pytest.raises(NotImplementedError, match="bilinear"):
        F.bilinear(x, x, torch.zeros(2, WIDTH, WIDTH, device=DEVICE))
    with pytest.raises(NotImplementedError, match="diagonal"):
        torch.einsum("ii->i", x[:3, :3])
    assert torch.equal(torch.einsum(x, [0, 1], [0]), x.sum(-1))
    with pytest.raises(ValueError, match="2 operands"):
        torch.einsum("ab,bc", x)


@pytest.mark.usefixtures("mode")
def test_integers_and_errors_are_torchs():
    counts = torch.arange(6, device=DEVICE).view(2, 3)
    assert counts.sum(-1).tolist() == [3, 12]
    assert counts.cumsum(-1).tolist() == [[0, 1, 3], [3, 7, 12]]
    assert (counts > 1).sum().dtype == torch.int64
    with pytest.raises(RuntimeError, match="cannot be multiplied"):
        torch.ones(2, 3, device=DEVICE) @ torch.ones(2, 3, device=DEVICE)
    with pytest.raises(IndexError):
        torch.ones(2, 3, device=DEVICE).sum(2)


@pytest.mark.usefixtures("mode")
def test_shapes_at_the_edge():
    one = torch.tensor(3.0, device=DEVICE)
    assert one.sum() == one.sum(0) == one.mean() == one.softmax(0) * 3 == 3
    assert one.sigmoid() == torch.full((64,), 3.0, device=DEVICE).sigmoid()[0]
    empty = torch.ones(0, 4, device=DEVICE)
    assert empty.sum().item() == 0
    assert empty.sum(0).tolist() == [0, 0, 0, 0]
    assert empty.mT.mean(-1).isnan().all()
    assert F.silu(empty).shape == F.softmax(empty, -1).shape == (0, 4)
    assert (empty @ empty.new_ones(4, 3)).shape == (0, 3)
    assert (empty.mT @ empty).tolist() == [[0] * 4] * 4
    ones = torch.ones(2, 5, device=DEVICE)
    assert (torch.addmm(ones[0, :1], ones, ones.mT, beta=2) == 7).all()


@pytest.mark.usefixtures("mode")
def test_an_elementwise_result_has_the_strides_of_torchs():
    x = torch.randn(4, 5, 6, device=DEVICE).transpose(0, 2)
    expected = torch.abs(x).stride()
    assert x.sigmoid().stride() == expected
    assert torch.pow(x.abs(), x).stride() == expected
