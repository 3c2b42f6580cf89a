# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""RMS normalisation, with and without a residual added first."""

from __future__ import annotations

import torch
from torch import nn

from vllm.model_executor.layers.training.base import TrainingLayer, resolve_dtype
from vllm.model_executor.layers.training.sharding import ParameterSharding
from vllm.model_executor.parallel_context import ParallelContext


class RMSNorm(TrainingLayer):
    """x / sqrt(mean(x²) + eps) * weight (arXiv:1910.07467).

    The mean and the quotient are computed in fp32, rounded to the weight's dtype and
    multiplied by the weight, in this order, which is that of vLLM's native operation;
    the bits are the same. Trainer and engine both run this layer.

    Args:
        hidden_size: size of the normalised last dim.
        eps: added to the mean of the squares.
        params_dtype: dtype of the weight; torch's default dtype if None.
        parallel_context: accepted for uniformity; every rank holds the whole weight.

    Attributes:
        weight: shape = [hidden_size]
    """

    weight: nn.Parameter

    def __init__(
        self,
        hidden_size: int,
        eps: float = 1e-6,
        *,
        params_dtype: torch.dtype | None = None,
        parallel_context: ParallelContext | None = None,
    ) -> None:
        super().__init__(parallel_context)
        self.hidden_size = hidden_size
        self.variance_epsilon = eps
        self._add_parameter("weight", resolve_dtype(params_dtype))
        self._initialise()

    def parameter_sharding(self) -> dict[str, ParameterSharding]:
        return {"weight": ParameterSharding.replicated((self.hidden_size,))}

    def reset_parameters(self) -> None:
        """Ones."""
        self.draw("weight", nn.init.ones_)

    def forward(
        self, x: torch.Tensor, residual: torch.Tensor | None = None
    ) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
        """Normalise.

        Args:
            x: shape = [..., hidden_size].
            residual: shape of x; added to x before normalising.

        Returns:
            The normalised tensor in x's shape and dtype; with a residual also the
            sum of x and residual, in x's dtype.
        """
        if x.shape[-1] != self.hidden_size:
            raise ValueError(
                f"RMSNorm got an input of shape {tuple(x.shape)}; its last dim must "
                f"be hidden_size={self.hidden_size}."
            )
        compute_dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
        dtype = x.dtype
        x = x.to(compute_dtype)
        if residual is not None:
            if residual.shape != x.shape:
                raise ValueError(
                    f"residual has shape {tuple(residual.shape)}; it must have the "
                    f"input's shape {tuple(x.shape)}."
                )
            x = x + residual.to(compute_dtype)
            residual = x.to(dtype)
        variance = x.pow(2).mean(dim=-1, keepdim=True)
        x = x * torch.rsqrt(variance + self.variance_epsilon)
        x = (x.to(self.weight.dtype) * self.weight).to(dtype)
        return x if residual is None else (x, residual)

    def extra_repr(self) -> str:
        return f"hidden_size={self.hidden_size}, eps={self.variance_epsilon}"
