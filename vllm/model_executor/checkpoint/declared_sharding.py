# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""How modules of any library say that their parameters are sharded.

A parameter that no module speaks for is held whole by each rank, unless it is a
`DTensor`, which says itself.
"""

from __future__ import annotations

from collections.abc import Mapping

from torch import nn

from vllm.model_executor.checkpoint.specification import (
    ParameterSharding,
    local_shape,
)
from vllm.model_executor.checkpoint.wrappers import (
    join,
    named_modules,
    named_tensors,
    names_without_wrappers,
)
from vllm.model_executor.parallel_context import ParallelContext


def declared_shardings(
    module: nn.Module,
) -> dict[str, tuple[ParameterSharding, ParallelContext]]:
    """What the modules in `module` declare, by parameter name.

    A module declares by a method `parameter_sharding()`, which returns
    `ParameterSharding`s by parameter name, its submodules' parameters included
    ("fc1.weight"), and by an attribute `parallel_context`, the context it was built
    with. Where an inner module declares the same parameter, that one holds.

    Args:
        module: Not yet bound to an engine.

    Returns:
        The sharding and the context, which says what this rank's shard is.

    Raises:
        TypeError: `parallel_context` is missing.
        ValueError: A name that is no parameter, or a local shape that does not follow
            from the sharding.
    """
    declared = {}
    for path, _, layer in named_modules(module):
        method = getattr(layer, "parameter_sharding", None)
        if not callable(method):
            continue
        context = _context_of(layer, path)
        shardings = method()
        _check_shapes(layer, path, shardings, context.tp_size)
        names = names_without_wrappers(layer)
        for name, sharding in shardings.items():
            declared[join(path, names.get(name, name))] = sharding, context
    return declared


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
    tensors = dict(named_tensors(layer, persistent=False))
    clean = names_without_wrappers(layer)
    where = f"parameter_sharding() of {type(layer).__name__} at {path or 'the top'!r}"
    for given, sharding in shardings.items():
        name = clean.get(given, given)
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
