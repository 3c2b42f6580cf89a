# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""The whole attention block outside the engine."""

import copy

import pytest
import torch
import torch.nn.functional as F

from vllm.model_executor.layers.training import (
    RotaryEmbedding,
    TrainableAttention,
    VLLMFlashAttention,
)
from vllm.model_executor.layers.training.ops.attention.reference import (
    attention_reference,
)
from vllm.model_executor.parallel_context import ParallelContext

pytestmark = pytest.mark.usefixtures("on_device")

RAGGED = [1, 5, 63, 123]
HIDDEN, HEADS, KV_HEADS, HEAD_DIM = 48, 4, 2, 16
FEATURES = {"sliding_window": 7, "logits_soft_cap": 3.0, "scale": 0.2}
SLOPES = [0.4, 0.2, 0.1, 0.0]


def make_block(dtype=torch.float32, *, with_rotary=True, **arguments):
    torch.manual_seed(0)
    single = ParallelContext.single()
    rotary = None
    if with_rotary:
        rotary = RotaryEmbedding(
            HEAD_DIM, max_position_embeddings=256, parallel_context=single
        )
    return VLLMFlashAttention(
        HIDDEN,
        HEADS,
        KV_HEADS,
        head_dim=HEAD_DIM,
        rotary=rotary,
        params_dtype=dtype,
        parallel_context=single,
        **arguments,
    )


def rotate(x, positions):
    """Rotary embedding, neox style, in x's dtype: [num_tokens, heads, HEAD_DIM]."""
    frequencies = 10000.0 ** (-torch.arange(0, HEAD_DIM, 2).double() / HEAD_DIM)
    angles = (positions.double().unsqueeze(-1) * frequencies).unsqueeze(-2)
    cos, sin = angles.cos().to(x.dtype), angles.sin().to(x.dtype)
    a, b = x.chunk(2, -1)
    return torch.cat((a * cos - b * sin, b * cos + a * sin), -1)


def plain_block(x, positions, weights, options):
    qkv = F.linear(x, weights["qkv_proj.weight"], weights.get("qkv_proj.bias"))
    qkv = qkv.unflatten(-1, (-1, HEAD_DIM))
    q, k, v = qkv.split((HEADS, KV_HEADS, KV_HEADS), -2)
    q, k = rotate(q, positions), rotate(k, positions)
    cu_seqlens = torch.tensor([0, *RAGGED]).cumsum(0)
    slopes = torch.tensor(SLOPES) if "attn.sinks" in weights else None
    output, _ = attention_reference(
        q, k, v, cu_seqlens, weights.get("attn.sinks"), slopes, **options
    )
    output = output.flatten(-2)
    return F.linear(output, weights["o_proj.weight"], weights.get("o_proj.bias"))


@pytest.mark.parametrize(
    "features", [{}, FEATURES, {"sinks": True, "alibi_slopes": SLOPES}], ids=str
)
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_output_and_all_gradients_are_accurate(
    dtype, bias, features, assert_as_accurate
):
    block = make_block(dtype, bias=bias, **features)
    hidden = torch.randn(sum(RAGGED), HIDDEN).to(dtype)
    grad = torch.randn(sum(RAGGED), HIDDEN).to(dtype)
    positions = torch.cat([torch.arange(length) for length in RAGGED])
    cu_seqlens = torch.tensor([0, *RAGGED]).cumsum(0, dtype=torch.int32)
    parameters = dict(block.named_parameters())
    options = {
        "scale": features.get("scale", HEAD_DIM**-0.5),
        "window": features.get("sliding_window", 0),
        "soft_cap": features.get("logits_soft_cap", 0.0),
    }

    def results(function, dtype):
        x = hidden.to(dtype).requires_grad_()
        weights = {
            name: p.detach().to(dtype).requires_grad_()
            for name, p in parameters.items()
        }
        output = function(x, weights)
        leaves = [x, *weights.values()]
        return [output, *torch.autograd.grad(output, leaves, grad.to(dtype))]

    def layer(x, weights):
        return torch.func.functional_call(block, weights, (x, positions, cu_seqlens))

    def plain(x, weights):
        return plain_block(x, positions, weights, options)

    for what, *tensors in zip(
        ("output", "dhidden", *parameters),
        results(layer, dtype),
        results(plain, dtype),
        results(plain, torch.float64),
    ):
        assert_as_accurate(what, *tensors)


