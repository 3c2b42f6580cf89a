# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""TrainableAttention outside the engine: layouts, packing, parameters, bad input."""

import copy
from types import SimpleNamespace
from unittest.mock import Mock

import pytest
import torch

from vllm.model_executor import vllm_internals
from vllm.model_executor.layers.training import TrainableAttention
from vllm.model_executor.layers.training.ops.attention.call import AttentionSpec
from vllm.model_executor.layers.training.ops.attention.reference import (
    attention_reference,
)
from vllm.model_executor.parallel_context import ParallelContext

pytestmark = pytest.mark.usefixtures("on_device")

FEATURES = [
    {},
    {"sliding_window": 4},
    {"sinks": True, "alibi_slopes": [0.5, 0.25, 0.125, 0.0], "logits_soft_cap": 3.0},
]


def make_qkv(num_tokens, num_heads, num_kv_heads, head_size, dtype, seed=0):
    torch.manual_seed(seed)
    return [
        torch.randn(num_tokens, heads, head_size).to(dtype).requires_grad_()
        for heads in (num_heads, num_kv_heads, num_kv_heads)
    ]


def cu_seqlens_of(seqlens):
    return torch.tensor([0, *seqlens]).cumsum(0, dtype=torch.int32)


def attend(num_heads=4, head_size=16, num_kv_heads=2, **features):
    layer = TrainableAttention(
        num_heads,
        head_size,
        num_kv_heads=num_kv_heads,
        parallel_context=ParallelContext.single(),
        **features,
    )
    if layer.sinks is not None:
        torch.manual_seed(0)
        torch.nn.init.normal_(layer.sinks)
    return layer


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_feature_reaches_the_kernel(dtype, assert_as_accurate):
    """The op's own tests judge each implementation; this one the layer's arguments."""
    layer = attend(scale=0.3, sliding_window=9, params_dtype=dtype, **FEATURES[2])
    seqlens = [1, 5, 63, 23]
    qkv = make_qkv(sum(seqlens), 4, 2, 16, dtype)
    grad = torch.randn_like(qkv[0])

    def results(function, dtype):
        leaves = [t.detach().to(dtype).requires_grad_() for t in (*qkv, layer.sinks)]
        output = function(*leaves)
        return [output, *torch.autograd.grad(output, leaves, grad.to(dtype))]

    def call(q, k, v, sinks):
        arguments = (q, k, v, cu_seqlens_of(seqlens), max(seqlens))
        return torch.func.functional_call(layer, {"sinks": sinks}, arguments)

    def plain(q, k, v, sinks):
        bounds = cu_seqlens_of(seqlens)
        options = {"scale": 0.3, "window": 9, "soft_cap": 3.0}
        slopes = layer.alibi_slopes
        return attention_reference(q, k, v, bounds, sinks, slopes, **options)[0]

    for what, *tensors in zip(
        ("output", "dq", "dk", "dv", "dsinks"),
        results(call, dtype),
        results(plain, dtype),
        results(plain, torch.float64),
        strict=True,
    ):
        assert_as_accurate(what, *tensors)


@pytest.mark.parametrize("features", FEATURES, ids=str)
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


@pytest.mark.parametrize("features", FEATURES, ids=str)
@pytest.mark.parametrize("seqlens", [[0, 4, 0, 0, 1, 0], [0, 0], []], ids=str)
def test_empty_sequences_have_gradients(seqlens, features):
    qkv = make_qkv(sum(seqlens), 4, 2, 16, torch.float32)
    layer = attend(**features)
    output = layer(*qkv, cu_seqlens_of(seqlens))
    output.sum().backward()
    assert output.shape == (sum(seqlens), 4, 16)
    for tensor in (*qkv, *layer.parameters()):
        assert tensor.grad is not None and tensor.grad.isfinite().all()


def test_window_of_one_returns_the_value():
    q, k, v = make_qkv(6, 2, 2, 8, torch.float32)
    output = attend(2, 8, 2, sliding_window=1)(q, k, v)
    torch.testing.assert_close(output, v)


def test_default_scale_is_the_inverse_root_of_the_head_size():
    assert attend(head_size=64).spec == AttentionSpec(scale=0.125)
    assert attend(scale=0.3).spec.scale == 0.3


def test_sinks_are_a_trained_parameter():
    layer = TrainableAttention(4, 16, sinks=True, params_dtype=torch.bfloat16)
    assert list(layer.state_dict()) == ["sinks"]
    assert layer.sinks.dtype == torch.bfloat16 and layer.sinks.eq(0).all()
    layer(*make_qkv(5, 4, 4, 16, torch.bfloat16)).sum().backward()
    assert layer.sinks.grad.ne(0).all()
    assert not list(attend().parameters())


def test_sinks_are_sharded_as_the_heads_are(second_of_two):
    layer = TrainableAttention(4, 16, sinks=True, parallel_context=second_of_two)
    sharding = layer.parameter_sharding()["sinks"]
    assert (sharding.shape, sharding.dim) == ((8,), 0)
    assert layer.sinks.shape == (4,)
    assert TrainableAttention(4, 16).parameter_sharding() == {}


