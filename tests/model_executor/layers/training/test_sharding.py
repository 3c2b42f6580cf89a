# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""Cutting parameters into shards."""

import pytest
import torch

from vllm.model_executor.checkpoint.specification import (
    ParameterSharding,
    Part,
    local_from_full,
    local_shape,
    part_slices,
    split_parts,
    take_shard,
)

# 4 query heads and 2 KV heads of size 3 on 4 ranks: KV heads have 2 replicas.
QKV = ParameterSharding(
    torch.Size((24, 5)),
    0,
    (
        Part("q_proj", "q", 12),
        Part("k_proj", "k", 6, replicas=2),
        Part("v_proj", "v", 6, replicas=2),
    ),
)
VOCAB = ParameterSharding(
    torch.Size((10, 2)), 0, (Part(None, None, 10, padded_size=16),)
)


def numbered(sharding):
    return torch.arange(float(sharding.shape.numel())).view(sharding.shape)


def test_replicated_parts():
    assert local_shape(QKV, 4) == (9, 5)
    assert part_slices(QKV, 4) == (slice(0, 3), slice(3, 6), slice(6, 9))
    full = numbered(QKV)
    q, k, v = split_parts(full, QKV)
    for rank, kv_head in enumerate((0, 0, 1, 1)):
        rows = slice(3 * kv_head, 3 * kv_head + 3)
        expected = torch.cat((q[3 * rank : 3 * rank + 3], k[rows], v[rows]))
        assert torch.equal(local_from_full(full, QKV, rank, 4), expected)


def test_padding_is_zero():
    assert local_shape(VOCAB, 4) == (4, 2)
    full = numbered(VOCAB) + 1
    shards = [local_from_full(full, VOCAB, rank, 4) for rank in range(4)]
    whole = torch.cat(shards)
    assert torch.equal(whole[:10], full)
    assert whole[10:].eq(0).all() and len(whole) == 16


def test_input_dim_and_replicated_parameters():
    row = ParameterSharding(torch.Size((3, 8)), 1, (Part(None, None, 8),))
    full = numbered(row)
    shards = [local_from_full(full, row, rank, 2) for rank in range(2)]
    assert torch.equal(torch.cat(shards, 1), full)
    bias = ParameterSharding.replicated((3,))
    assert local_shape(bias, 2) == (3,) and part_slices(bias, 2) == (slice(None),)
    assert torch.equal(local_from_full(torch.ones(3), bias, 1, 2), torch.ones(3))


def test_one_rank_holds_the_full_parameter():
    full = numbered(VOCAB)
    unpadded = ParameterSharding(VOCAB.shape, 0, (Part(None, None, 10),))
    assert local_from_full(full, unpadded, 0, 1).equal(full)


def test_bad_input_is_refused():
    q = QKV.parts[0]
    with pytest.raises(ValueError, match=r"q_proj of size 12.*tp_size=5.*divides 12"):
        local_shape(QKV, 5)
    with pytest.raises(ValueError, match=r"part q_proj has shape \(6, 5\); \(12, 5\)"):
        take_shard(torch.zeros(6, 5), QKV, q, 0, 4)
    with pytest.raises(ValueError, match=r"\(24, 6\); \(24, 5\) is needed"):
        split_parts(torch.zeros(24, 6), QKV)
    with pytest.raises(ValueError, match="parts add up to 12, which is not the size"):
        ParameterSharding(torch.Size((24, 5)), 0, (q,))
    with pytest.raises(ValueError, match="replicated parameter has one part, not 3"):
        ParameterSharding(QKV.shape, None, QKV.parts)
