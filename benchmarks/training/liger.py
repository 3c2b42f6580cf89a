# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""Liger-Kernel's functions in the form of ours.

They are imported when called: on CPU nothing is compared with them.
"""

from __future__ import annotations

import torch


def rms_norm(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    from liger_kernel.ops.rms_norm import LigerRMSNormFunction

    # Not in place, so that a gradient may be used twice as with ours.
    return LigerRMSNormFunction.apply(x, weight, 1e-6, 0.0, "llama", False)


def fused_add_rms_norm(
    x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    from liger_kernel.ops.fused_add_rms_norm import LigerFusedAddRMSNormFunction

    return LigerFusedAddRMSNormFunction.apply(
        x, residual, weight, 1e-6, 0.0, "llama", False
    )


def layer_norm(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor
) -> torch.Tensor:
    from liger_kernel.ops.layer_norm import LigerLayerNormFunction

    return LigerLayerNormFunction.apply(x, weight, bias, 1e-5)


def silu_and_mul(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    from liger_kernel.ops.swiglu import LigerSiLUMulFunction

    return LigerSiLUMulFunction.apply(gate, up)


def gelu_and_mul(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    from liger_kernel.ops.geglu import LigerGELUMulFunction

    return LigerGELUMulFunction.apply(gate, up)


def rotary(
    q: torch.Tensor, k: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """q, k [num_tokens, num_heads, head_size]; cos, sin [num_tokens, head_size]."""
    from liger_kernel.ops.rope import LigerRopeFunction

    # It takes [batch, num_heads, seq, head_size] and rotates its inputs in place.
    q, k = (x.unsqueeze(0).transpose(1, 2) for x in (q, k))
    q, k = LigerRopeFunction.apply(q, k, cos.unsqueeze(0), sin.unsqueeze(0))
    return q.transpose(1, 2), k.transpose(1, 2)


def linear_cross_entropy(
    hidden: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor
) -> torch.Tensor:
    from liger_kernel.transformers.functional import (
        liger_fused_linear_cross_entropy,
    )

    return liger_fused_linear_cross_entropy(hidden, weight, targets)
