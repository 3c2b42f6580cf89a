# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""Collectives with a backward, in conjugate pairs.

The backward of each is the forward of its partner:

=========================  ============================  ==========================
function                   forward                       backward
=========================  ============================  ==========================
copy_to_group              identity                      sum over ranks
reduce_from_group          sum over ranks                identity
all_gather_to_group        concatenate along dim         slice of the sum over ranks
reduce_scatter_from_group  slice of the sum over ranks   concatenate along dim
split_to_group             take this rank's slice        concatenate along dim
gather_from_group          concatenate along dim         take this rank's slice
all_to_all_in_group        exchange pieces               exchange them back
=========================  ============================  ==========================

`..._to_group` leads into a computation that differs by rank, `..._from_group` out of
it: what follows the latter is computed alike on every rank, or on its own slice of the
tokens. Megatron-LM's f and g (arXiv:1909.08053, section 3) are the first pair, its
g-bar and f-bar (arXiv:2205.05198, section 4.2) the second.

`sum_parts_from_group` and `reduce_scatter_parts_from_group` are sums over ranks in one
order, whose bits do not depend on how many ranks there are; in batch-invariant mode the
sums of the forwards above are those.

The group is a `torch.distributed.ProcessGroup`, or a `ParallelContext` for its
tensor-parallel group. Over one rank, or None, all are the identity and communicate
nothing. In a step of vLLM's engine they are the engine's own, see `communication`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch.autograd import Function
from torch.autograd.function import once_differentiable
from torch.distributed import ProcessGroup

from vllm.model_executor.determinism.mode import is_batch_invariant
from vllm.model_executor.determinism.ordered_sum import ordered_sum
from vllm.model_executor.layers.training import communication
from vllm.model_executor.op_library import refuse_forward_mode
from vllm.model_executor.parallel_context import ParallelContext

# What has the derivatives that collectives lack, for errors.
ON_ONE_RANK = "compute it on one rank, which needs no collectives"

Group = ParallelContext | ProcessGroup | None


def process_group(group: Group) -> ProcessGroup | None:
    """Return the group to communicate over; None if there is nothing to communicate."""
    if isinstance(group, ParallelContext):
        return group.group("tp") if group.tp_size > 1 else None
    return None if group is None or group.size() == 1 else group


def copy_to_group(x: torch.Tensor, group: Group) -> torch.Tensor:
    """Pass a tensor that all ranks hold to a computation that differs by rank.

    Args:
        x: Any shape, equal on all ranks.
        group: The ranks.
    """
    ranks = process_group(group)
    return x if ranks is None else _apply(Copy, x, ranks)


def reduce_from_group(x: torch.Tensor, group: Group) -> torch.Tensor:
    """Add up the ranks' partial results; every rank gets the sum.

    Args:
        x: Any shape, the same on all ranks.
        group: The ranks.
    """
    ranks = process_group(group)
    if ranks is None:
        return x
    if is_batch_invariant():
        return _apply(SumParts, ranks, x)
    return _apply(Reduce, x, ranks)


def sum_parts_from_group(parts: Sequence[torch.Tensor], group: Group) -> torch.Tensor:
    """Add up all ranks' parts in rank order, in fp32, rounded once.

    The bits depend on the parts alone: not on their shape or on how many of them a rank
    holds.

    Args:
        parts: This rank's parts: tensors of one shape, as many on each rank.
        group: The ranks.

    Returns:
        Shape and dtype of a part.
    """
    ranks = process_group(group)
    if len(parts) == 1 and ranks is None:
        return parts[0]
    return _apply(SumParts, ranks, *parts)


def all_gather_to_group(x: torch.Tensor, group: Group, dim: int) -> torch.Tensor:
    """Pass the ranks' concatenated slices to a computation that differs by rank.

    Args:
        x: This rank's slice, of one shape on all ranks.
        group: The ranks.
        dim: The dim to concatenate in, in rank order.
    """
    ranks = process_group(group)
    return x if ranks is None else _apply(AllGather, x, ranks, dim)


