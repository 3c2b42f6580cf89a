# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""Tensor-parallel collectives with a backward, in conjugate pairs.

The backward of each is the forward of its partner:

=====================  ======================  =======================
function               forward                 backward
=====================  ======================  =======================
copy_to_group          identity                sum over ranks
reduce_from_group      sum over ranks          identity
sum_parts_from_group   ordered sum of parts    identity, to each part
gather_from_group      concatenate last dim    take this rank's slice
split_to_group         take this rank's slice  concatenate last dim
=====================  ======================  =======================

The pairs are right for tensor parallelism, where what follows a reduce or a gather is
computed alike on every rank. They are named after Megatron-LM's (arXiv:1909.08053,
section 3: its f and g are copy_to_group and reduce_from_group).

With `context.tp_size == 1` each is the identity and communicates nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch.autograd import Function
from torch.distributed import ProcessGroup

from vllm.model_executor.layers.training.ops.ordered_sum import ordered_sum
from vllm.model_executor.parallel_context import ParallelContext


def copy_to_group(x: torch.Tensor, context: ParallelContext) -> torch.Tensor:
    """Hand a tensor that all ranks hold to a computation that differs by rank.

    Args:
        x: any shape, equal on all ranks.
        context: names the tensor-parallel group.
    """
    if context.tp_size == 1:
        return x
    return _Copy.apply(x, context.group("tp"))


def reduce_from_group(x: torch.Tensor, context: ParallelContext) -> torch.Tensor:
    """Add up the ranks' partial results; every rank gets the sum.

    Args:
        x: any shape, the same on all ranks.
        context: names the tensor-parallel group.
    """
    if context.tp_size == 1:
        return x
    return _Reduce.apply(x, context.group("tp"))


def sum_parts_from_group(
    parts: Sequence[torch.Tensor], context: ParallelContext
) -> torch.Tensor:
    """Add up all ranks' parts in rank order, in fp32, rounded once.

    The bits depend on the parts alone: not on their shape or on how many of them a rank
    holds.

    Args:
        parts: this rank's, of one shape, equally many on each rank.
        context: names the tensor-parallel group.

    Returns:
        shape and dtype of a part.
    """
    if len(parts) == 1 and context.tp_size == 1:
        return parts[0]
    return _SumParts.apply(context.group("tp") if context.tp_size > 1 else None, *parts)


def gather_from_group(x: torch.Tensor, context: ParallelContext) -> torch.Tensor:
    """Concatenate the ranks' tensors along the last dim, in rank order.

    Args:
        x: shape = [..., n], the same on all ranks.
        context: names the tensor-parallel group.

    Returns:
        shape = [..., n * tp_size].
    """
    if context.tp_size == 1:
        return x
    return _Gather.apply(x, context.group("tp"))


def split_to_group(x: torch.Tensor, context: ParallelContext) -> torch.Tensor:
    """Keep this rank's slice of the last dim.

    Args:
        x: shape = [..., n], equal on all ranks.
        context: names the tensor-parallel group.

    Returns:
        shape = [..., n / tp_size].

    Raises:
        ValueError: the ranks do not divide n.
    """
    if context.tp_size == 1:
        return x
    if x.shape[-1] % context.tp_size:
        raise ValueError(
            f"The last dim of shape {tuple(x.shape)} is not divisible by "
            f"tp_size={context.tp_size}."
        )
    return _Split.apply(x, context.group("tp"))


def sum_gradient_over_replicas(
    param: torch.Tensor, start: int, replicas: int, context: ParallelContext
) -> torch.Tensor:
    """The parameter itself; its gradient is summed over the ranks that replicate it.

    Args:
        param: a parameter whose rows from `start` on are equal on each
            `replicas` consecutive ranks.
        start: first replicated row.
        replicas: how many consecutive ranks hold the same rows.
        context: names the tensor-parallel group.
    """
    if replicas == 1:
        return param
    return _SumReplicas.apply(param, start, replicas, context.group("tp"))


def _all_reduce(x: torch.Tensor, group: ProcessGroup) -> torch.Tensor:
    total = x.clone(memory_format=torch.contiguous_format)
    dist.all_reduce(total, group=group)
    return total


def all_gather_last_dim(x: torch.Tensor, group: ProcessGroup) -> torch.Tensor:
    x = x.contiguous()
    pieces = [torch.empty_like(x) for _ in range(group.size())]
    dist.all_gather(pieces, x, group=group)
    return torch.cat(pieces, -1)


def _own_slice(x: torch.Tensor, group: ProcessGroup) -> torch.Tensor:
    return x.chunk(group.size(), -1)[group.rank()].contiguous()


class _Copy(Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, group: ProcessGroup) -> torch.Tensor:
        ctx.group = group
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None]:
        return _all_reduce(grad, ctx.group), None


class _Reduce(Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, group: ProcessGroup) -> torch.Tensor:
        return _all_reduce(x, group)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None]:
        return grad, None


class _SumParts(Function):
    @staticmethod
    def forward(
        ctx: Any, group: ProcessGroup | None, *parts: torch.Tensor
    ) -> torch.Tensor:
        ctx.count = len(parts)
        own = torch.stack(parts)
        if group is None:
            return ordered_sum(own)
        gathered = own.new_empty(group.size() * len(parts), *own.shape[1:])
        dist.all_gather_into_tensor(gathered, own, group=group)
        return ordered_sum(gathered)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        return None, *[grad] * ctx.count


class _Gather(Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, group: ProcessGroup) -> torch.Tensor:
        ctx.group = group
        return all_gather_last_dim(x, group)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None]:
        return _own_slice(grad, ctx.group), None


class _Split(Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, group: ProcessGroup) -> torch.Tensor:
        ctx.group = group
        return _own_slice(x, group)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None]:
        return all_gather_last_dim(grad, ctx.group), None


class _SumReplicas(Function):
    @staticmethod
    def forward(
        ctx: Any, param: torch.Tensor, start: int, replicas: int, group: ProcessGroup
    ) -> torch.Tensor:
        ctx.start, ctx.replicas, ctx.group = start, replicas, group
        return param.view_as(param)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None, None, None]:
        grad = grad.clone(memory_format=torch.contiguous_format)
        shared = grad[ctx.start :]
        pieces = [torch.empty_like(shared) for _ in range(ctx.group.size())]
        dist.all_gather(pieces, shared, group=ctx.group)
        first = ctx.group.rank() // ctx.replicas * ctx.replicas
        # In rank order on every rank, so the replicas stay equal bit for bit.
        shared.copy_(torch.stack(pieces[first : first + ctx.replicas]).sum(0))
        return grad, None, None, None
