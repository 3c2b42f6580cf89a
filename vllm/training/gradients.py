# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""The norm of gradients that are sharded over tensor and data parallelism."""

from __future__ import annotations

import math

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.tensor import DTensor, Shard

from vllm.model_executor.parallel_context import ParallelContext
from vllm.training.layout import CheckpointLayout, tensors_of, unwrapped
from vllm.training.shards import ShardedParameter, held


@torch.no_grad()
def clip_grad_norm_(
    model: nn.Module, max_norm: float, context: ParallelContext
) -> torch.Tensor:
    """Scale a model's gradients so that their norm is at most `max_norm`.

    As `torch.nn.utils.clip_grad_norm_` on a model in one process: the norm is that of
    all gradients together, each element counted once however many ranks hold it. All
    processes call it, after the backward, when DistributedDataParallel or FSDP2 have
    summed the gradients, and all scale by the same factor.

    Args:
        model: a trainer's model, also under DistributedDataParallel or FSDP2.
        max_norm: above 0; `math.inf` measures only.
        context: that the model was built with.

    Returns:
        The 2-norm before, a scalar; fp64 where a gradient is, else fp32. Infinite or
        NaN gradients give such a norm, and are scaled by it.

    Raises:
        ValueError: max_norm is not above 0, or no parameter has a gradient.
    """
    if not max_norm > 0:
        raise ValueError(f"max_norm={max_norm!r} must be a number above 0.")
    model = unwrapped(model)
    tensors = tensors_of(model)
    squares, gradients = [], []
    for name, parameter in CheckpointLayout.of(model).parameters.items():
        tensor = tensors[name]
        if tensor.grad is None:
            continue
        gradient = held(tensor.grad)
        gradients.append(gradient)
        for shard in parameter.shards:
            own = shard.local(gradient)
            dtype = torch.promote_types(own.dtype, torch.float32)
            square = torch.linalg.vector_norm(own, dtype=dtype).square()
            ranks = _holders(parameter, tensor, context) * shard.replicas
            squares.append(square / ranks)
    if not gradients:
        raise ValueError(
            "No parameter has a gradient; call clip_grad_norm_ after backward() and "
            "before zero_grad()."
        )
    total = torch.stack(squares).sum()
    for axis in ("tp", "dp", "pp"):
        if getattr(context, f"{axis}_size") > 1:
            dist.all_reduce(total, group=context.group(axis))
    norm = total.sqrt()
    factor = (max_norm / (norm + 1e-6)).clamp(max=1.0)
    for gradient in gradients:
        gradient.mul_(factor.to(gradient.dtype))
    return norm


def _holders(
    parameter: ShardedParameter, tensor: torch.Tensor, context: ParallelContext
) -> int:
    """How many ranks of tensor and data parallelism hold an element, without replicas.

    Replicas are ranks that hold the same piece of what is cut over "tp".
    """
    cuts = context.tp_size if "tp" in parameter.dims else 1
    if isinstance(tensor, DTensor):
        mesh = tensor.device_mesh
        names = mesh.mesh_dim_names or (None,) * mesh.ndim
        cuts *= math.prod(
            mesh.size(index)
            for index, placement in enumerate(tensor.placements)
            if isinstance(placement, Shard) and names[index] != "tp"
        )
    return context.tp_size * context.dp_size // cuts
