# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""Batch-invariant mode of the layers: what it promises, without an engine."""

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from vllm.model_executor.determinism.linear.op import linear
from vllm.model_executor.determinism.mode import is_batch_invariant
from vllm.model_executor.determinism.ordered_sum import ordered_sum
from vllm.model_executor.determinism.query_lengths import cut_requests
from vllm.model_executor.layers.training import (
    TrainableAttention,
    full_logprobs,
    token_logprobs,
)
from vllm.model_executor.models.generic_transformer import (
    GenericTransformerConfig,
    GenericTransformerForCausalLM,
)
from vllm.training import batch_invariant

pytestmark = pytest.mark.usefixtures("on_device")

ON_CUDA = torch.cuda.is_available()
# The dtypes of the engine's attention on Hopper GPUs.
DTYPES = [torch.bfloat16] if ON_CUDA else [torch.float32, torch.bfloat16]
ROWS = (1, 2, 3, 7, 8, 16, 33, 64, 65, 129, 255)


def make_model(dtype):
    torch.manual_seed(0)
    config = GenericTransformerConfig(
        vocab_size=300,
        hidden_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=64,
    )
    return GenericTransformerForCausalLM(config).to(dtype)


def packed(lengths):
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(300, (sum(lengths),), generator=generator, device="cpu")
    bounds = torch.tensor([0, *lengths]).cumsum(0, dtype=torch.int32)
    return ids.to(bounds.device), bounds


def test_the_mode_can_be_nested_and_ends(monkeypatch):
    monkeypatch.delenv("VLLM_BATCH_INVARIANT", raising=False)
    assert not is_batch_invariant()
    with batch_invariant():
        with pytest.raises(KeyError), batch_invariant():
            raise KeyError
        assert is_batch_invariant()
    assert not is_batch_invariant()
    monkeypatch.setenv("VLLM_BATCH_INVARIANT", "1")
    assert is_batch_invariant()


# AMX, where a CPU has it, adds up many columns in several orders.
@pytest.mark.parametrize(
    ("num_rows", "depth", "size"), [(300, 200, 72), (1024, 1024, 256)]
)
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_rows_of_a_product_do_not_depend_on_their_number(
    dtype, bias, num_rows, depth, size, assert_equal
):
    weight = torch.randn(size, depth).to(dtype)
    offset = torch.randn(size).to(dtype) if bias else None
    x = torch.randn(num_rows, depth).to(dtype)
    with batch_invariant():
        whole = linear(x, weight, offset)
        for rows in ROWS:
            assert_equal(
                f"{rows} rows", linear(x[-rows:], weight, offset), whole[-rows:]
            )
        batched = x[:300].view(3, 100, depth)
        assert_equal("batched", linear(batched, weight, offset)[1], whole[100:200])
        assert linear(x[:0], weight, offset).shape == (0, size)


def strided(rows, columns, dtype):
    """Matrices of every kind of strides, those of tensors that overlap among them."""
    x = torch.randn(2 * rows + 3, 2 * columns + 3).to(dtype)
    flat = x.flatten()
    return [
        x[:rows, 1 : columns + 1],
        x[: 2 * rows : 2, : 2 * columns : 2],
        x[:1, :columns].expand(rows, columns),
        x[:rows, :1].expand(rows, columns),
        torch.randn(columns, rows).to(dtype).t(),
        torch.randn(2 * columns, rows + 1).to(dtype)[::2, :rows].t(),
        flat.as_strided((rows, columns), (1, 1)),
        flat.as_strided((rows, columns), (2, 1)),
    ]