def test_two_arguments_are_enough_to_train():
    block = VLLMFlashAttention(hidden_size=256, num_heads=4)
    hidden = torch.randn(2, 10, 256, requires_grad=True)
    output = block(hidden)
    output.sum().backward()
    assert output.shape == hidden.shape and output.isfinite().all()
    assert hidden.grad is not None
    for name, parameter in block.named_parameters():
        assert parameter.grad is not None and parameter.grad.ne(0).any(), name


def test_packed_equals_batched(assert_equal):
    block = make_block()
    hidden = torch.randn(3, 9, HIDDEN)
    positions = torch.arange(9).expand(3, 9)
    cu_seqlens = torch.arange(0, 28, 9, dtype=torch.int32)
    packed = block(hidden.flatten(0, 1), positions.flatten(), cu_seqlens, 9)
    assert_equal("output", block(hidden, positions), packed.view(3, 9, HIDDEN))


@pytest.mark.parametrize("shape", [(0,), (2, 0)])
def test_no_tokens_give_gradients(shape):
    block = make_block(bias=True)
    positions = torch.zeros(shape, dtype=torch.int64)
    output = block(torch.randn(*shape, HIDDEN), positions)
    output.sum().backward()
    assert output.shape == (*shape, HIDDEN)
    assert all(p.grad is not None for p in block.parameters())


def test_modules_and_checkpoint_names():
    block = make_block()
    assert isinstance(block.attn, TrainableAttention)
    assert list(block.state_dict()) == ["qkv_proj.weight", "o_proj.weight"]
    parts = block.qkv_proj.parameter_sharding()["weight"].parts
    assert [part.name for part in parts] == ["q_proj", "k_proj", "v_proj"]
    assert [part.shard_id for part in parts] == ["q", "k", "v"]


def test_a_rank_takes_its_heads_slopes(second_of_two):
    block = VLLMFlashAttention(
        HIDDEN,
        HEADS,
        head_dim=HEAD_DIM,
        sinks=True,
        alibi_slopes=SLOPES,
        implementation="reference",
        params_dtype=torch.bfloat16,
        parallel_context=second_of_two,
    )
    assert torch.equal(block.attn.alibi_slopes, torch.tensor(SLOPES[2:]))
    assert block.attn.sinks.shape == (2,) and block.attn.sinks.dtype == torch.bfloat16
    assert block.attn.implementation == "reference"


def test_deepcopy_is_independent(assert_equal):
    block = make_block()
    hidden, positions = torch.randn(5, HIDDEN), torch.arange(5)
    clone = copy.deepcopy(block)
    assert_equal("output", clone(hidden, positions), block(hidden, positions))
    torch.nn.init.zeros_(clone.o_proj.weight)
    assert block.o_proj.weight.ne(0).any()
    assert clone.parallel_context is block.parallel_context


def test_bad_input_is_refused():
    with pytest.raises(
        ValueError, match="hidden_size=10 is not divisible by num_heads=4"
    ):
        VLLMFlashAttention(10, 4)
    with pytest.raises(
        ValueError, match="rotary has head_size=8, but the heads have si"
    ):
        VLLMFlashAttention(64, 4, rotary=RotaryEmbedding(8))
    with pytest.raises(ValueError, match="alibi_slopes has 1 elements.*each of the 4"):
        make_block(alibi_slopes=[0.1])
    with pytest.raises(ValueError, match="dropout=0.5: attention has no dropout"):
        make_block(dropout=0.5)
    with pytest.raises(ValueError, match=r"needs positions of shape \(5,\)"):
        make_block()(torch.zeros(5, HIDDEN))
    with pytest.raises(ValueError, match=r"hidden_states of shape \(48,\) must be"):
        make_block()(torch.zeros(HIDDEN))
    with pytest.raises(ValueError, match=r"shape \(5, 47\).*must be 48"):
        make_block(with_rotary=False)(torch.zeros(5, 47))
