# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""The specification of attention: its derivatives, and cases known by hand."""

import pytest
import torch

from vllm.model_executor.layers.training.ops.attention.reference import (
    attention_reference,
    visible_keys,
)
from vllm.model_executor.layers.training.ops.attention.spec import AttentionSpec

FEATURES = [
    {},
    {"causal": False},
    {"sliding_window": 3},
    {"causal": False, "sliding_window": 2},
    {"logits_soft_cap": 0.7},
    {"sliding_window": 2, "logits_soft_cap": 1.5},
]


@pytest.mark.parametrize("features", FEATURES, ids=str)
@pytest.mark.parametrize("num_kv_heads", [1, 2])
def test_gradcheck(features, num_kv_heads):
    torch.manual_seed(0)
    seqlens = [2, 0, 1, 4]
    q, k, v = (
        torch.randn(7, heads, 2, dtype=torch.float64, requires_grad=True)
        for heads in (2, num_kv_heads, num_kv_heads)
    )
    spec = AttentionSpec(scale=0.6, **features)

    assert torch.autograd.gradcheck(
        lambda *qkv: attention_reference(*qkv, seqlens, spec), (q, k, v)
    )


def test_plain_case_is_torchs_attention():
    torch.manual_seed(0)
    q, k, v = (torch.randn(7, heads, 8, dtype=torch.float64) for heads in (4, 2, 2))
    spec = AttentionSpec(scale=0.3)

    expected = torch.nn.functional.scaled_dot_product_attention(
        *(t.transpose(0, 1)[None] for t in (q, k, v)),
        is_causal=True,
        scale=0.3,
        enable_gqa=True,
    )
    actual = attention_reference(q, k, v, [7], spec)

    torch.testing.assert_close(actual, expected[0].transpose(0, 1))


def test_window_counts_the_querys_own_position():
    def rows(**features):
        spec = AttentionSpec(scale=1.0, **features)
        seen = visible_keys(4, spec, torch.device("cpu"))
        return ["".join("x" if key else "." for key in row) for row in seen.tolist()]

    assert rows() == ["x...", "xx..", "xxx.", "xxxx"]
    assert rows(sliding_window=1) == ["x...", ".x..", "..x.", "...x"]
    assert rows(sliding_window=2) == ["x...", "xx..", ".xx.", "..xx"]
    assert rows(causal=False, sliding_window=2) == ["xx..", "xxx.", ".xxx", "..xx"]
