# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""Parameters and description that the parallel linears share."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from vllm.model_executor.layers.training.arguments import check_sizes
from vllm.model_executor.layers.training.base import TrainingLayer, resolve_dtype
from vllm.model_executor.op_library import autocast_dtype
from vllm.model_executor.parallel_context import ParallelContext

if TYPE_CHECKING:
    from vllm.config import VllmConfig

LinearOutput = torch.Tensor | tuple[torch.Tensor, None]


class ParallelLinear(TrainingLayer):
    """A linear layer that is cut over the ranks in one of its dims.

    Args:
        input_size: Input features, over all ranks.
        output_size: Output features, over all ranks.
        bias: Add a bias.
        params_dtype: Dtype of the parameters; torch's default dtype if None.
        return_bias: Return `(output, None)` as vLLM's linears do; they are the
            same two values because the bias is always added.
        sequence_parallel: The ranks hold slices of the tokens, dim -2, where the
            features are whole. In the engine tokens are never cut.
        parallel_context: The context to shard by; `ParallelContext.current()` where
            vLLM's groups exist, else a single process.
    """

    weight: nn.Parameter
    bias: nn.Parameter | None

    def __init__(
        self,
        input_size: int,
        output_size: int,
        bias: bool,
        params_dtype: torch.dtype | None,
        return_bias: bool,
        sequence_parallel: bool,
        parallel_context: ParallelContext | None,
    ) -> None:
        super().__init__(parallel_context)
        check_sizes(
            type(self).__name__, 0, input_size=input_size, output_size=output_size
        )
        self.sequence_parallel = sequence_parallel
        self.input_size = input_size
        self.output_size = output_size
        self.has_bias = bias
        self.params_dtype = resolve_dtype(params_dtype)
        self.return_bias = return_bias

    def _create_parameters(self) -> None:
        self._add_parameter("weight", self.params_dtype)
        if self.has_bias:
            self._add_parameter("bias", self.params_dtype)
        else:
            self.register_parameter("bias", None)
        self._initialise()

    def reset_parameters(self) -> None:
        """Uniform in ±1/sqrt(input_size), weight and bias, as torch.nn.Linear."""
        bound = 1 / math.sqrt(self.input_size) if self.input_size else 0.0
        self.draw("weight", lambda t: nn.init.uniform_(t, -bound, bound))
        if self.has_bias:
            self.draw("bias", lambda t: nn.init.uniform_(t, -bound, bound))

    def _check_input(self, x: torch.Tensor, expected: int) -> None:
        if x.ndim < 1 or x.shape[-1] != expected:
            raise ValueError(
                f"{type(self).__name__} got an input of shape {tuple(x.shape)}; its "
                f"last dim must be {expected}."
            )
        weight = self.weight
        if x.device != weight.device:
            raise ValueError(
                f"{type(self).__name__} got an input on {x.device}, but its weight is "
                f"on {weight.device}; move one to the other."
            )
        if x.dtype != weight.dtype and autocast_dtype(x) is None:
            raise ValueError(
                f"{type(self).__name__} got an input of {x.dtype}, but its weight is "
                f"{weight.dtype}; cast one to the other's dtype, or use torch.autocast."
            )

    def _finish(self, output: torch.Tensor) -> LinearOutput:
        return (output, None) if self.return_bias else output

    def _engine_arguments(self, vllm_config: VllmConfig, prefix: str) -> dict[str, Any]:
        return {
            "bias": self.has_bias,
            "params_dtype": self.params_dtype,
            "quant_config": vllm_config.quant_config,
            "prefix": prefix,
            "return_bias": self.return_bias,
            "disable_tp": self._engine_disables_tp(),
        }

    def extra_repr(self) -> str:
        return (
            f"input_size={self.input_size}, output_size={self.output_size}, "
            f"bias={self.has_bias}, tp_size={self.tp_size}"
        )

    def _check_divisible(self, name: str, size: int) -> None:
        if size % self.tp_size:
            raise ValueError(
                f"{name}={size} of {type(self).__name__} is not divisible by "
                f"tp_size={self.tp_size}; choose a {name} that is, or a smaller "
                "tensor-parallel size."
            )
