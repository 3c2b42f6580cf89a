# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""Gated activations."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from vllm.model_executor.layers.training.base import TrainingLayer


class SiluAndMul(TrainingLayer):
    """silu(gate) * up, of gate and up side by side (SwiGLU, arXiv:2002.05202).

    Under tensor parallelism the input is the rank's output of a merged
    column-parallel layer. Trainer and engine both run this layer.
    """

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Apply the activation.

        Args:
            x: shape = [..., 2 * d], gate in the first half.

        Returns:
            shape = [..., d].
        """
        if x.shape[-1] % 2:
            raise ValueError(
                f"SiluAndMul got an input of shape {tuple(x.shape)}; its last dim "
                "must be even, gate and up side by side."
            )
        gate, up = x.chunk(2, dim=-1)
        return F.silu(gate) * up
