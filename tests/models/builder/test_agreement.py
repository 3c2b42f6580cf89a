# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""Ranks that built different models are told apart; the groups are simulated."""

import pytest
import torch
from torch import nn

from vllm.model_executor.checkpoint.layout import CheckpointLayout, LayoutComparison
from vllm.model_executor.layers.training import (
    ColumnParallelLinear,
    TrainableAttention,
)
from vllm.model_executor.models.builder import agreement
from vllm.model_executor.parallel_context import ParallelContext


def compare(monkeypatch, mine, tp=(), pp=()):
    """`compare_ranks` of `mine` on rank 0, with others on ranks 1, 2, ..."""

    def others(axis, description):
        found = []
        for module in {"tp": tp, "pp": pp}[axis]:
            layout = CheckpointLayout.of(module)
            theirs = agreement._describe(module, layout)
            found.append(theirs if axis == "tp" else (*theirs, layout))
        return list(enumerate(found, start=1))

    monkeypatch.setattr(agreement, "others", others)
    return agreement.compare_ranks(mine, CheckpointLayout.of(mine), "build")


def column(rank, out=8, size=2):
    context = ParallelContext(tp_rank=rank, tp_size=size, rank=rank)
    return nn.ModuleDict(
        {"up": ColumnParallelLinear(4, out, bias=False, parallel_context=context)}
    )


def test_shards_of_one_model_agree(monkeypatch):
    layout = compare(monkeypatch, column(0), tp=[column(1)])
    assert layout == CheckpointLayout.of(column(0))


@pytest.mark.parametrize(
    ("other", "message"),
    [
        (column(1, out=16), r"up.weight is \[8, 4\].* and \[16, 4\].*-parallel rank 2"),
        (column(1).double(), r"up.weight is .*float32.* and .*float64.* rank 2"),
        (nn.ModuleDict(), "up.weight is .* on this rank and absent on tensor-parallel"),
        (nn.ModuleDict({"up": nn.Linear(4, 8, False)}), "dim 0 = 8 sharded on this"),
    ],
)
def test_other_parameters(monkeypatch, other, message):
    with pytest.raises(ValueError, match=f"build built different models.*{message}"):
        compare(monkeypatch, column(0), tp=[column(1), other])


def test_other_attention(monkeypatch):
    mine, other = (
        nn.ModuleDict({"attn": TrainableAttention(heads, 64)}) for heads in (2, 4)
    )
    message = "attn is attention with 2 query and 2 key heads of size 64 on this rank"
    with pytest.raises(ValueError, match=message):
        compare(monkeypatch, mine, tp=[other])


def test_stages_make_one_layout(monkeypatch):
    first = nn.ModuleDict({"0": nn.Linear(2, 2), "shared": nn.Linear(2, 2)})
    last = nn.ModuleDict({"1": nn.Linear(2, 3), "shared": nn.Linear(2, 2)})
    layout = compare(monkeypatch, first, pp=[last])
    names = {f"{m}.{p}" for m in ("0", "1", "shared") for p in ("weight", "bias")}
    assert set(layout.tensors) == names
    assert set(layout.parameters) == set(dict(first.named_parameters()))


@pytest.mark.parametrize("head_first", [False, True])
def test_an_embedding_on_two_stages_of_which_one_ties_it(monkeypatch, head_first):
    """A checkpoint with either name fits, whichever module comes first."""
    first = nn.ModuleDict({"embed": nn.Embedding(5, 2)})
    order = ("head", "embed") if head_first else ("embed", "head")
    made = {"head": nn.Linear(2, 5, bias=False), "embed": nn.Embedding(5, 2)}
    made["head"].weight = made["embed"].weight
    last = nn.ModuleDict({name: made[name] for name in order})
    for mine, other in ((first, last), (last, first)):
        layout = compare(monkeypatch, mine, pp=[other])
        for names in (
            ["embed.weight"],
            ["head.weight"],
            ["head.weight", "embed.weight"],
        ):
            check = LayoutComparison(layout)
            assert any([check.match(name, (5, 2), torch.float32) for name in names])
            check.finish(check.missing())


def test_stages_that_do_not_fit(monkeypatch):
    first, last = (nn.ModuleDict({"shared": nn.Linear(2, n)}) for n in (2, 3))
    with pytest.raises(ValueError, match="shared.bias is .* on pipeline stage 1"):
        compare(monkeypatch, first, pp=[last])


def test_a_whole_model_on_every_stage(monkeypatch):
    first, last = (nn.ModuleDict({"attn": TrainableAttention(2, 64)}) for _ in "ab")
    with pytest.raises(ValueError, match="attn on this pipeline stage and on stage 1"):
        compare(monkeypatch, first, pp=[last])
