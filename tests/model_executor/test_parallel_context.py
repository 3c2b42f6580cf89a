# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""ParallelContext as a value."""

import copy
import dataclasses
import pickle

import pytest
import torch
from torch.testing._internal.distributed.fake_pg import FakeProcessGroup

from vllm.model_executor.parallel_context import ParallelContext


def test_single_is_one_of_everything():
    context = ParallelContext.single()
    assert context == ParallelContext() == ParallelContext.single("cpu")
    assert (context.tp_size, context.pp_size, context.dp_size) == (1, 1, 1)
    assert (context.rank, context.world_size, context.local_rank) == (0, 1, 0)
    assert context.tp_reduction_shards == 1
    assert context.tp_group is context.pp_group is context.dp_group is None
    assert ParallelContext.single("cuda:1").device == torch.device("cuda:1")


def test_defaults_follow_from_the_sizes():
    context = ParallelContext(tp_size=2, pp_size=3, dp_size=2, rank=11)
    assert context.world_size == 12
    assert context.tp_reduction_shards == 2
    assert ParallelContext(tp_size=2, tp_reduction_shards=8).tp_reduction_shards == 8
    with pytest.raises(dataclasses.FrozenInstanceError):
        context.tp_size = 4


def test_equal_contexts_have_one_hash():
    a, b = (ParallelContext(tp_rank=1, tp_size=2, rank=1) for _ in range(2))
    assert a == b and hash(a) == hash(b)
    assert a != ParallelContext(tp_rank=0, tp_size=2)


def test_copies_are_the_same_object_and_groups_are_not_pickled():
    plain = ParallelContext(tp_size=2)
    assert pickle.loads(pickle.dumps(plain)) == plain
    context = ParallelContext(tp_rank=1, tp_size=2, rank=1, tp_group=group(1, 2))
    assert copy.copy(context) is copy.deepcopy(context) is context
    with pytest.raises(TypeError, match="process groups.*take parallel_context as a p"):
        pickle.dumps(context)


def group(rank, size):
    return FakeProcessGroup._create_internal(rank, size)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"tp_size": 0}, "tp_size=0 must be an integer of at least 1"),
        ({"pp_size": 1.5}, "pp_size=1.5 must be an integer"),
        ({"dp_size": True}, "dp_size=True must be an integer"),
        ({"tp_rank": 2, "tp_size": 2}, "tp_rank=2 must be an integer from 0 to 1"),
        ({"pp_rank": -1}, "pp_rank=-1 must be an integer from 0 to 0"),
        ({"rank": 2, "world_size": 2}, "rank=2 must be an integer from 0 to 1"),
        (
            {"tp_size": 2, "pp_size": 2, "world_size": 6},
            r"world_size=6 is not a multiple of .* 2 \* 2 \* 1 = 4",
        ),
        ({"tp_size": 2, "tp_reduction_shards": 3}, "=3 must be a positive multiple"),
        ({"tp_reduction_shards": 0}, "tp_reduction_shards=0 must be a positive"),
    ],
    ids=str,
)
def test_inconsistent_fields_are_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        ParallelContext(**fields)


def test_groups_must_fit_the_sizes():
    with pytest.raises(ValueError, match="tp_group has size 2 .*but tp_size=1"):
        ParallelContext(tp_group=group(0, 2))
    with pytest.raises(
        ValueError, match="pp_group has size 4 and this process is rank"
    ):
        ParallelContext(pp_size=2, pp_group=group(0, 4))


def test_without_process_groups():
    with pytest.raises(RuntimeError, match="vllm.training.initialize_parallel"):
        ParallelContext.current()
    assert ParallelContext.current_or_single() == ParallelContext.single()
    with pytest.raises(RuntimeError, match="torch.distributed, which is not initialis"):
        ParallelContext.single().device_mesh()
    with pytest.raises(RuntimeError, match="tp_size=2 but tp_group=None"):
        ParallelContext(tp_size=2).group("tp")