def reduce_scatter_from_group(x: torch.Tensor, group: Group, dim: int) -> torch.Tensor:
    """Add up the ranks' partial results; every rank gets its slice of the sum.

    Args:
        x: Any shape, the same on all ranks.
        group: The ranks.
        dim: The dim that is cut into slices.

    Raises:
        ValueError: The dim is not a multiple of the number of ranks.
    """
    ranks = process_group(group)
    if ranks is None:
        return x
    _check_divisible(x, ranks, dim)
    if is_batch_invariant():
        return _apply(ScatterParts, ranks, dim, x)
    return _apply(ReduceScatter, x, ranks, dim)


def reduce_scatter_parts_from_group(
    parts: Sequence[torch.Tensor], group: Group, dim: int
) -> torch.Tensor:
    """Return this rank's slice of `sum_parts_from_group`, bitwise identical.

    Args:
        parts: This rank's parts: tensors of one shape, as many on each rank.
        group: The ranks.
        dim: The dim that is cut into slices.

    Raises:
        ValueError: The dim is not a multiple of the number of ranks.
    """
    ranks = process_group(group)
    if ranks is None:
        return sum_parts_from_group(parts, None)
    _check_divisible(parts[0], ranks, dim)
    return _apply(ScatterParts, ranks, dim, *parts)


def gather_from_group(x: torch.Tensor, group: Group, dim: int = -1) -> torch.Tensor:
    """Concatenate the ranks' tensors along a dim, in rank order.

    Args:
        x: A tensor of the same shape on all ranks.
        group: The ranks.
        dim: The dim to concatenate in.
    """
    ranks = process_group(group)
    return x if ranks is None else _apply(Gather, x, ranks, dim)


def split_to_group(x: torch.Tensor, group: Group, dim: int = -1) -> torch.Tensor:
    """Keep this rank's slice of a dim.

    Args:
        x: Any shape, equal on all ranks.
        group: The ranks.
        dim: The dim that is cut into slices.

    Raises:
        ValueError: The dim is not a multiple of the number of ranks.
    """
    ranks = process_group(group)
    if ranks is None:
        return x
    _check_divisible(x, ranks, dim)
    return _apply(Split, x, ranks, dim)


def all_to_all_in_group(
    x: torch.Tensor,
    group: Group,
    input_sizes: Sequence[int] | None = None,
    output_sizes: Sequence[int] | None = None,
) -> torch.Tensor:
    """Send rank i the i-th piece of the first dim; return what arrives, in rank order.

    Args:
        x: shape = [sum(input_sizes), ...], the same on all ranks but for the first dim.
        group: The ranks.
        input_sizes: Size of the piece for each rank; equal pieces if None.
        output_sizes: Size of the piece from each rank; given with input_sizes.

    Returns:
        shape = [sum(output_sizes), ...].

    Raises:
        ValueError: Sizes do not match x or the group, or only one list is given.
    """
    ranks = process_group(group)
    if ranks is None:
        return x
    if input_sizes is None and output_sizes is None:
        _check_divisible(x, ranks, 0)
        input_sizes = output_sizes = [x.shape[0] // ranks.size()] * ranks.size()
    if (
        input_sizes is None
        or output_sizes is None
        or not len(input_sizes) == len(output_sizes) == ranks.size()
        or sum(input_sizes) != x.shape[0]
    ):
        raise ValueError(
            f"all_to_all_in_group got input_sizes={input_sizes} and "
            f"output_sizes={output_sizes} for x of shape {tuple(x.shape)}; over "
            f"{ranks.size()} ranks each needs that many sizes, and input_sizes must "
            f"add up to {x.shape[0]}. Give both, or neither for equal pieces."
        )
    return _apply(AllToAll, x, ranks, tuple(output_sizes), tuple(input_sizes))


def sum_gradient_over_replicas(
    param: torch.Tensor, start: int, replicas: int, group: Group
) -> torch.Tensor:
    """The parameter itself; its gradient is summed over the ranks that replicate it.

    Args:
        param: A parameter whose rows from `start` on are equal on each
            `replicas` consecutive ranks.
        start: First replicated row.
        replicas: How many consecutive ranks hold the same rows.
        group: The ranks.
    """
    ranks = process_group(group)
    if replicas == 1 or ranks is None:
        return param
    return _apply(SumReplicas, param, start, replicas, ranks)


def _apply(function: type[Function], *args: Any) -> torch.Tensor:
    refuse_forward_mode(
        f"The collective {function.__name__}", *args, instead=ON_ONE_RANK
    )
    return function.apply(*args)


def _check_divisible(x: torch.Tensor, ranks: ProcessGroup, dim: int) -> None:
    if x.shape[dim] % ranks.size():
        raise ValueError(
            f"Dim {dim} of shape {tuple(x.shape)} is not divisible by the group's "
            f"{ranks.size()} ranks; pad it to a multiple of {ranks.size()}."
        )


# The autograd functions, over groups of more than one rank. A second derivative is an
# error.


class Copy(Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, group: ProcessGroup) -> torch.Tensor:
        ctx.group = group
        return x.view_as(x)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None]:
        return communication.all_reduce(grad, ctx.group), None


