# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""What the processes of a job do together around files."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar, cast

import torch.distributed as dist

T = TypeVar("T")


def rank_and_size() -> tuple[int, int]:
    """This process's rank in the job, and the number of processes."""
    if not dist.is_initialized():
        return 0, 1
    return dist.get_rank(), dist.get_world_size()


def gather_objects(value: T) -> list[T]:
    """The value of every rank, on every rank."""
    _, size = rank_and_size()
    values = [value] * size
    if size > 1:
        dist.all_gather_object(values, value)
    return values


def on_rank_0(function: Callable[[], T]) -> T:
    """The result of a function that runs on rank 0, on every rank.

    Raises:
        RuntimeError: on the other ranks, with the message of what was raised on
            rank 0.
    """
    rank, size = rank_and_size()
    outcome: list = [None, None]
    error = None
    if rank == 0:
        try:
            outcome[0] = function()
        except Exception as raised:
            error = raised
            outcome[1] = f"{type(raised).__name__}: {raised}"
    if size > 1:
        dist.broadcast_object_list(outcome, src=0)
    if error is not None:
        raise error
    if outcome[1] is not None:
        raise RuntimeError(f"Rank 0 failed. {outcome[1]}")
    return outcome[0]


def on_all_ranks(function: Callable[[], T]) -> list[T]:
    """The results of a function that every rank runs, by rank, on every rank.

    It is for work that may fail on some ranks, before all of them communicate.

    Raises:
        RuntimeError: where another rank failed, with its message.
    """
    result = error = message = None
    try:
        result = function()
    except Exception as raised:
        error, message = raised, f"{type(raised).__name__}: {raised}"
    outcomes = gather_objects((result, message))
    if error is not None:
        raise error
    for rank, (_, message) in enumerate(outcomes):
        if message is not None:
            raise RuntimeError(f"Rank {rank} failed. {message}")
    return [cast(T, result) for result, _ in outcomes]