def test_a_query_head_reads_the_key_head_of_its_group():
    """h // group; the docstring says what to do with weights for h % num_kv_heads."""
    heads, kv_heads, size, hidden = 6, 2, 16, 24
    group = heads // kv_heads
    x = torch.randn(9, hidden)
    wq = torch.randn(heads * size, hidden)
    wk, wv = torch.randn(2, kv_heads * size, hidden).unbind()
    wo = torch.randn(hidden, heads * size)
    layer = attend(heads, size, kv_heads)

    def grouped(wq, wo):
        return layer(x @ wq.t(), x @ wk.t(), x @ wv.t()) @ wo.t()

    def plain(repeat):
        q = (x @ wq.t()).view(9, heads, size)
        k, v = (repeat((x @ w.t()).view(9, kv_heads, size)) for w in (wk, wv))
        output = torch.nn.functional.scaled_dot_product_attention(
            *(t.transpose(0, 1) for t in (q, k, v)), is_causal=True
        )
        return output.transpose(0, 1).flatten(1) @ wo.t()

    torch.testing.assert_close(
        grouped(wq, wo),
        plain(lambda t: t.repeat_interleave(group, 1)),
        rtol=0,
        atol=1e-3,
    )
    # head h = g * kv_heads + kv  ->  head kv * group + g
    sorted_wq = wq.view(group, kv_heads, size, hidden).transpose(0, 1)
    sorted_wo = wo.view(hidden, group, kv_heads, size).transpose(1, 2)
    torch.testing.assert_close(
        grouped(sorted_wq.flatten(0, 2), sorted_wo.flatten(1)),
        plain(lambda t: t.repeat(1, group, 1)),
        rtol=0,
        atol=1e-3,
    )


def test_slopes_keep_their_values_and_dtype(device):
    """Cast, moved through the meta device, or copied."""
    expected = torch.tensor([0.3, 0.1])
    with torch.device("meta"):
        layer = attend(2, 16, 2, alibi_slopes=[0.3, 0.1], sinks=True)
    assert layer.alibi_slopes.device.type == "cpu"
    layer = layer.to_empty(device=device)
    for changed in (layer, copy.deepcopy(layer), layer.bfloat16(), layer.double()):
        assert changed.alibi_slopes.dtype == torch.float32
        assert torch.equal(changed.alibi_slopes, expected)
    assert list(layer.state_dict()) == ["sinks"]


def test_the_implementation_is_chosen_by_name(assert_equal):
    qkv = make_qkv(9, 4, 2, 16, torch.float32)
    named = attend(implementation="reference", deterministic=True)
    torch.testing.assert_close(named(*qkv), attend()(*qkv))
    assert "implementation='reference', deterministic=True" in repr(named)
    other = "cpu" if torch.cuda.is_available() else "triton"
    with pytest.raises(ValueError, match=f"'{other}' cannot compute torch.float32, he"):
        attend(implementation=other)(*qkv)


def test_a_meta_layer_gives_shapes():
    with torch.device("meta"):
        layer = attend(**FEATURES[2])
        q, k, v = make_qkv(6, 4, 2, 16, torch.bfloat16)
        output = layer(q, k, v)
    assert output.is_meta and (output.shape, output.dtype) == (q.shape, q.dtype)


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


@pytest.mark.skipif(torch.cuda.is_available(), reason="values on CUDA are not read")
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
        (torch.empty(2, dtype=torch.int32, device="meta"), "on meta; it must be a tor"),
        ([0, 5], "cu_seqlens is list; it must be a torch.int32 tensor"),
    ],
    ids=["int64", "float", "two dims", "empty", "device", "list"],
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
    with pytest.raises(ValueError, match="max_seqlen=-1 must be the longest"):
        attend()(*qkv, cu_seqlens, -1)
    if not torch.cuda.is_available():
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
        ({"sliding_window": 0}, "sliding_window=0 must be an integer and at l"),
        ({"logits_soft_cap": 0.0}, "logits_soft_cap=0.0 must be a finite number"),
        ({"alibi_slopes": [0.1]}, "alibi_slopes has 1 elements; it must have one for"),
        ({"dropout": 0.1}, "dropout=0.1: attention has no dropout"),
        ({"implementation": "fast"}, "implementation='fast' is not one of fa3, "),
        ({"sinks": True, "params_dtype": torch.int8}, "params_dtype=torch.int8 is no"),
    ],
    ids=str,
)
def test_senseless_constructions_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        attend(**arguments)


@pytest.mark.parametrize(
    ("backend", "features", "message"),
    [
        ("FLASH_ATTN", {"sinks": True}, "FLASH_ATTN backend has sinks in torch.bfl"),
        ("FLASHINFER", {"alibi_slopes": [0.1] * 4}, "FLASHINFER backend has no kernel"),
        ("FLASH_ATTN", {"alibi_slopes": [0.1] * 4}, "no kernel for alibi_slopes here"),
        ("TRITON_ATTN", {"alibi_slopes": [0.1] * 4, "sinks": True}, "sinks would see"),
        ("TRITON_ATTN", {"alibi_slopes": [0.1] * 4}, None),
        ("CPU_ATTN", {"alibi_slopes": [0.1] * 4, "sinks": True}, None),
        ("FLASH_ATTN", {"sinks": True, "params_dtype": torch.bfloat16}, None),
    ],
)
def test_what_an_engines_backend_lacks_is_refused(
    backend, features, message, monkeypatch
):
    made = torch.nn.Module()
    made.attn_backend = Mock(**{"get_name.return_value": backend})
    made.impl = SimpleNamespace(vllm_flash_attn_version=3)
    made.dtype = torch.bfloat16
    engine = Mock(return_value=made)
    monkeypatch.setattr(vllm_internals, "Attention", engine)
    layer = attend(**features)
    if message is None:
        assert layer.bind_engine(Mock(), "a.b") is layer
        assert engine.call_args.kwargs.get("sinks") is layer.sinks
    else:
        with pytest.raises(ValueError, match=f"a.b: vLLM's .*{message}"):
            layer.bind_engine(Mock(), "a.b")