@pytest.mark.parametrize("features", [1, 6])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_strides_of_a_product_change_nothing(dtype, features, assert_equal):
    size = 5
    biases = [torch.randn(1).expand(size), torch.randn(size, 3)[:, 1], None]
    for x in strided(3, features, dtype):
        for index, weight in enumerate(strided(size, features, dtype)):
            bias = biases[index % len(biases)]
            bias = None if bias is None else bias.to(dtype)
            inputs = (x, weight, bias)
            plain = [
                None if t is None else t.clone(memory_format=torch.contiguous_format)
                for t in inputs
            ]
            with batch_invariant():
                actual, expected = linear(*inputs), linear(*plain)
            what = f"{x.stride()}, {weight.stride()}"
            assert_equal(what, actual, expected)
            products = [
                torch.nn.functional.linear(
                    *(None if t is None else f(t) for t in plain)
                )
                for f in (torch.Tensor.double, lambda t: t.double().abs())
            ]
            # Each number is rounded once, on CUDA to TF32, and so are sum and bias.
            eps = max(torch.finfo(dtype).eps, 2**-10 if ON_CUDA else 0)
            error = (actual.double() - products[0]).abs()
            assert (error <= eps * (features + 2) * products[1]).all(), what


# On CUDA vLLM's kernel multiplies fp32 in TF32.
@pytest.mark.parametrize(
    "dtype", [torch.bfloat16, torch.float16] + ([] if ON_CUDA else [torch.float32])
)
def test_a_product_is_accurate_and_has_gradients(dtype, assert_as_accurate):
    leaves = [torch.randn(shape).to(dtype) for shape in ((37, 96), (40, 96), (40,))]
    grad = torch.randn(37, 40).to(dtype)

    def run(function, dtype):
        inputs = [leaf.to(dtype).requires_grad_() for leaf in leaves]
        output = function(*inputs)
        return output, *torch.autograd.grad(output, inputs, grad.to(dtype))

    with batch_invariant():
        actual = run(linear, dtype)
    plain = run(torch.nn.functional.linear, dtype)
    exact = run(torch.nn.functional.linear, torch.float64)
    for name, *results in zip(
        ("y", "dx", "dw", "db"), actual, plain, exact, strict=True
    ):
        assert_as_accurate(name, *results)


@pytest.mark.parametrize(
    ("x_shape", "dtype", "bias_size"),
    [
        ((3, 31), torch.float16, 8),
        ((3, 32), torch.bfloat16, 8),
        ((3, 32), torch.float16, 7),
    ],
)
def test_products_that_do_not_fit_are_refused(x_shape, dtype, bias_size):
    weight = torch.zeros(8, 32, dtype=torch.float16)
    x, bias = torch.zeros(x_shape, dtype=dtype), torch.zeros(bias_size, dtype=dtype)
    with (
        batch_invariant(),
        pytest.raises(ValueError, match=r"got x: torch\.\w+ \(3, 3\d\) on"),
    ):
        linear(x, weight, bias)


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_models_bits_do_not_depend_on_what_else_is_computed(dtype, assert_equal):
    model = make_model(dtype)
    lengths = [1, 2, 9, 64, 131]
    ids, bounds = packed(lengths)
    with batch_invariant(), torch.no_grad():
        whole = model.model(ids, None, bounds)
        for start, length in zip(bounds.tolist(), lengths):
            own = ids[start : start + length]
            alone = model.model(own, None, None)
            assert_equal("alone", alone, whole[start : start + length])
            assert_equal("batched", model.model(own[None])[0], alone)
            cut = (length + 1) // 2
            assert_equal("prefix", model.model(own[:cut], None, None), alone[:cut])


@pytest.mark.parametrize("dtype", DTYPES)
def test_logprobs_do_not_depend_on_what_else_is_computed(dtype, assert_equal):
    model = make_model(dtype)
    hidden = torch.randn(70, 128).to(dtype)
    targets = torch.randint(300, (70,))
    with batch_invariant(), torch.no_grad():
        whole = token_logprobs(hidden, model.lm_head, targets)
        rows = full_logprobs(hidden, model.lm_head)
        assert_equal("full", rows.gather(1, targets[:, None])[:, 0], whole)
        for count in (1, 2, 17):
            some = token_logprobs(hidden[:count], model.lm_head, targets[:count])
            assert_equal(f"{count} rows", some, whole[:count])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("how", ["eager", "compiled", "checkpointed", "autocast"])
