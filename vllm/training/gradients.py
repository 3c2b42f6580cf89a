# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""The norm of gradients that are sharded over tensor and data parallelism."""

from __future__ import annotations

import math

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.tensor import DTensor

from vllm.model_executor.checkpoint.layout import CheckpointLayout, tensors_of
from vllm.model_executor.checkpoint.shards import (
    LocalParameter,
    local_tensor,
    sharded_mesh_dims,
)
from vllm.model_executor.parallel_context import ParallelContext


@torch.no_grad()
def clip_grad_norm_(
    model: nn.Module, max_norm: float, context: ParallelContext
) -> torch.Tensor:
    """Scale a model's gradients so that their norm is at most `max_norm`.

    The result is that of `torch.nn.utils.clip_grad_norm_` on the model in one process:
    the norm covers all gradients, and each element counts once, however many ranks
    hold it. All processes call this after the backward, when DistributedDataParallel
    or FSDP2 have added up the gradients. All processes scale by the same factor.

    Args:
        model: A trainer's model, also under DistributedDataParallel or FSDP2.
        max_norm: Largest norm, above 0. With `math.inf` the gradients do not change.
        context: The context that the model was built with.

    Returns:
        The 2-norm before scaling, shape = [], fp64 if the model has fp64 parameters,
        else fp32. The factor is rounded to each gradient's dtype. If a gradient is
        infinite or NaN, so is the norm, and the scaled gradients are NaN.

    Raises:
        ValueError: max_norm is not above 0, or no parameter of any rank has a
            gradient.
    """
    if not max_norm > 0:
        raise ValueError(f"max_norm={max_norm!r} must be a number above 0.")
    tensors = tensors_of(model)
    # Alike on every rank, also on one that holds nothing of what is trained.
    dtypes = {tensor.dtype for tensor in tensors.values()}
    dtype = torch.float64 if torch.float64 in dtypes else torch.float32
    square = torch.zeros((), dtype=dtype, device=context.device)
    gradients = []
    for name, parameter in CheckpointLayout.of(model).parameters.items():
        tensor = tensors[name]
        if tensor.grad is None:
            continue
        gradient = local_tensor(_placed_as(tensor))
        gradients.append(gradient)
        for shard in parameter.shards:
            norm = torch.linalg.vector_norm(shard.local(gradient), dtype=dtype)
            ranks = _holders(parameter, tensor, context) * shard.replicas
            square += (norm.square() / ranks).to(square.device)
    count = torch.full_like(square, len(gradients))
    total = torch.stack([square, count])
    if context.world_size > 1:
        dist.all_reduce(total)
    if not total[1]:
        raise ValueError(
            "No parameter has a gradient; call clip_grad_norm_ after backward() and "
            "before zero_grad()."
        )
    norm = total[0].sqrt()
    if max_norm < math.inf:
        factor = (max_norm / (norm + 1e-6)).clamp(max=1.0)
        for gradient in gradients:
            gradient.mul_(factor.to(gradient))
    return norm


def _placed_as(tensor: torch.Tensor) -> torch.Tensor:
    """A parameter's gradient, a DTensor's cut as the parameter is.

    Plain DTensors may have summands on each rank, which are added up here, for good.
    """
    grad = tensor.grad
    assert grad is not None
    if isinstance(grad, DTensor) and isinstance(tensor, DTensor):
        grad = grad.redistribute(placements=tensor.placements)
        tensor.grad = grad
    return grad


def _holders(
    parameter: LocalParameter, tensor: torch.Tensor, context: ParallelContext
) -> int:
    """How many ranks of tensor and data parallelism hold an element, without replicas.

    Replicas are ranks that hold the same piece of what is cut over "tp".
    """
    cuts = context.tp_size if "tp" in parameter.dims else 1
    if isinstance(tensor, DTensor):
        sizes = (size for name, size, _ in sharded_mesh_dims(tensor) if name != "tp")
        cuts *= math.prod(sizes)
    return context.tp_size * context.dp_size // cuts
