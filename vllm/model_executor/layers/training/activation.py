# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""Activations, gated and plain."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import nn

from vllm.model_executor import vllm_internals
from vllm.model_executor.determinism.mode import is_batch_invariant
from vllm.model_executor.layers.training.base import TrainingLayer
from vllm.model_executor.layers.training.ops.activation.gelu import gelu
from vllm.model_executor.layers.training.ops.activation.op import (
    gelu_and_mul,
    silu_and_mul,
)

if TYPE_CHECKING:
    from vllm.config import VllmConfig


class SiluAndMul(TrainingLayer):
    """silu(gate) * up, with gate and up concatenated (SwiGLU, arXiv:2002.05202).

    Under tensor parallelism the input is the rank's output of a merged
    column-parallel layer. In batch-invariant mode the engine runs the same
    op, else vLLM's layer.
    """

    def bind_engine(self, vllm_config: VllmConfig, prefix: str) -> nn.Module:
        """Itself in batch-invariant mode, else vLLM's."""
        return self if is_batch_invariant() else vllm_internals.SiluAndMul()

    def forward(self, x: torch.Tensor, up: torch.Tensor | None = None) -> torch.Tensor:
        """Apply the activation.

        Args:
            x: shape = [..., 2 * d], gate in the first half; or the gate alone.
            up: If `x` is the gate alone: shape = [..., d], as the gate's.

        Returns:
            shape = [..., d].
        """
        return silu_and_mul(x, up)


class GeluAndMul(TrainingLayer):
    """gelu(gate) * up, with gate and up concatenated (GeGLU, arXiv:2002.05202).

    Otherwise as `SiluAndMul`.

    Args:
        approximate: "none" for GELU's definition with erf, "tanh" for its
            approximation (arXiv:1606.08415).
    """

    def __init__(self, approximate: str = "none") -> None:
        super().__init__()
        _check_approximate("GeluAndMul", approximate)
        self.approximate = approximate

    def bind_engine(self, vllm_config: VllmConfig, prefix: str) -> nn.Module:
        """Itself in batch-invariant mode, else vLLM's."""
        return (
            self
            if is_batch_invariant()
            else vllm_internals.GeluAndMul(self.approximate)
        )

    def forward(self, x: torch.Tensor, up: torch.Tensor | None = None) -> torch.Tensor:
        """Apply the activation.

        Args:
            x: shape = [..., 2 * d], gate in the first half; or the gate alone.
            up: If `x` is the gate alone: shape = [..., d], as the gate's.

        Returns:
            shape = [..., d].
        """
        return gelu_and_mul(x, self.approximate == "tanh", up)

    def extra_repr(self) -> str:
        return f"approximate={self.approximate!r}"


class Gelu(TrainingLayer):
    """GELU, such as GPT-2's (arXiv:1606.08415).

    Trainer and engine run the same op. Compiled and eager results of this op are
    bitwise identical; those of `torch.nn.functional.gelu` are not.

    Args:
        approximate: As in `GeluAndMul`.

    Raises:
        ValueError: `approximate` has another value.
    """

    def __init__(self, approximate: str = "none") -> None:
        super().__init__()
        _check_approximate("Gelu", approximate)
        self.approximate = approximate

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Apply the activation.

        Args:
            x: Of any shape, floating point.

        Returns:
            Shape and dtype of x.
        """
        return gelu(x, self.approximate == "tanh")

    def extra_repr(self) -> str:
        return f"approximate={self.approximate!r}"


def _check_approximate(layer: str, approximate: str) -> None:
    if approximate not in ("none", "tanh"):
        raise ValueError(
            f"{layer} got approximate={approximate!r}; it takes 'none' or 'tanh'."
        )
