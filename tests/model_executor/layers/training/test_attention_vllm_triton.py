# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""Implementation vllm_triton: its table of pages, what it refuses, and its kernels.

`vllm_triton_attention_checks.py` runs the kernels, without a GPU by Triton's
interpreter. Triton decides when a kernel is defined whether it is interpreted, so that
takes a process of its own.
"""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from vllm.model_executor.layers.training.ops.attention import table
from vllm.model_executor.layers.training.ops.attention.pages import TILE, block_table_of

CHECKS = Path(__file__).with_name("vllm_triton_attention_checks.py")


@pytest.mark.parametrize(
    ("lengths", "max_seqlen"),
    [([1], 1), ([5, 0, 40, 3], 40), ([0, 0, 2], 2), ([33, 31], 100), ([7, 9], 16)],
)
def test_each_position_has_its_token(lengths, max_seqlen, device):
    bounds = torch.tensor([0, *lengths]).cumsum(0, dtype=torch.int32).to(device)
    pages = block_table_of(bounds, max_seqlen)
    assert pages.dtype == torch.int32 and pages.device == bounds.device
    assert pages.stride(1) == 1
    token = 0
    for row, length in zip(pages.tolist(), lengths, strict=True):
        # The kernel reads whole tiles.
        assert len(row) >= max_seqlen and len(row) % TILE == 0
        for position in range(length):
            assert row[position] == token
            token += 1


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"device_type": "cpu", "capability": (0, 0)}, "runs on cuda"),
        ({"dtype": torch.float64}, "takes torch.float32, torch.bfloat16, torch.flo"),
        ({"features": ("alibi_slopes",)}, "has no alibi_slopes"),
        ({"features": ("non_causal",)}, "has no non_causal"),
        ({"head_size": 24}, "takes heads of at least 32"),
        ({"head_size": 288}, "takes heads of at most 256"),
        ({"head_size": 256, "capability": (10, 3)}, "takes no heads of 256 on sm10x"),
    ],
    ids=str,
)
def test_what_it_cannot_compute_is_refused(change, reason, monkeypatch):
    monkeypatch.setattr(table, "HAS_TRITON", True)
    asked = request(**change)
    with pytest.raises(ValueError, match=f"the forward 'vllm_triton' {reason}"):
        table.choose(asked, "vllm_triton")


@pytest.mark.parametrize(
    "change",
    [
        {"head_size": 80},
        {"head_size": 256, "dtype": torch.float16},
        {"dtype": torch.float32, "batch_invariant": True},
        {"capability": (8, 0), "features": ("logits_soft_cap",)},
        {"features": ("sliding_window",), "batch_invariant": True},
        {"features": ("sliding_window", "logits_soft_cap", "sinks")},
        {"batch_invariant": True, "deterministic": True},
    ],
    ids=str,
)
def test_what_it_can_compute_is_taken(change, monkeypatch):
    monkeypatch.setattr(table, "HAS_TRITON", True)
    chosen = table.choose(request(**change), "vllm_triton")
    assert chosen == (table.FORWARDS["vllm_triton"], table.BACKWARDS["triton"])


def test_kernels():
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider"]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    if not torch.cuda.is_available():
        environment["TRITON_INTERPRET"] = "1"
    result = subprocess.run(
        [*command, str(CHECKS)],
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
    )
    report = result.stdout + result.stderr
    assert result.returncode == 0, report
    assert re.search(r"^[1-9]\d* passed\b(?!.*skipped)", result.stdout, re.M), report


def request(**change):
    fields = {
        "device_type": "cuda",
        "capability": (9, 0),
        "dtype": torch.bfloat16,
        "num_heads": 32,
        "head_size": 128,
        "features": (),
        "deterministic": False,
    }
    return table.Request(**fields | change)