class Reduce(Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, group: ProcessGroup) -> torch.Tensor:
        return communication.all_reduce(x, group)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None]:
        return grad, None


class SumParts(Function):
    @staticmethod
    def forward(
        ctx: Any, group: ProcessGroup | None, *parts: torch.Tensor
    ) -> torch.Tensor:
        ctx.count = len(parts)
        own = torch.stack(parts)
        if group is None:
            return ordered_sum(own)
        return communication.ordered_all_reduce(own, group)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        return None, *[grad] * ctx.count


class AllGather(Function):
    @staticmethod
    def forward(
        ctx: Any, x: torch.Tensor, group: ProcessGroup, dim: int
    ) -> torch.Tensor:
        ctx.group, ctx.dim = group, dim
        return communication.all_gather(x, group, dim)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        return communication.reduce_scatter(grad, ctx.group, ctx.dim), None, None


class ReduceScatter(Function):
    @staticmethod
    def forward(
        ctx: Any, x: torch.Tensor, group: ProcessGroup, dim: int
    ) -> torch.Tensor:
        ctx.group, ctx.dim = group, dim
        return communication.reduce_scatter(x, group, dim)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        return communication.all_gather(grad, ctx.group, ctx.dim), None, None


class ScatterParts(Function):
    @staticmethod
    def forward(
        ctx: Any, group: ProcessGroup, dim: int, *parts: torch.Tensor
    ) -> torch.Tensor:
        ctx.group, ctx.dim, ctx.count = group, dim, len(parts)
        return communication.ordered_reduce_scatter(torch.stack(parts), group, dim)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        whole = communication.all_gather(grad, ctx.group, ctx.dim)
        return None, None, *[whole] * ctx.count


class Gather(Function):
    @staticmethod
    def forward(
        ctx: Any, x: torch.Tensor, group: ProcessGroup, dim: int
    ) -> torch.Tensor:
        ctx.group, ctx.dim = group, dim
        return communication.all_gather(x, group, dim)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        return communication.own_slice(grad, ctx.group, ctx.dim), None, None


class Split(Function):
    @staticmethod
    def forward(
        ctx: Any, x: torch.Tensor, group: ProcessGroup, dim: int
    ) -> torch.Tensor:
        ctx.group, ctx.dim = group, dim
        return communication.own_slice(x, group, dim)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        return communication.all_gather(grad, ctx.group, ctx.dim), None, None


class AllToAll(Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        group: ProcessGroup,
        output_sizes: tuple[int, ...],
        input_sizes: tuple[int, ...],
    ) -> torch.Tensor:
        ctx.group, ctx.sizes = group, (input_sizes, output_sizes)
        return communication.all_to_all(x, group, output_sizes, input_sizes)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None, None, None]:
        back = communication.all_to_all(grad, ctx.group, *ctx.sizes)
        return back, None, None, None


class SumReplicas(Function):
    @staticmethod
    def forward(
        ctx: Any, param: torch.Tensor, start: int, replicas: int, group: ProcessGroup
    ) -> torch.Tensor:
        ctx.start, ctx.replicas, ctx.group = start, replicas, group
        return param.view_as(param)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None, None, None]:
        grad = grad.clone(memory_format=torch.contiguous_format)
        shared = grad[ctx.start :]
        pieces = communication.all_gather(shared[None], ctx.group, 0)
        first = ctx.group.rank() // ctx.replicas * ctx.replicas
        # In rank order on every rank, so the replicas stay equal bit for bit.
        shared.copy_(pieces[first : first + ctx.replicas].sum(0))
        return grad, None, None, None
