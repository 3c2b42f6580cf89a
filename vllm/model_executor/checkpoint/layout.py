# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""How a model's parameters and a checkpoint's tensors correspond.

A checkpoint holds whole tensors under the model's parameter names. A parameter in
which a layer keeps several tensors (q, k and v; gate and up) stands in it as those
tensors if the layer names them, and is accepted whole as well.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import nn
from torch.distributed.fsdp import FSDPModule

from vllm.model_executor.checkpoint.declared_sharding import declared_shardings
from vllm.model_executor.checkpoint.shards import LocalParameter, local_parameter
from vllm.model_executor.checkpoint.specification import (
    CheckpointTensor,
    ParameterSharding,
)
from vllm.model_executor.checkpoint.state_dict_hooks import state_dict_hooks
from vllm.model_executor.checkpoint.wrappers import (
    join,
    named_modules,
    named_tensors,
    own_tensors,
)
from vllm.model_executor.parallel_context import ParallelContext


@dataclass
class CheckpointLayout:
    """The checkpoint tensors of a module.

    Attributes:
        tensors: What a checkpoint of the module holds, by name.
        fused: Whole fused parameters, accepted in place of their named parts.
        aliases: Other names of tied parameters, with the name of the first: accepted
            in its place.
        parameters: What this rank holds of each parameter and persistent buffer, by
            name.
        hooks: What changes state dicts and is not run, in words.
    """

    tensors: dict[str, CheckpointTensor] = field(default_factory=dict)
    fused: dict[str, CheckpointTensor] = field(default_factory=dict)
    aliases: dict[str, str] = field(default_factory=dict)
    parameters: dict[str, LocalParameter] = field(default_factory=dict)
    hooks: list[str] = field(default_factory=list)

    @classmethod
    def of(cls, module: nn.Module) -> CheckpointLayout:
        """The layout of `module`, before it is bound to an engine.

        What FSDP2 has gathered for a computation is freed, as the sharded parameters
        are those that stay.
        """
        for layer in module.modules():
            if isinstance(layer, FSDPModule):
                layer.reshard()
        layout = cls(hooks=[str(hook) for hook in state_dict_hooks(module)])
        seen: dict[int, str] = {}
        declared = declared_shardings(module)
        for path, _, layer in named_modules(module):
            for name, tensor in own_tensors(layer):
                full_name = join(path, name)
                if id(tensor) in seen:
                    layout.aliases[full_name] = seen[id(tensor)]
                    continue
                seen[id(tensor)] = full_name
                replicated = (
                    ParameterSharding.replicated(tensor.shape),
                    ParallelContext(),
                )
                sharding, context = declared.get(full_name, replicated)
                stored = layout._add(path, name, sharding, tensor.dtype)
                layout.parameters[full_name] = local_parameter(
                    full_name, tensor, sharding, stored, context
                )
        return layout

    def tensor(self, name: str) -> CheckpointTensor | None:
        """What a checkpoint's tensor of that name is loaded into; None if nothing."""
        known = self.aliases.get(name, name)
        return self.tensors.get(known) or self.fused.get(known)

    def _add(
        self, path: str, name: str, sharding: ParameterSharding, dtype: torch.dtype
    ) -> list[CheckpointTensor]:
        """Add a parameter's tensors; returns the one that each part is stored in."""
        parameter = join(path, name)
        parts, dim = sharding.parts, sharding.dim
        whole = CheckpointTensor(
            parameter, parameter, sharding.shape, dtype, parts, dim
        )
        if dim is None or any(part.name is None for part in parts):
            self.tensors[parameter] = whole
            return [whole] * len(parts)
        self.fused[parameter] = whole
        parent = path.rpartition(".")[0]
        stored, origin = [], 0
        for part in parts:
            shape = list(sharding.shape)
            shape[dim] = part.size
            tensor = CheckpointTensor(
                join(parent, part.name or "", name),
                parameter,
                torch.Size(shape),
                dtype,
                (part,),
                dim,
                origin,
            )
            self.tensors[tensor.name] = tensor
            stored.append(tensor)
            origin += part.size
        return stored


def sharding(model: nn.Module) -> dict[str, LocalParameter]:
    """Return how every parameter and persistent buffer of a model is sharded.

    Args:
        model: A trainer's model, built with the `ParallelContext` of this process, also
            under DistributedDataParallel or FSDP2. For an engine, call
            `llm.collective_rpc("call_training", args=("sharding",))`.

    Returns:
        What this rank holds, by parameter name. Tied parameters appear under the first
        of their names.
    """
    return CheckpointLayout.of(model).parameters


def tensors_of(module: nn.Module) -> dict[str, torch.Tensor]:
    """The tensors of a module by the names that a layout has."""
    tensors: dict[str, torch.Tensor] = {}
    seen: set[int] = set()
    for name, tensor in named_tensors(module):
        if id(tensor) not in seen:
            seen.add(id(tensor))
            tensors[name] = tensor
    return tensors


