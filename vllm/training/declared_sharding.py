# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""How the parameters of any module are sharded, whichever library it is from.

Three sources: a module's own `parameter_sharding()`, the placements of a `DTensor`, and
for everything else the rule that each rank holds the whole.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import nn
from torch.distributed.tensor import DTensor, Replicate, Shard

from vllm.model_executor.layers.training.base import TrainingLayer
from vllm.model_executor.layers.training.sharding import (
    ParameterSharding,
    ShardPart,
    local_shape,
)
from vllm.model_executor.parallel_context import ParallelContext


class DeclaredSharding(NamedTuple):
    """A parameter's sharding and this process's place among those that share it."""

    sharding: ParameterSharding
    tp_rank: int
    tp_size: int


def declared_shardings(module: nn.Module) -> dict[str, DeclaredSharding]:
    """What the modules in `module` declare, by parameter name.

    A module declares by a method `parameter_sharding()`, which returns
    `ParameterSharding`s by parameter name, its submodules' parameters included
    ("fc1.weight"), and by an attribute `parallel_context`, the context it was built
    with. Where an inner module declares the same parameter, that one holds.

    Args:
        module: Not yet bound to an engine.

    Raises:
        TypeError: `parallel_context` is missing.
        ValueError: A name that is no parameter, or a local shape that does not follow
            from the sharding.
    """
    declared: dict[str, DeclaredSharding] = {}
    for path, layer in module.named_modules(remove_duplicate=False):
        method = getattr(layer, "parameter_sharding", None)
        if not callable(method):
            continue
        context = _context_of(layer, path)
        shardings = method()
        if not isinstance(layer, TrainingLayer):
            _check_shapes(layer, path, shardings, context.tp_size)
        prefix = f"{path}." if path else ""
        for name, sharding in shardings.items():
            declared[prefix + name] = DeclaredSharding(
                sharding, context.tp_rank, context.tp_size
            )
    return declared


def sharding_of_tensor(name: str, tensor: torch.Tensor) -> DeclaredSharding:
    """The sharding of a parameter that no module declares.

    Args:
        name: The parameter's name, for errors.
        tensor: A parameter or buffer.

    Returns:
        For a `DTensor` its placement over its mesh's dim "tp". Every other tensor is
        held whole by each rank.

    Raises:
        ValueError: The ranks do not divide the sharded dimension, or the placement is
            neither `Replicate` nor `Shard`.
    """
    whole = DeclaredSharding(ParameterSharding.replicated(tensor.shape), 0, 1)
    if not isinstance(tensor, DTensor):
        return whole
    mesh = tensor.device_mesh
    names = mesh.mesh_dim_names or ()
    if "tp" not in names:
        return whole
    axis = names.index("tp")
    size, placement = mesh.size(axis), tensor.placements[axis]
    if isinstance(placement, Replicate):
        return whole
    if not isinstance(placement, Shard):
        raise ValueError(
            f"{name} is a DTensor with placement {placement!r} over tp; a checkpoint "
            "holds parameters with Shard(dim) or Replicate()."
        )
    dim = placement.dim % tensor.dim()
    if tensor.shape[dim] % size:
        raise ValueError(
            f"{name} of shape {tuple(tensor.shape)} is sharded along dim {dim} over "
            f"tp_size={size} ranks, which do not divide {tensor.shape[dim]}. Choose a "
            "tensor-parallel size that does, or leave this module out of the plan."
        )
    part = ShardPart(None, None, tensor.shape[dim])
    sharding = ParameterSharding(tensor.shape, dim, (part,))
    return DeclaredSharding(sharding, mesh.get_local_rank(axis), size)


def local_tensor(tensor: torch.Tensor) -> torch.Tensor:
    """What this rank holds of a `DTensor`; any other tensor as it is."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def _context_of(layer: nn.Module, path: str) -> ParallelContext:
    context = getattr(layer, "parallel_context", None)
    if not isinstance(context, ParallelContext):
        raise TypeError(
            f"{type(layer).__name__} at {path or 'the top'!r} has parameter_sharding() "
            "but no parallel_context. Keep the ParallelContext that it was built with "
            "in self.parallel_context: it says which shard is this rank's."
        )
    return context


def _check_shapes(
    layer: nn.Module, path: str, shardings: Mapping[str, ParameterSharding], size: int
) -> None:
    tensors: dict[str, torch.Tensor] = {
        **dict(layer.named_parameters(remove_duplicate=False)),
        **dict(layer.named_buffers(remove_duplicate=False)),
    }
    where = f"parameter_sharding() of {type(layer).__name__} at {path or 'the top'!r}"
    for name, sharding in shardings.items():
        if name not in tensors:
            raise ValueError(
                f"{where} names {name!r}, which is no parameter of it; it has "
                f"{', '.join(tensors)}."
            )
        expected = local_shape(sharding, size)
        if tensors[name].shape != expected:
            raise ValueError(
                f"{where} gives {name} the full shape {tuple(sharding.shape)} sharded "
                f"along dim {sharding.dim}, of which each of {size} ranks holds "
                f"{tuple(expected)}; this one has {tuple(tensors[name].shape)}."
            )
