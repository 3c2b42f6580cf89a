# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""The engine's RMS norm outside batch-invariant mode."""

from __future__ import annotations

import torch
from torch import nn

from vllm.model_executor import vllm_internals


class EngineRMSNorm(nn.Module):
    """RMS norm by vLLM's ops, which its compiler passes know.

    They fuse a norm with the all-reduce before it and with the quantisation after it.
    vLLM's own `RMSNorm` may overwrite its inputs, which a model's definition may use
    again; these ops are its functional forms.

    Args:
        weight: shape = [hidden_size].
        eps: added to the mean of the squares.
    """

    def __init__(self, weight: nn.Parameter, eps: float) -> None:
        super().__init__()
        self.weight = weight
        self.variance_epsilon = eps

    def forward(
        self, x: torch.Tensor, residual: torch.Tensor | None = None
    ) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
        """As the training layer's, but the sum is normalised before it is rounded."""
        ops = vllm_internals.ir_ops
        if residual is None:
            return ops.rms_norm(x, self.weight, self.variance_epsilon)
        return ops.fused_add_rms_norm(x, residual, self.weight, self.variance_epsilon)