def test_every_parameter_gets_its_gradient(dtype, how):
    model = make_model(torch.float32 if how == "autocast" else dtype)
    ids, bounds = packed([5, 60])

    def loss_of(model):
        if how == "checkpointed":
            hidden = checkpoint(model.model, ids, None, bounds, use_reentrant=False)
        else:
            hidden = model.model(ids, None, bounds)
        return -token_logprobs(hidden[:-1], model.lm_head, ids[1:]).mean()

    def gradients(function):
        model.zero_grad()
        with torch.autocast(ids.device.type, torch.bfloat16, enabled=how == "autocast"):
            loss = function(model)
        loss.backward()
        return {name: p.grad.clone() for name, p in model.named_parameters()}

    compiled = torch.compile(loss_of, fullgraph=True)
    with batch_invariant():
        actual = gradients(compiled if how == "compiled" else loss_of)
    plain = gradients(loss_of)
    half = dtype == torch.bfloat16 or how == "autocast"
    for name, grad in actual.items():
        assert grad.any(), name
        scale = plain[name].abs().max().item()
        bound = 0.05 if half else 1e-4
        torch.testing.assert_close(grad, plain[name], rtol=0, atol=bound * scale)


def test_attention_without_the_engines_bits_is_refused():
    attention = TrainableAttention(2, 64, implementation="reference")
    q, k, v = torch.randn(3, 4, 2, 64)
    with batch_invariant():
        with pytest.raises(
            ValueError, match="'reference' cannot compute .*has not the bits"
        ):
            attention(q, k, v)
        with pytest.raises(
            ValueError,
            match="No attention implementation can compute .* the forward "
            r"'vllm_\w+' takes head.* 32",
        ):
            TrainableAttention(2, 8)(*torch.randn(3, 4, 2, 8))


def test_the_sum_over_ranks_has_one_order_and_one_rounding():
    parts = torch.tensor([1.0, 2**-8, 2**-8], dtype=torch.bfloat16)
    assert ordered_sum(parts).item() == 1 + 2**-7
    assert parts[0] + parts[1] + parts[2] == 1
    large = torch.tensor([1e8, 1.0, -1e8])
    assert ordered_sum(large).item() == 0 != ordered_sum(large[[0, 2, 1]]).item()


@pytest.mark.parametrize(("heads", "piece"), [(2, 8), (4, 4), (16, 1), (6, 8), (32, 8)])
def test_requests_are_cut_into_pieces_of_their_tokens(heads, piece):
    """Against one token at a time: the same tokens see the same keys."""
    lengths, seen = [1, 20, 3, 8], [5, 20, 103, 8]
    with torch.device("cpu"):
        bounds = torch.tensor([0, *lengths]).cumsum(0, dtype=torch.int32)
        table = torch.arange(8, dtype=torch.int32).view(4, 2)
        seq_lens = torch.tensor(seen, dtype=torch.int32)
        pieces = cut_requests(bounds, seq_lens, table, True, heads, 2)
    assert pieces.max_query_len == piece
    starts = pieces.query_start_loc.tolist()
    assert starts[0] == 0 and starts[-1] == sum(lengths)
    visible = []
    for index in range(pieces.num_reqs):
        first, last = starts[index : index + 2]
        assert 0 < last - first <= piece
        row = pieces.block_table[index].tolist()
        for token in range(first, last):
            visible.append((row, pieces.seq_lens[index].item() - (last - 1 - token)))
    assert visible == [
        ([2 * request, 2 * request + 1], total - length + position + 1)
        for request, (length, total) in enumerate(zip(lengths, seen))
        for position in range(length)
    ]
    with pytest.raises(NotImplementedError, match="causal attention only"):
        cut_requests(bounds, seq_lens, table, False, heads, 2)
