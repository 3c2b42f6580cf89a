# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""Which attention implementation is chosen for what, and what the errors say."""

import pytest
import torch

from vllm.model_executor.layers.training.ops.attention import table
from vllm.model_executor.layers.training.ops.attention.call import AttentionSpec
from vllm.model_executor.layers.training.ops.attention.op import attention


def test_a_name_that_cannot_says_why_and_which_can(device):
    with device:
        q = torch.randn(4, 2, 20)
        options = {"alibi_slopes": torch.tensor([0.5, 0.25])}
        arguments = (q, q, q, torch.tensor([0, 4], dtype=torch.int32), 4)
    spec = AttentionSpec(0.2)
    name = {"cpu": "vllm_cpu", "cuda": "fa3"}[device.type]
    able = {"cpu": "cpu, reference", "cuda": "triton, reference"}[device.type]
    pattern = (
        rf"'{name}' cannot compute torch.float32, head_size=20, alibi_slopes on "
        rf"{device.type}.*: the forward '{name}' takes .*\. Those that can: {able}\."
    )
    with pytest.raises(ValueError, match=pattern):
        attention(*arguments, spec, **options, implementation=name)
    with pytest.raises(ValueError, match="implementation='fa5' is not one of fa3, fa4"):
        attention(*arguments, spec, implementation="fa5")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"alibi_slopes": torch.zeros(3)}, r"alibi_slopes has shape \(3,\) on cpu"),
        ({"alibi_slopes": torch.zeros(2).double()}, "alibi_slopes is torch.float64"),
        ({"sinks": torch.zeros(2, 1)}, r"sinks has shape \(2, 1\).*of the 2 heads"),
        ({"query": torch.zeros(4, 2)}, r"query, key and value have shapes \(4, 2\)"),
        ({"key": torch.zeros(4, 1, 8)}, r"must be \[num_tokens, num_heads, head_size"),
    ],
    ids=str,
)
def test_what_does_not_fit_is_refused(change, message):
    fields = dict.fromkeys(("query", "key", "value"), torch.zeros(4, 2, 8))
    fields |= {"cu_seqlens": torch.tensor([0, 4], dtype=torch.int32), "max_seqlen": 4}
    with pytest.raises(ValueError, match=message):
        attention(**fields | {"spec": AttentionSpec(0.2)} | change)


@pytest.mark.parametrize(
    ("asked", "name"),
    [
        ({}, "fa3"),
        ({"head_size": 20}, "triton"),
        ({"dtype": torch.float32}, "triton"),
        ({"dtype": torch.float64}, "reference"),
        ({"features": ("sinks", "sliding_window", "logits_soft_cap")}, "fa3"),
        ({"features": ("alibi_slopes",)}, "triton"),
        ({"features": ("sinks",), "dtype": torch.float16}, "fa4"),
        ({"features": ("sinks",), "num_heads": 128}, "fa4"),
        ({"batch_invariant": True}, "fa3"),
        ({"batch_invariant": True, "head_size": 64}, "fa3"),
        ({"batch_invariant": True, "head_size": 80}, "fa3_triton"),
        ({"batch_invariant": True, "features": ("sliding_window",)}, "vllm_triton"),
        ({"capability": (10, 0)}, "fa4"),
        ({"capability": (10, 0), "head_size": 192}, "torch_flash"),
        ({"capability": (8, 0)}, "torch_flash"),
        ({"capability": (8, 0), "deterministic": True}, "triton"),
        ({"capability": (8, 0), "features": ("logits_soft_cap",)}, "triton"),
        ({"capability": (7, 5)}, "triton"),
        ({"device_type": "cpu"}, "cpu"),
        ({"device_type": "cpu", "dtype": torch.float64}, "reference"),
        ({"device_type": "cpu", "head_size": 300}, "reference"),
    ],
    ids=str,
)
def test_the_default_is_the_first_that_can(asked, name, monkeypatch):
    """As on machines that have every package."""
    for missing in ("_cute_missing", "_flash_attention_missing"):
        monkeypatch.setattr(table, missing, lambda *_: None)
    monkeypatch.setattr(table, "HAS_TRITON", True)
    monkeypatch.setattr(table, "HAS_CPU_KERNELS", True)
    fields = {
        "device_type": "cuda",
        "capability": (0, 0) if "device_type" in asked else (9, 0),
        "dtype": torch.bfloat16,
        "num_heads": 32,
        "head_size": 128,
        "features": (),
        "deterministic": False,
    }
    chosen = table.choose(table.Request(**fields | asked))
    forward, backward = table.IMPLEMENTATIONS[name]
    assert chosen == (table.FORWARDS[forward], table.BACKWARDS[backward])


def test_without_packages_another_is_chosen(monkeypatch):
    monkeypatch.setattr(table, "_flash_attention_missing", lambda version: None)
    monkeypatch.setattr(table, "_cute_missing", lambda: "needs quack-kernels")
    monkeypatch.setattr(table, "HAS_TRITON", True)
    asked = table.Request("cuda", (9, 0), torch.bfloat16, 32, 128, (), False)
    assert table.choose(asked)[1] is table.BACKWARDS["triton"]
    with pytest.raises(ValueError, match="the backward 'fa4' needs quack-kernels"):
        table.choose(asked, "fa3")
