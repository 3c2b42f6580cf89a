# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""Numbers that make no layer are refused by name."""

import re

import numpy as np
import pytest
import torch

from vllm.model_executor.layers.training import (
    ColumnParallelLinear,
    LayerNorm,
    MergedColumnParallelLinear,
    ParallelLMHead,
    QKVParallelLinear,
    RMSNorm,
    RotaryEmbedding,
    RowParallelLinear,
    TrainableAttention,
    VLLMFlashAttention,
    VocabParallelEmbedding,
)

NAN, INF = float("nan"), float("inf")
# By the name in the message: what takes the argument.
SIZES = {
    "RMSNorm got hidden_size": RMSNorm,
    "LayerNorm got hidden_size": LayerNorm,
    "QKVParallelLinear got head_size": lambda v: QKVParallelLinear(8, v, 2),
    "QKVParallelLinear got total_num_heads": lambda v: QKVParallelLinear(8, 4, v),
    "QKVParallelLinear got total_num_kv_h": lambda v: QKVParallelLinear(8, 4, 8, v),
    "VocabParallelEmbedding got num_emb": lambda v: VocabParallelEmbedding(v, 8),
    "VocabParallelEmbedding got embedding": lambda v: VocabParallelEmbedding(8, v),
    "ParallelLMHead got num_embeddings": lambda v: ParallelLMHead(v, 8),
    "TrainableAttention got num_heads": lambda v: TrainableAttention(v, 8, None, 1),
    "TrainableAttention got head_size": lambda v: TrainableAttention(2, v),
    "TrainableAttention got num_kv_heads": lambda v: TrainableAttention(8, 8, None, v),
    "sliding_window": lambda v: TrainableAttention(2, 8, sliding_window=v),
    "VLLMFlashAttention got hidden_size": lambda v: VLLMFlashAttention(v, 2),
    "VLLMFlashAttention got num_heads": lambda v: VLLMFlashAttention(8, v),
    "QKVParallelLinear got head_size=": lambda v: VLLMFlashAttention(8, 2, head_dim=v),
    "RotaryEmbedding got head_size": RotaryEmbedding,
    "RotaryEmbedding got max_position_e": lambda v: RotaryEmbedding(8, None, v),
    "rotary_dim": lambda v: RotaryEmbedding(8, v),
}
# These may be empty.
FEATURES = {
    "ColumnParallelLinear got input_size": lambda v: ColumnParallelLinear(v, 8),
    "RowParallelLinear got output_size": lambda v: RowParallelLinear(8, v),
    r"Linear got output_sizes\[1\]": lambda v: MergedColumnParallelLinear(8, [8, v]),
}


@pytest.mark.parametrize("name", [*SIZES, *FEATURES])
def test_sizes_are_integers(name):
    build = (SIZES | FEATURES)[name]
    for value in (-2, 8.0, 1.5, True, NAN, "8", *([0] if name in SIZES else [])):
        with pytest.raises(ValueError, match=f"{name}.*{value!r}.* must be"):
            build(value)
    build(np.int64(8))


NUMBERS = {
    "RMSNorm got eps": (lambda v: RMSNorm(8, v), [-1e-6]),
    "LayerNorm got eps": (lambda v: LayerNorm(8, v), [-1e-6, None]),
    "scale": (lambda v: TrainableAttention(2, 8, v), []),
    "logits_soft_cap": (lambda v: TrainableAttention(2, 8, logits_soft_cap=v), [-1, 0]),
    "alibi_slopes=.*": (lambda v: TrainableAttention(2, 8, alibi_slopes=[1, v]), []),
    "RotaryEmbedding got base": (lambda v: RotaryEmbedding(8, base=v), [0.0, -1.0]),
}


@pytest.mark.parametrize("name", NUMBERS)
def test_numbers_are_finite(name):
    build, others = NUMBERS[name]
    # The last is infinite in fp32.
    for value in (NAN, INF, -INF, 1e39, *others):
        with pytest.raises(
            ValueError, match=f"{name}.*{re.escape(repr(value))}.* must be"
        ):
            build(value)
    build(np.float32(1.5))


SCALINGS = {
    "linear": {"factor": 2.0},
    "dynamic": {"factor": 2.0, "max_trained_positions": 32},
    "yarn": {
        "factor": 2.0,
        "original_max_position_embeddings": 32,
        "beta_fast": 32,
        "beta_slow": 1,
        "attention_factor": 1.5,
    },
    "llama3": {
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 32,
    },
    "default": {"rope_theta": 1e4, "partial_rotary_factor": 0.5},
}


@pytest.mark.parametrize("rope_type", SCALINGS)
def test_scaling_of_positions_is_finite(rope_type):
    given = {"rope_type": rope_type} | SCALINGS[rope_type]
    assert RotaryEmbedding(16, rope_scaling=given).cos_sin_cache.isfinite().all()
    for key in SCALINGS[rope_type]:
        integer = key in ("original_max_position_embeddings", "max_trained_positions")
        for value in (0, -1, NAN, INF, True, *([32.5] if integer else [])):
            with pytest.raises(ValueError, match=f"{key}={value!r}; it must be"):
                RotaryEmbedding(16, rope_scaling=given | {key: value})


def test_numbers_that_do_not_go_together():
    def rotary(base=None, **scaling):
        RotaryEmbedding(16, None, 64, base, rope_scaling=scaling or None)

    with pytest.raises(ValueError, match="base other than 1"):
        rotary(1, rope_type="yarn", **SCALINGS["yarn"])
    with pytest.raises(ValueError, match="power of -2.5, which must be above 0"):
        rotary(rope_type="dynamic", factor=4, max_trained_positions=512)
    with pytest.raises(ValueError, match="6.4e.31 positions is too large"):
        rotary(rope_type="linear", factor=1e30)
    with pytest.raises(ValueError, match="base=1e-38,.* not finite in fp32"):
        rotary(1e-38, rope_type="dynamic", alpha=1e-38)


def test_the_length_of_the_longest_sequence_is_an_int(device):
    layer = TrainableAttention(2, 8).to(device)
    x = torch.randn(10, 2, 8, device=device)
    bounds = torch.tensor([0, 4, 10], dtype=torch.int32, device=device)
    expected = layer(x, x, x, bounds)
    assert torch.equal(layer(x, x, x, bounds, np.int64(6)), expected)
    for value in (10.0, NAN, -1, True, "6", torch.tensor(10, device=device)):
        given = "a tensor" if isinstance(value, torch.Tensor) else repr(value)
        for cu_seqlens in (bounds, None):
            with pytest.raises(ValueError, match=f"max_seqlen={given} must be"):
                layer(x, x, x, cu_seqlens, value)


def test_token_ids_are_in_the_vocabulary():
    layer = VocabParallelEmbedding(9, 4)
    for ids, first in (([9], 9), ([3, -100, 50], -100), ([[1, 2], [3, 11]], 11)):
        for dtype in (torch.int64, torch.int32):
            match = f"got token id {first}; ids are 0 to 8"
            with pytest.raises(IndexError, match=match):
                layer(torch.tensor(ids, dtype=dtype))
    with pytest.raises(TypeError, match="got ids of list; they must be a tensor"):
        layer([1, 2])
