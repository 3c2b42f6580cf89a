# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""Specification of the gated activations, in plain torch."""

from __future__ import annotations

import torch
import torch.nn.functional as F


def silu_and_mul_reference(x: torch.Tensor) -> torch.Tensor:
    """silu(gate) * up; arguments as in `op.silu_and_mul`."""
    gate, up = x.chunk(2, dim=-1)
    return F.silu(gate) * up


def gelu_and_mul_reference(x: torch.Tensor, tanh: bool) -> torch.Tensor:
    """gelu(gate) * up; arguments as in `op.gelu_and_mul`."""
    gate, up = x.chunk(2, dim=-1)
    return F.gelu(gate, approximate="tanh" if tanh else "none") * up
