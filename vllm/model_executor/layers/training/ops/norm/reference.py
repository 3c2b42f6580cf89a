# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""Specification of the normalisations, in plain torch."""

from __future__ import annotations

import torch
import torch.nn.functional as F


def rms_norm_reference(
    x: torch.Tensor, weight: torch.Tensor, eps: float
) -> torch.Tensor:
    """x / sqrt(mean(x²) + eps) * weight; arguments as in `op.rms_norm`."""
    return _normalise(_wide(x), weight, eps).to(x.dtype)


def fused_add_rms_norm_reference(
    x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, eps: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """The rounded sum is normalised; arguments as in `op.fused_add_rms_norm`."""
    total = x + residual
    return rms_norm_reference(total, weight, eps), total


def layer_norm_reference(
    x: torch.Tensor,
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    eps: float,
) -> torch.Tensor:
    """(x - mean) / sqrt(variance + eps) * weight + bias; as in `layer_norm`."""
    return F.layer_norm(x, x.shape[-1:], weight, bias, eps)


def _wide(x: torch.Tensor) -> torch.Tensor:
    return x if x.dtype == torch.float64 else x.float()


def _normalise(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    variance = x.square().mean(dim=-1, keepdim=True)
    return (x * torch.rsqrt(variance + eps)).to(weight.dtype) * weight
