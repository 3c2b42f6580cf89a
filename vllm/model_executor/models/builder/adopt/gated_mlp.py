# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""Gated MLPs of any class: down(activation(gate(x)) * up(x)).

They are recognised by what they compute. The module keeps its class and its layers;
the activation and the product with `up` become one op, which reads and writes less
than the two do, and in the engine gate and up become one product.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import nn

from vllm.model_executor.layers.training import (
    GeluAndMul,
    SiluAndMul,
    TrainingLayer,
)
from vllm.model_executor.layers.training.base import runs_own_forward
from vllm.model_executor.models.builder.adopt.converting import computes, random_inputs
from vllm.model_executor.models.builder.merged_linears import LinearGroup

# The child of a gated MLP that holds its activation.
ACTIVATION = "gated_activation"
_MLP = "gated_mlp"
# Recognition takes layers of a size of its own, so that it takes no time.
_HIDDEN_SIZE = 16
_INTERMEDIATE_SIZE = 8


class GatedMLP(NamedTuple):
    """The parts of a gated MLP.

    Attributes:
        inputs: Names of gate and up; or of one layer that is both, the gate first.
        down: Name of the layer that is applied last.
        activation: "silu", "gelu" or "gelu_tanh".
    """

    inputs: tuple[str, ...]
    down: str
    activation: str

    def formula(
        self, x: torch.Tensor, parameters: dict[str, torch.Tensor]
    ) -> torch.Tensor:
        """What is computed with these parameters, rounded as by torch."""
        outputs = [self._linear(name, x, parameters) for name in self.inputs]
        gate, up = torch.cat(outputs, -1).chunk(2, -1)
        return self._linear(self.down, self._activated(gate) * up, parameters)

    def _linear(
        self, name: str, x: torch.Tensor, parameters: dict[str, torch.Tensor]
    ) -> torch.Tensor:
        bias = parameters.get(f"{name}.bias")
        return F.linear(x, parameters[f"{name}.weight"], bias)

    def _activated(self, gate: torch.Tensor) -> torch.Tensor:
        if self.activation == "silu":
            return F.silu(gate)
        return F.gelu(gate, approximate=self._approximate())

    def _approximate(self) -> str:
        return "tanh" if self.activation == "gelu_tanh" else "none"

    def layer(self) -> SiluAndMul | GeluAndMul:
        """The training layer of the activation."""
        if self.activation == "silu":
            return SiluAndMul()
        return GeluAndMul(self._approximate())


def find(model: nn.Module) -> dict[nn.Module, GatedMLP]:
    """The gated MLPs of a model whose layers have not been converted."""
    found = {module: _recognised(module) for module in model.modules()}
    return {module: mlp for module, mlp in found.items() if mlp is not None}


def use(module: nn.Module, mlp: GatedMLP) -> None:
    """Let a module compute by `forward` once it is wrapped."""
    vars(module)[_MLP] = mlp
    module.add_module(ACTIVATION, mlp.layer())


def forward(module: nn.Module, x: torch.Tensor) -> torch.Tensor:
    """What a gated MLP computes, shape = [..., hidden_size].

    Args:
        module: One that `use` was called with.
        x: shape = [..., hidden_size].
    """
    mlp: GatedMLP = vars(module)[_MLP]
    activation = getattr(module, ACTIVATION)
    # In the engine; of one layer that is both, also in the trainer.
    merged = getattr(module, LinearGroup(mlp.inputs).merged_name, None)
    if merged is not None:
        hidden = activation(merged(x))
    else:
        gate, up = (getattr(module, name)(x) for name in mlp.inputs)
        if isinstance(activation, TrainingLayer):
            hidden = activation(gate, up)
        else:
            hidden = activation(torch.cat((gate, up), -1))
    output: torch.Tensor = getattr(module, mlp.down)(hidden)
    return output


def _recognised(module: nn.Module) -> GatedMLP | None:
    if runs_own_forward(module) or module._parameters or module._buffers:
        return None
    if hasattr(module, ACTIVATION):
        return None
    linears = {}
    for name, child in module.named_children():
        if _is_linear(child):
            linears[name] = child
        elif any(True for _ in (*child.parameters(), *child.buffers())):
            return None
    for mlp, shapes in _candidates(linears):
        x = random_inputs(_HIDDEN_SIZE)
        if all(
            computes(module, mlp.formula, x, dtype, shapes)
            for dtype in (torch.float32, torch.bfloat16)
        ):
            return mlp
    return None


def _is_linear(module: nn.Module) -> bool:
    weight = module._parameters.get("weight")
    return (
        {*module._parameters} <= {"weight", "bias"}
        and weight is not None
        and weight.ndim == 2
        and not any(True for _ in module.children())
        and not runs_own_forward(module)
    )


def _candidates(
    linears: dict[str, nn.Module],
) -> Iterator[tuple[GatedMLP, dict[str, tuple[int, ...]]]]:
    """What may be computed, going by the shapes, with shapes to compute it with."""
    weights = {
        name: tuple(layer.get_parameter("weight").shape)
        for name, layer in linears.items()
    }
    for down, (hidden_size, size) in weights.items():
        inputs = tuple(name for name in weights if name != down)
        rows = size if len(inputs) == 2 else 2 * size
        if len(inputs) not in (1, 2):
            continue
        if any(weights[name] != (rows, hidden_size) for name in inputs):
            continue
        rows = _INTERMEDIATE_SIZE * 2 // len(inputs)
        shapes: dict[str, tuple[int, ...]] = {}
        for name, layer in linears.items():
            shape = (rows, _HIDDEN_SIZE)
            if name == down:
                shape = (_HIDDEN_SIZE, _INTERMEDIATE_SIZE)
            shapes[f"{name}.weight"] = shape
            if layer._parameters.get("bias") is not None:
                shapes[f"{name}.bias"] = shape[:1]
        for order in dict.fromkeys((inputs, inputs[::-1])):
            for activation in ("silu", "gelu", "gelu_tanh"):
                yield GatedMLP(order, down, activation), shapes
