# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""TrainableAttention outside the engine: accuracy, layouts, packing, bad input."""

import copy
import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from vllm.model_executor.layers.training import TrainableAttention
from vllm.model_executor.layers.training.ops.attention import dispatch, masked, sdpa
from vllm.model_executor.layers.training.ops.attention.reference import (
    attention_reference,
)
from vllm.model_executor.layers.training.ops.attention.spec import AttentionSpec
from vllm.model_executor.parallel_context import ParallelContext

RAGGED = [1, 5, 63, 123]
FEATURES = [
    {},
    {"causal": False},
    {"sliding_window": 7},
    {"causal": False, "sliding_window": 7},
    {"logits_soft_cap": 2.0},
    {"sliding_window": 200, "logits_soft_cap": 5.0},
]


def make_qkv(num_tokens, num_heads, num_kv_heads, head_size, dtype, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [
        torch.randn(num_tokens, heads, head_size, generator=generator)
        .to(dtype)
        .requires_grad_()
        for heads in (num_heads, num_kv_heads, num_kv_heads)
    ]


def cu_seqlens_of(seqlens):
    return torch.tensor([0, *seqlens]).cumsum(0, dtype=torch.int32)


def attend(num_heads=4, head_size=16, num_kv_heads=2, **features):
    return TrainableAttention(
        num_heads,
        head_size,
        num_kv_heads=num_kv_heads,
        parallel_context=ParallelContext.single(),
        **features,
    )


@pytest.mark.parametrize(
    ("dtype", "num_kv_heads", "features"),
    [
        *itertools.product([torch.float32, torch.bfloat16], [4, 2, 1], FEATURES),
        *itertools.product([torch.float16], [2], [FEATURES[0], FEATURES[-1]]),
    ],
    ids=str,
)
def test_output_and_gradients_are_accurate(
    dtype, num_kv_heads, features, assert_as_accurate
):
    qkv = make_qkv(sum(RAGGED), 4, num_kv_heads, 32, dtype)
    grad = torch.randn(sum(RAGGED), 4, 32).to(dtype)
    layer = attend(head_size=32, num_kv_heads=num_kv_heads, **features)

    def results(function, dtype):
        leaves = [t.detach().to(dtype).requires_grad_() for t in qkv]
        output = function(*leaves)
        return [output, *torch.autograd.grad(output, leaves, grad.to(dtype))]

    def reference(*leaves):
        return attention_reference(*leaves, RAGGED, layer.spec)

    actual = results(lambda *leaves: layer(*leaves, cu_seqlens_of(RAGGED)), dtype)
    plain = results(reference, dtype)
    exact = results(reference, torch.float64)

    for what, *tensors in zip(
        ("output", "dq", "dk", "dv"), actual, plain, exact, strict=True
    ):
        assert_as_accurate(what, *tensors)


@pytest.mark.parametrize("features", [{}, {"sliding_window": 4}], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_packed_batched_and_single_sequences_are_equal(dtype, features, assert_equal):
    batch, seq = 3, 17
    qkv = make_qkv(batch * seq, 4, 2, 16, dtype)
    layer = attend(**features)
    grad = torch.randn(batch * seq, 4, 16).to(dtype)

    def results(function):
        output = function(*qkv)
        return [output, *torch.autograd.grad(output, qkv, grad)]

    def batched(*qkv):
        return layer(*(t.view(batch, seq, *t.shape[1:]) for t in qkv)).flatten(0, 1)

    def one_at_a_time(*qkv):
        parts = [t.split(seq) for t in qkv]
        return torch.cat([layer(*part) for part in zip(*parts, strict=True)])

    packed = results(lambda *qkv: layer(*qkv, cu_seqlens_of([seq] * batch)))
    for other in (results(batched), results(one_at_a_time)):
        for what, a, b in zip(("output", "dq", "dk", "dv"), packed, other, strict=True):
            assert_equal(what, a, b)


def test_every_layout_gives_the_same_in_the_querys_layout(assert_equal):
    q, k, v = make_qkv(12, 4, 2, 16, torch.float32)
    layer = attend()
    packed = layer(q, k, v)
    flat = layer(*(t.flatten(1) for t in (q, k, v)))
    one_batch = layer(*(t[None] for t in (q, k, v)))
    one_batch_flat = layer(*(t.flatten(1)[None] for t in (q, k, v)))

    assert packed.shape == (12, 4, 16)
    assert_equal("flat", flat, packed.flatten(1))
    assert_equal("batched", one_batch, packed[None])
    assert_equal("batched flat", one_batch_flat, packed.flatten(1)[None])


def test_slices_of_a_fused_projection_are_accepted(assert_equal):
    q, k, v = make_qkv(9, 4, 2, 16, torch.float32)
    fused = torch.cat((q, k, v), dim=1)
    assert_equal("output", attend()(*fused.split((4, 2, 2), 1)), attend()(q, k, v))


@settings(deadline=None, max_examples=25)
@given(
    seqlens=st.lists(st.integers(0, 9), min_size=1, max_size=5),
    kv_heads=st.sampled_from([1, 2, 4]),
    window=st.sampled_from([None, 1, 3]),
)
def test_documents_never_see_each_other(seqlens, kv_heads, window):
    qkv = make_qkv(sum(seqlens), 4, kv_heads, 8, torch.float32)
    layer = attend(head_size=8, num_kv_heads=kv_heads, sliding_window=window)
    packed = layer(*qkv, cu_seqlens_of(seqlens), max(seqlens))
    parts = zip(*(t.split(seqlens) for t in qkv), strict=True)
    apart = torch.cat([layer(*part) for part in parts])
    assert torch.equal(packed, apart)


@pytest.mark.parametrize("features", [{}, {"sliding_window": 2}], ids=str)
@pytest.mark.parametrize("seqlens", [[0, 4, 0, 0, 1, 0], [0, 0], []], ids=str)
def test_empty_sequences_have_gradients(seqlens, features):
    qkv = make_qkv(sum(seqlens), 4, 2, 16, torch.float32)
    output = attend(**features)(*qkv, cu_seqlens_of(seqlens))
    output.sum().backward()
    assert output.shape == (sum(seqlens), 4, 16)
    for tensor in qkv:
        assert tensor.grad is not None and tensor.grad.isfinite().all()


def test_window_of_one_returns_the_value():
    q, k, v = make_qkv(6, 2, 2, 8, torch.float32)
    output = attend(2, 8, 2, sliding_window=1)(q, k, v)
    torch.testing.assert_close(output, v)


def test_default_scale_is_the_inverse_root_of_the_head_size():
    assert attend(head_size=64).spec == AttentionSpec(scale=0.125)
    assert attend(scale=0.3).spec.scale == 0.3


@pytest.mark.parametrize("head_size", [16, 80, 256])
def test_long_sequences_never_hold_a_score_matrix(head_size, largest_tensor):
    num_tokens = 2000
    qkv = make_qkv(num_tokens, 1, 1, head_size, torch.float32)
    with largest_tensor:
        attend(1, head_size, 1)(*qkv).sum().backward()
    assert largest_tensor.numel <= num_tokens * head_size


def test_features_choose_the_implementation_by_the_table():
    def chosen(**features):
        return dispatch.choose_implementation("cpu", AttentionSpec(1.0, **features))

    assert chosen().name == chosen(causal=False).name == sdpa.NAME
    assert chosen(sliding_window=3).name == masked.NAME
    assert chosen(logits_soft_cap=3.0).name == masked.NAME


def test_deepcopy_and_inference_mode(assert_equal):
    qkv = make_qkv(5, 4, 2, 16, torch.float32)
    layer = attend()
    with torch.inference_mode():
        assert_equal("copy", copy.deepcopy(layer)(*qkv), layer(*qkv))


@pytest.mark.parametrize(
    ("shapes", "message"),
    [
        (((5, 4, 15), (5, 2, 16), (5, 2, 16)), r"query of shape \(5, 4, 15\)"),
        (((5, 3, 16), (5, 2, 16), (5, 2, 16)), r"4 heads of size 16"),
        (((5, 4, 16), (5, 4, 16), (5, 2, 16)), r"key of shape \(5, 4, 16\)"),
        (((5, 4, 16), (5, 2, 16), (5, 2, 8)), r"value of shape \(5, 2, 8\)"),
        (((5, 4, 16), (6, 2, 16), (6, 2, 16)), r"hold the same tokens"),
        (((1, 5, 4, 16), (5, 2, 16), (5, 2, 16)), r"all packed or all batched"),
        (((2, 5, 4, 16), (5, 2, 2, 16), (5, 2, 2, 16)), r"hold the same tokens"),
        (((64,), (32,), (32,)), r"accepted are \[num_tokens"),
    ],
    ids=str,
)
def test_inconsistent_shapes_are_refused(shapes, message):
    with pytest.raises(ValueError, match=message):
        attend()(*(torch.zeros(shape) for shape in shapes))


@pytest.mark.parametrize(
    ("cu_seqlens", "message"),
    [
        ([0, 3], r"\[0, 3\] does not describe 5 tokens.*end at 5"),
        ([0, 3, 6], "does not describe 5 tokens"),
        ([1, 5], "must start at 0"),
        ([0, 4, 3, 5], "never decrease"),
        ([0, *range(40), 5], r"\[0, 0, 1, 2, 3, 4, ..., 35, 36, 37, 38, 39, 5\]"),
    ],
    ids=["short", "long", "start", "decreasing", "abbreviated"],
)
def test_wrong_cu_seqlens_are_refused(cu_seqlens, message):
    qkv = make_qkv(5, 4, 2, 16, torch.float32)
    with pytest.raises(ValueError, match=message):
        attend()(*qkv, torch.tensor(cu_seqlens, dtype=torch.int32))


@pytest.mark.parametrize(
    ("cu_seqlens", "message"),
    [
        (torch.tensor([0, 5]), "torch.int64 of shape"),
        (torch.tensor([0.0, 5.0]), "torch.float32 of shape"),
        (torch.tensor([[0, 5]], dtype=torch.int32), r"of shape \(1, 2\)"),
        (torch.tensor([], dtype=torch.int32), r"of shape \(0,\)"),
        ([0, 5], "cu_seqlens is list; it must be a torch.int32 tensor"),
    ],
    ids=["int64", "float", "two dims", "empty", "list"],
)
def test_cu_seqlens_of_another_kind_are_refused(cu_seqlens, message):
    qkv = make_qkv(5, 4, 2, 16, torch.float32)
    with pytest.raises(ValueError, match=message):
        attend()(*qkv, cu_seqlens)


def test_cu_seqlens_of_a_batch_and_a_short_max_seqlen_are_refused():
    qkv = make_qkv(6, 4, 2, 16, torch.float32)
    cu_seqlens = cu_seqlens_of([2, 4])
    with pytest.raises(ValueError, match=r"batched with \(batch, seq\) = \(2, 3\)"):
        attend()(*(t.unflatten(0, (2, 3)) for t in qkv), cu_seqlens)
    with pytest.raises(ValueError, match="max_seqlen=3, but a sequence has 4"):
        attend()(*qkv, cu_seqlens, 3)


def test_unsupported_and_mixed_dtypes_are_refused():
    qkv = [torch.zeros(5, heads, 16, dtype=torch.int32) for heads in (4, 2, 2)]
    with pytest.raises(ValueError, match="got torch.int32; it runs in torch.float32"):
        attend()(*qkv)
    q, k, v = make_qkv(5, 4, 2, 16, torch.float32)
    with pytest.raises(ValueError, match="the value is torch.bfloat16"):
        attend()(q, k, v.bfloat16())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"num_heads": 4, "num_kv_heads": 3}, "positive multiple of num_kv_heads=3"),
        ({"num_heads": 0}, "num_heads=0"),
        ({"head_size": 0}, "head_size=0"),
        ({"sliding_window": 0}, "sliding_window=0 must be at least 1"),
        ({"logits_soft_cap": 0.0}, "logits_soft_cap=0.0 must be positive"),
    ],
    ids=str,
)
def test_senseless_constructions_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        attend(**arguments)