def refuse_meta(tensors: Mapping[str, torch.Tensor]) -> None:
    """Refuse a module that has no memory for its tensors.

    Raises:
        ValueError: Names the first tensor on the meta device.
    """
    names = [name for name, tensor in tensors.items() if tensor.device.type == "meta"]
    if names:
        raise ValueError(
            f"{len(names)} of the module's {len(tensors)} tensors are on the meta "
            f"device, which has no memory for them, first {names[0]}. Call "
            "module.to_empty(device=...) before, and after it whatever fills buffers "
            "of your own that are not in the checkpoint."
        )


FLOATS = frozenset((torch.float64, torch.float32, torch.bfloat16, torch.float16))
WRONG_DTYPE = "Wrong dtype; only fp64, fp32, bf16 and fp16 are converted to each other"


class LayoutComparison:
    """Compares the tensors of a checkpoint with a layout, all of them.

    Attributes:
        found: The layout's tensors that were matched, with the name each was given
            under.
        repeated: Other names under which a tensor was given again, by which tied
            parameters have several, with the name that was given first. Whoever reads
            the tensors compares the two.
        different: Pairs of such names whose tensors are not equal.
    """

    def __init__(self, layout: CheckpointLayout) -> None:
        self.layout = layout
        self.found: dict[str, str] = {}
        self.repeated: dict[str, str] = {}
        self.different: list[tuple[str, str]] = []
        self._problems: dict[str, list[str]] = {
            "Not in the model": [],
            "Wrong shape": [],
            WRONG_DTYPE: [],
            "Given twice": [],
        }

    def match(
        self, name: str, shape: Iterable[int], dtype: torch.dtype | str
    ) -> CheckpointTensor | None:
        """The layout's tensor of that name; None if it is not to be loaded.

        Args:
            name: In the checkpoint.
            shape: Its full shape.
            dtype: Its dtype; as text if torch has none like it.
        """
        known = self.layout.aliases.get(name, name)
        tensor = self.layout.tensor(name)
        if tensor is None:
            self._problems["Not in the model"].append(name)
            return None
        given_before = name in self.repeated or self.found.get(known) == name
        first = self.found.setdefault(known, name)
        if given_before:
            self._problems["Given twice"].append(name)
        elif first != name:
            self.repeated[name] = first
        if tuple(shape) != tuple(tensor.shape):
            self._problems["Wrong shape"].append(
                f"{name} is {list(shape)}, the model needs {list(tensor.shape)}"
            )
            return None
        if dtype != tensor.dtype and not {dtype, tensor.dtype} <= FLOATS:
            self._problems[WRONG_DTYPE].append(
                f"{name} is {_text(dtype)}, the model needs {_text(tensor.dtype)}"
            )
            return None
        return None if given_before or first != name else tensor

    def missing(self) -> list[str]:
        """Tensors of the layout that have not been matched."""
        return [
            name
            for name, tensor in self.layout.tensors.items()
            if name not in self.found and tensor.parameter not in self.found
        ]

    def missing_beside_found(self) -> list[str]:
        """Those of `missing` whose module has been matched in part."""
        tensors = self.layout.tensors | self.layout.fused
        touched = {_module_of(tensors[name].parameter) for name in self.found}
        return [
            n for n in self.missing() if _module_of(tensors[n].parameter) in touched
        ]

    def finish(self, missing: list[str]) -> None:
        """Report everything that is wrong.

        Args:
            missing: Names whose absence is an error.

        Raises:
            ValueError: Names every missing, extra, contradictory and wrongly shaped
                or typed tensor.
        """
        split = {
            tensor.parameter
            for name, tensor in self.layout.tensors.items()
            if name in self.found and name != tensor.parameter
        }
        refuse_misfit(
            {
                "Missing": missing,
                **self._problems,
                "Given whole and in parts": split & self.found.keys(),
                TIED: [f"{name} and {other}" for name, other in self.different],
            },
            self.layout.hooks,
        )


TIED = (
    "Tied in the model and different in the checkpoint; leave one out, or keep both by "
    "tie_word_embeddings=False"
)


def refuse_misfit(
    problems: Mapping[str, Iterable[str]], hooks: Sequence[str] = ()
) -> None:
    """Report everything that is wrong with a checkpoint, if anything is.

    Args:
        problems: The names that are concerned, by what is wrong with them.
        hooks: What changes state dicts and is not run, in words.

    Raises:
        ValueError: Names all of them.
    """
    report = ["The checkpoint does not fit the model."]
    for title, found in problems.items():
        names = sorted(found)
        if names:
            report.append(f"{title} ({len(names)}): {'; '.join(names)}.")
    if len(report) == 1:
        return
    if hooks:
        report.append(f"Hooks on state dicts are not run: {'; '.join(hooks[:5])}.")
    raise ValueError(" ".join(report))


def _text(dtype: torch.dtype | str) -> str:
    return str(dtype).removeprefix("torch.")


def _module_of(parameter: str) -> str:
    return parameter.rpartition(".")[0]
