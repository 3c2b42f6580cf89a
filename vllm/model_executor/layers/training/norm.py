# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""RMS and layer normalisation."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import nn

from vllm.model_executor.checkpoint.specification import ParameterSharding
from vllm.model_executor.determinism.mode import is_batch_invariant
from vllm.model_executor.layers.training.arguments import check_epsilon, check_sizes
from vllm.model_executor.layers.training.base import TrainingLayer, resolve_dtype
from vllm.model_executor.layers.training.collectives import copy_to_group
from vllm.model_executor.layers.training.engine_layers import EngineRMSNorm
from vllm.model_executor.layers.training.ops.norm.layer_norm import layer_norm
from vllm.model_executor.layers.training.ops.norm.op import (
    fused_add_rms_norm,
    rms_norm,
)
from vllm.model_executor.parallel_context import ParallelContext

if TYPE_CHECKING:
    from vllm.config import VllmConfig


def _shared(layer: RMSNorm | LayerNorm, param: torch.Tensor) -> torch.Tensor:
    """The parameter; each rank's gradient is a summand where the inputs differ."""
    if layer.sequence_parallel:
        return copy_to_group(param, layer.parallel_context)
    return param


def _check_hidden_size(layer: RMSNorm | LayerNorm, x: torch.Tensor) -> None:
    if x.ndim < 1 or x.shape[-1] != layer.hidden_size:
        raise ValueError(
            f"{type(layer).__name__} got an input of shape {tuple(x.shape)}; its last "
            f"dim must be hidden_size={layer.hidden_size}."
        )


class RMSNorm(TrainingLayer):
    """x / sqrt(mean(x²) + eps) * weight (arXiv:1910.07467).

    The mean and the quotient are computed in fp32, rounded to the weight's dtype and
    multiplied by the weight. The op's result for a token does not depend on the other
    tokens. In batch-invariant mode the engine runs it too, else vLLM's ops.

    Args:
        hidden_size: Size of the normalised last dim.
        eps: Added to the mean of the squares.
        weight_offset: Added to the weight, in fp32; 1 in Gemma's norms.
        weight_in_fp32: Multiply by the weight in fp32 and round once, as Gemma and
            OLMo 2 do. Always so with an offset.
        params_dtype: Dtype of the weight; torch's default dtype if None.
        sequence_parallel: The ranks' inputs differ, because each has its slice of the
            tokens, or its own heads: the weight's gradient is summed over them.
        parallel_context: Names the ranks; each holds the whole weight.

    Attributes:
        weight: shape = [hidden_size]
    """

    weight: nn.Parameter

    def __init__(
        self,
        hidden_size: int,
        eps: float = 1e-6,
        *,
        weight_offset: float = 0.0,
        weight_in_fp32: bool = False,
        params_dtype: torch.dtype | None = None,
        sequence_parallel: bool = False,
        parallel_context: ParallelContext | None = None,
    ) -> None:
        super().__init__(parallel_context)
        check_sizes("RMSNorm", hidden_size=hidden_size)
        check_epsilon("RMSNorm", eps)
        self.hidden_size = hidden_size
        self.sequence_parallel = sequence_parallel
        self.variance_epsilon = float(eps)
        self.weight_offset = float(weight_offset)
        self.weight_in_fp32 = weight_in_fp32 or weight_offset != 0
        self._add_parameter("weight", resolve_dtype(params_dtype))
        self._initialise()

    def bind_engine(self, vllm_config: VllmConfig, prefix: str) -> nn.Module:
        """Itself in batch-invariant mode, else a norm by vLLM's ops if they have it."""
        if is_batch_invariant() or self.weight_in_fp32:
            return self
        return EngineRMSNorm(self.weight, self.variance_epsilon)

    def parameter_sharding(self) -> dict[str, ParameterSharding]:
        return {"weight": ParameterSharding.replicated((self.hidden_size,))}

    def reset_parameters(self) -> None:
        """A factor of one."""
        self.draw("weight", lambda t: nn.init.constant_(t, 1 - self.weight_offset))

    def forward(
        self, x: torch.Tensor, residual: torch.Tensor | None = None
    ) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
        """Normalise.

        Args:
            x: shape = [..., hidden_size].
            residual: Shape of x; added to x before normalising.

        Returns:
            The normalised tensor in x's shape and dtype; with a residual also the
            sum of x and residual, in x's dtype.
        """
        _check_hidden_size(self, x)
        weight = _shared(self, self.weight)
        if self.weight_in_fp32 and weight.dtype != torch.float64:
            weight = weight.float() + self.weight_offset
        elif self.weight_offset:
            weight = weight + self.weight_offset
        if residual is None:
            return rms_norm(x, weight, self.variance_epsilon)
        return fused_add_rms_norm(x, residual, weight, self.variance_epsilon)

    def extra_repr(self) -> str:
        text = f"hidden_size={self.hidden_size}, eps={self.variance_epsilon}"
        if self.weight_offset:
            text += f", weight_offset={self.weight_offset}"
        return text + (", weight_in_fp32=True" if self.weight_in_fp32 else "")


class LayerNorm(TrainingLayer):
    """(x - mean) / sqrt(variance + eps) * weight + bias (arXiv:1607.06450).

    torch's own kernel, which trainer and engine both run: torch.compile does not
    replace it.

    Args:
        hidden_size: Size of the normalised last dim.
        eps: Added to the variance.
        elementwise_affine: Whether there are a weight and a bias.
        bias: False: a weight alone.
        params_dtype: Dtype of the parameters; torch's default dtype if None.
        sequence_parallel: As for `RMSNorm`.
        parallel_context: Names the ranks; each holds whole parameters.

    Attributes:
        weight: shape = [hidden_size], or None.
        bias: Likewise.
    """

    weight: nn.Parameter | None
    bias: nn.Parameter | None

    def __init__(
        self,
        hidden_size: int,
        eps: float = 1e-5,
        *,
        elementwise_affine: bool = True,
        bias: bool = True,
        params_dtype: torch.dtype | None = None,
        sequence_parallel: bool = False,
        parallel_context: ParallelContext | None = None,
    ) -> None:
        super().__init__(parallel_context)
        check_sizes("LayerNorm", hidden_size=hidden_size)
        check_epsilon("LayerNorm", eps)
        self.hidden_size = hidden_size
        self.sequence_parallel = sequence_parallel
        self.eps = float(eps)
        dtype = resolve_dtype(params_dtype)
        self._has = {"weight": elementwise_affine, "bias": elementwise_affine and bias}
        for name, given in self._has.items():
            if given:
                self._add_parameter(name, dtype)
            else:
                self.register_parameter(name, None)
        self._initialise()

    def parameter_sharding(self) -> dict[str, ParameterSharding]:
        whole = ParameterSharding.replicated((self.hidden_size,))
        return {name: whole for name, given in self._has.items() if given}

    def reset_parameters(self) -> None:
        """Weight ones, bias zeros."""
        if self._has["weight"]:
            self.draw("weight", nn.init.ones_)
        if self._has["bias"]:
            self.draw("bias", nn.init.zeros_)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Normalise.

        Args:
            x: shape = [..., hidden_size].

        Returns:
            Shape and dtype of x.
        """
        _check_hidden_size(self, x)
        weight = None if self.weight is None else _shared(self, self.weight)
        bias = None if self.bias is None else _shared(self, self.bias)
        return layer_norm(x, weight, bias, self.eps)

    def extra_repr(self) -> str:
        return f"hidden_size={self.hidden_size}, eps={self.eps}"
