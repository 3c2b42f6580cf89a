# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""Linears, embedding and head on one rank; construction for several."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from vllm.model_executor.checkpoint.specification import local_from_full, local_shape
from vllm.model_executor.layers.training import (
    ColumnParallelLinear,
    MergedColumnParallelLinear,
    ParallelLMHead,
    QKVParallelLinear,
    RowParallelLinear,
    TrainingLayer,
    VLLMFlashAttention,
    VocabParallelEmbedding,
    skip_init,
)
from vllm.model_executor.parallel_context import ParallelContext

pytestmark = pytest.mark.usefixtures("on_device")

BUILDERS = {
    "column": lambda **kw: ColumnParallelLinear(12, 8, **kw),
    "row": lambda **kw: RowParallelLinear(8, 12, **kw),
    "merged": lambda **kw: MergedColumnParallelLinear(12, [8, 4], **kw),
    "qkv": lambda **kw: QKVParallelLinear(12, 4, 4, 2, **kw),
    "mqa": lambda **kw: QKVParallelLinear(12, 4, 4, 1, **kw),
    "embedding": lambda **kw: VocabParallelEmbedding(100, 12, **kw),
    "head": lambda **kw: ParallelLMHead(100, 12, True, **kw),
}
LINEARS = ("column", "row", "merged", "qkv", "head")


