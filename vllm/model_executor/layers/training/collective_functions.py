# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""The autograd functions of `collectives`, over groups of more than one rank.

Each can be differentiated once: a second derivative is an error.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.autograd import Function
from torch.autograd.function import once_differentiable
from torch.distributed import ProcessGroup

from vllm.model_executor.determinism.ordered_sum import ordered_sum
from vllm.model_executor.layers.training import communication


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
