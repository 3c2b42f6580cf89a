# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""The specification of attention: its derivatives, and cases known by hand."""

import pytest
import torch

from vllm.model_executor.layers.training.ops.attention import reference
from vllm.model_executor.layers.training.ops.attention.call import (
    AttentionCall,
    AttentionSpec,
)
from vllm.model_executor.layers.training.ops.attention.op import attention
from vllm.model_executor.layers.training.ops.attention.reference import (
    attention_reference,
    visible_keys,
)

BOUNDS = torch.tensor([0, 2, 2, 3, 7], dtype=torch.int32)
FEATURES = [
    {},
    {"causal": False},
    {"window": 3},
    {"causal": False, "window": 2},
    {"soft_cap": 0.7},
    {"window": 2, "soft_cap": 1.5},
]


def make_inputs(num_heads=4, num_kv_heads=2, head_size=2):
    torch.manual_seed(0)
    qkv = [
        torch.randn(7, heads, head_size, dtype=torch.float64, requires_grad=True)
        for heads in (num_heads, num_kv_heads, num_kv_heads)
    ]
    sinks = torch.randn(num_heads, dtype=torch.float64, requires_grad=True)
    return *qkv, sinks


def slopes(num_heads=4):
    return torch.arange(1, num_heads + 1) / 3


@pytest.mark.parametrize(
    ("features", "num_kv_heads", "alibi"),
    [
        *((features, 1, None) for features in FEATURES),
        # Slopes and groups of heads act on scores before what the features do.
        *((FEATURES[-1], heads, slopes(2)) for heads in (1, 2)),
    ],
)
def test_gradcheck(features, num_kv_heads, alibi):
    assert torch.autograd.gradcheck(
        lambda q, k, v, sinks: attention_reference(
            q, k, v, BOUNDS, sinks, alibi, scale=0.6, **features
        ),
        make_inputs(2, num_kv_heads),
    )


@pytest.mark.parametrize("features", FEATURES, ids=str)
@pytest.mark.parametrize("alibi", [None, slopes()], ids=["", "alibi"])
@pytest.mark.parametrize("with_sinks", [False, True], ids=["", "sinks"])
def test_the_backward_is_the_derivative(features, alibi, with_sinks):
    q, k, v, sinks = make_inputs()
    sinks = sinks if with_sinks else None
    grad = torch.randn(7, 4, 2, dtype=torch.float64)
    output, lse = attention_reference(
        q, k, v, BOUNDS, sinks, alibi, scale=0.6, **features
    )
    expected = torch.autograd.grad(output, (q, k, v), grad)
    spec = AttentionSpec(
        0.6,
        features.get("causal", True),
        features.get("window"),
        features.get("soft_cap"),
    )
    call = AttentionCall(spec, BOUNDS, 4, sinks, alibi)
    with torch.no_grad():
        actual = reference.backward(grad, q, k, v, output, lse, call)
    for a, b in zip(actual, expected, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("with_alibi", [False, True], ids=["", "alibi"])
def test_gradcheck_of_the_op(with_alibi, device):
    """Also the gradient of the sinks, which the op computes by itself."""
    spec = AttentionSpec(0.6, sliding_window=3, logits_soft_cap=0.7)
    inputs = [t.detach().to(device).requires_grad_() for t in make_inputs()]
    alibi = slopes().to(device) if with_alibi else None
    assert torch.autograd.gradcheck(
        lambda q, k, v, sinks: attention(
            q, k, v, BOUNDS.to(device), 4, spec, sinks=sinks, alibi_slopes=alibi
        ),
        inputs,
    )


def test_plain_case_is_torchs_attention():
    q, k, v, _ = make_inputs()
    expected = torch.nn.functional.scaled_dot_product_attention(
        *(t.transpose(0, 1)[None] for t in (q, k, v)),
        is_causal=True,
        scale=0.3,
        enable_gqa=True,
    )
    one_sequence = torch.tensor([0, 7])
    actual, _ = attention_reference(q, k, v, one_sequence, scale=0.3)
    torch.testing.assert_close(actual, expected[0].transpose(0, 1))


def test_a_sink_is_a_key_whose_value_is_zero():
    """It is put before the others, orthogonal to them, so that it scores the sink."""
    q, k, v, _ = make_inputs(1, 1)
    score = 0.4
    one, zero = torch.ones_like(q[..., :1]), torch.zeros_like(q[..., :1])
    q, k, v = (torch.cat(p, -1) for p in ((q, one), (k, zero), (v, zero)))
    first_key = torch.tensor([0, 0, score]).double().view(1, 1, 3)

    sinks = torch.tensor([score]).double()
    actual, lse = attention_reference(q, k, v, torch.tensor([0, 7]), sinks, scale=1.0)
    longer, longer_lse = attention_reference(
        torch.cat((q[:1], q)),
        torch.cat((first_key, k)),
        torch.cat((torch.zeros_like(v[:1]), v)),
        torch.tensor([0, 8]),
        scale=1.0,
    )
    torch.testing.assert_close(actual, longer[1:])
    torch.testing.assert_close(lse, longer_lse[:, 1:])


def test_alibi_lowers_scores_by_distance():
    slope, length = 0.5, 4
    value = torch.eye(length, dtype=torch.float64).unsqueeze(1)
    output, lse = attention_reference(
        torch.zeros_like(value),
        torch.zeros_like(value),
        value,
        torch.tensor([0, length]),
        None,
        torch.tensor([slope]),
        scale=1.0,
    )
    for row in range(length):
        scores = torch.arange(-row, 1).double() * slope
        torch.testing.assert_close(output[row, 0, : row + 1], scores.softmax(0))
        torch.testing.assert_close(lse[0, row], scores.logsumexp(0))


def test_window_counts_the_querys_own_position():
    def rows(causal=True, window=None):
        seen = visible_keys(4, causal, window, torch.device("cpu"))
        return ["".join("x" if key else "." for key in row) for row in seen.tolist()]

    assert rows() == ["x...", "xx..", "xxx.", "xxxx"]
    assert rows(window=1) == ["x...", ".x..", "..x.", "...x"]
    assert rows(window=2) == ["x...", "xx..", ".xx.", "..xx"]
    assert rows(causal=False, window=2) == ["xx..", "xxx.", ".xxx", "..xx"]