def ranks(size):
    return [ParallelContext(tp_rank=r, tp_size=size, rank=r) for r in range(size)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rows", [1, 5, 63, 123])
@pytest.mark.parametrize("name", LINEARS)
def test_linears_are_torchs(name, rows, dtype, single, assert_equal):
    layer = BUILDERS[name](params_dtype=dtype, parallel_context=single)
    x = torch.randn(rows, layer.weight.shape[1]).to(dtype).requires_grad_()
    leaves = [x, layer.weight, layer.bias]

    def results(output):
        return [output, *torch.autograd.grad(output.square().sum(), leaves)]

    expected = results(F.linear(x, layer.weight, layer.bias))
    names = ("output", "dx", "dweight", "dbias")
    for what, a, b in zip(names, results(layer(x)), expected):
        assert_equal(what, a, b)


def test_embedding_is_torchs(single, assert_equal):
    layer = VocabParallelEmbedding(100, 12, parallel_context=single)
    ids = torch.randint(100, (3, 7), dtype=torch.int32)
    output = layer(ids)
    assert_equal("output", output, F.embedding(ids, layer.weight))
    (grad,) = torch.autograd.grad(output.sum(), layer.weight)
    counts = torch.bincount(ids.flatten(), minlength=100).float()
    assert_equal("dweight", grad, counts[:, None].expand(100, 12))


@pytest.mark.parametrize("name", list(BUILDERS))
def test_shards_are_cut_from_what_one_rank_draws(name, single, assert_equal):
    def build(context):
        torch.manual_seed(7)
        return BUILDERS[name](parallel_context=context)

    full = build(single)
    for tp_size in (2, 4):
        for context in ranks(tp_size):
            layer = build(context)
            shardings = layer.parameter_sharding()
            assert shardings.keys() == dict(layer.named_parameters()).keys()
            for parameter, sharding in shardings.items():
                local = getattr(layer, parameter)
                assert local.shape == local_shape(sharding, tp_size)
                assert local.requires_grad and type(local) is nn.Parameter
                whole = getattr(full, parameter).detach()
                expected = local_from_full(whole, sharding, context.tp_rank, tp_size)
                assert_equal(parameter, local.detach(), expected)


def test_heads_on_each_rank(second_of_two):
    layer = QKVParallelLinear(12, 4, 8, 4, parallel_context=second_of_two)
    assert (layer.num_heads, layer.num_kv_heads) == (4, 2)
    assert layer.num_kv_head_replicas == 1
    assert layer.weight.shape == (4 * 4 + 2 * 2 * 4, 12)
    layer = QKVParallelLinear(12, 4, 8, 1, parallel_context=second_of_two)
    assert (layer.num_kv_heads, layer.num_kv_head_replicas) == (1, 2)


def test_vocabulary_is_padded_only_over_several_ranks(single, second_of_two):
    assert (
        VocabParallelEmbedding(100, 4, parallel_context=single).weight.shape[0] == 100
    )
    head = ParallelLMHead(100, 4, True, parallel_context=second_of_two)
    assert head.weight.shape == (64, 4) and head.bias.shape == (64,)
    assert head.weight[36:].eq(0).all() and head.weight[:36].ne(0).any()
    assert head.parameter_sharding()["weight"].shape == (100, 4)


def test_tied_weights_are_one_parameter(single):
    embedding = VocabParallelEmbedding(10, 4, parallel_context=single)
    head = ParallelLMHead(10, 4, parallel_context=single).tie_weights(embedding)
    assert head.weight is embedding.weight
    model = copy.deepcopy(nn.ModuleList([embedding, head]))
    assert model[0].weight is model[1].weight is not embedding.weight
    with pytest.raises(ValueError, match=r"\(11, 4\).*cannot be tied.*\(10, 4\)"):
        head.tie_weights(VocabParallelEmbedding(11, 4, parallel_context=single))
    with pytest.raises(ValueError, match="torch.bfloat16 cannot be tied"):
        head.tie_weights(
            VocabParallelEmbedding(
                10, 4, params_dtype=torch.bfloat16, parallel_context=single
            )
        )


def test_return_bias_and_default_dtype(single):
    output, bias = ColumnParallelLinear(
        4, 6, return_bias=True, parallel_context=single
    )(torch.zeros(2, 4))
    assert output.shape == (2, 6) and bias is None
    torch.set_default_dtype(torch.bfloat16)
    try:
        layer = ColumnParallelLinear(4, 6, parallel_context=single)
    finally:
        torch.set_default_dtype(torch.float32)
    assert layer.weight.dtype == torch.bfloat16


def test_skip_init_and_meta_device(single, monkeypatch, device):
    calls = []
    monkeypatch.setattr(
        ColumnParallelLinear, "reset_parameters", lambda self: calls.append(self)
    )
    with skip_init():
        ColumnParallelLinear(4, 6, parallel_context=single)
    assert not calls
    layer = ColumnParallelLinear(4, 6, parallel_context=single)
    assert calls == [layer]
    monkeypatch.undo()
    with torch.device("meta"):
        block = VLLMFlashAttention(8, 2, parallel_context=single)
    block.to_empty(device=device)
    for module in block.modules():
        if isinstance(module, TrainingLayer):
            module.reset_parameters()
    assert block(torch.randn(3, 8)).isfinite().all()


def test_layers_take_the_process_as_single_without_groups():
    assert ColumnParallelLinear(4, 6).parallel_context == ParallelContext.single()


CONSTRUCTIONS = [
    (lambda c: ColumnParallelLinear(4, 5, parallel_context=c), "output_size=5 of"),
    (lambda c: RowParallelLinear(5, 4, parallel_context=c), "input_size=5 of"),
    (
        lambda c: MergedColumnParallelLinear(4, [4, 3], parallel_context=c),
        r"output_sizes\[1\]=3 is not divisible by tp_size=2",
    ),
    (
        lambda c: QKVParallelLinear(4, 4, 3, parallel_context=c),
        "total_num_heads=3 is not divisible by tp_size=2",
    ),
    (
        lambda c: QKVParallelLinear(4, 4, 6, 3, parallel_context=c),
        "total_num_kv_heads=3 is not divisible by tp_size=2",
    ),
    (
        lambda c: QKVParallelLinear(4, 4, 6, 4, parallel_context=c),
        "total_num_heads=6 must be a positive multiple of total_num_kv_heads=4",
    ),
    (
        lambda c: QKVParallelLinear(4, 4, 6, 2, parallel_context=ranks(3)[0]),
        "tp_size=3 is not a multiple of total_num_kv_heads=2",
    ),
    (
        lambda c: VLLMFlashAttention(12, 3, parallel_context=c),
        "total_num_heads=3 is not divisible by tp_size=2",
    ),
    (
        lambda c: ParallelLMHead(100, 4, parallel_context=ranks(3)[0]),
        "num_embeddings=100 is padded to 128.*tp_size=3 does not",
    ),
    (lambda c: VocabParallelEmbedding(0, 4, parallel_context=c), "num_embeddings=0"),
    (
        lambda c: RowParallelLinear(4, 4, reduce_results=False, parallel_context=c),
        "bias=True with reduce_results=False",
    ),
    (
        lambda c: QKVParallelLinear(4, 4, 2, part_names=("q", "k"), parallel_context=c),
        "must hold 3 different names",
    ),
    (
        lambda c: MergedColumnParallelLinear(
            4, [2, 2], part_names=("up", "up"), parallel_context=c
        ),
        "must hold 2 different names",
    ),
    (
        lambda c: ColumnParallelLinear(
            4, 4, params_dtype=torch.float8_e4m3fn, parallel_context=c
        ),
        "float8_e4m3fn is not supported; use torch.float32, torch.bfloat16",
    ),
]


@pytest.mark.parametrize(
    ("build", "message"), CONSTRUCTIONS, ids=[message for _, message in CONSTRUCTIONS]
)
def test_constructions_that_do_not_divide_are_refused(build, message, second_of_two):
    with pytest.raises(ValueError, match=message):
        build(second_of_two)


def test_inputs_of_the_wrong_size_are_refused(single, second_of_two):
    column = ColumnParallelLinear(4, 6, parallel_context=single)
    with pytest.raises(ValueError, match=r"got an input of shape \(2, 5\).*must be 4"):
        column(torch.zeros(2, 5))
    row = RowParallelLinear(4, 6, parallel_context=second_of_two)
    with pytest.raises(ValueError, match=r"shape \(2, 4\).*must be 2"):
        row(torch.zeros(2, 4))
    with pytest.raises(ValueError, match=r"hidden states of shape \(2, 5\).*must be 4"):
        ParallelLMHead(10, 4, parallel_context=single)(torch.zeros(2, 5))


def test_a_collective_without_a_group_says_what_is_missing(second_of_two):
    column = ColumnParallelLinear(4, 6, parallel_context=second_of_two)
    with pytest.raises(RuntimeError, match="tp_size=2 but tp_group=None"):
        column(torch.zeros(2, 4))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_reduction_shards_are_summed_in_order_and_rounded_once(dtype, assert_equal):
    context = ParallelContext(tp_reduction_shards=4)
    row = RowParallelLinear(32, 8, params_dtype=dtype, parallel_context=context)
    x = torch.randn(5, 32, dtype=dtype, requires_grad=True)
    output = row(x)

    first, *others = zip(x.chunk(4, -1), row.weight.chunk(4, -1), strict=True)
    expected = F.linear(*first, row.bias).float()
    for part, weight in others:
        expected = expected + F.linear(part, weight)
    assert_equal("output", output, expected.to(dtype))

    grad = torch.randn_like(output)
    grads = torch.autograd.grad(output, (x, row.weight, row.bias), grad)
    whole = F.linear(x, row.weight, row.bias)
    expected_grads = torch.autograd.grad(whole, (x, row.weight, row.bias), grad)
    for actual, wanted in zip(grads, expected_grads, strict=True):
        torch.testing.assert_close(actual, wanted)


def test_reduction_shards_that_do_not_fit_are_refused():
    context = ParallelContext(tp_reduction_shards=4)
    with pytest.raises(ValueError, match="input_size=10 .*tp_reduction_shards=4"):
        RowParallelLinear(10, 8, parallel_context=context)
    with pytest.raises(ValueError, match="reduce_results=False with tp_reduction_sh"):
        RowParallelLinear(
            8, 8, bias=False, reduce_results=False, parallel_context=context
        )


@pytest.mark.parametrize("name", ["column", "row", "merged", "qkv"])
def test_wrong_dtypes_are_refused(name, single):
    layer = BUILDERS[name](parallel_context=single)
    x = torch.randn(3, layer.weight.shape[1])
    with pytest.raises(ValueError, match="bfloat16, but its weight is torch.float32"):
        layer(x.bfloat16())
    with torch.autocast(x.device.type, torch.bfloat16):
        assert layer(x.bfloat16()).dtype == torch.bfloat16


@pytest.mark.parametrize("name", ["column", "row", "merged", "qkv"])
def test_wrong_devices_are_refused(name, single, device):
    layer = BUILDERS[name](parallel_context=single)
    x = torch.empty(3, layer.weight.shape[1], device="meta")
    with pytest.raises(ValueError, match=f"on meta, but its weight is on {device}"):
        layer(x)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bool])
def test_ids_are_integers(dtype, single):
    layer = VocabParallelEmbedding(100, 12, parallel_context=single)
    with pytest.raises(TypeError, match=f"ids of {dtype}.*torch.int64"):
        layer(torch.ones(3).to(dtype))


@pytest.mark.parametrize("name", LINEARS)
def test_no_rows(name, single):
    layer = BUILDERS[name](parallel_context=single)
    x = torch.randn(0, layer.weight.shape[1], requires_grad=True)
    layer(x).sum().backward()
    assert x.grad.shape == x.shape
    assert layer.weight.grad.eq(0).all() and layer.bias.grad.eq(0).all()
