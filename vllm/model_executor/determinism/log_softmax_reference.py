# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""Specification of temperature and log-softmax, in plain torch."""

from __future__ import annotations

import torch


def tempered(logits: torch.Tensor, temperature: torch.Tensor | None) -> torch.Tensor:
    """Logits divided by the temperature as vLLM's sampler does, untouched by None.

    The divisor is a tensor: by a number CUDA multiplies with its reciprocal, which has
    other bits.

    Args:
        logits: shape = [..., vocab_size]
        temperature: above 0, shape = [...]; None for 1.

    Returns:
        fp32 (fp64 for fp64 logits) with a temperature, the shape of logits.
    """
    if temperature is None:
        return logits
    dtype = torch.promote_types(logits.dtype, torch.float32)
    return logits.to(dtype, copy=True).div_(temperature.to(dtype).unsqueeze(-1))


def log_softmax(logits: torch.Tensor) -> torch.Tensor:
    """Over the last dim, in fp32 (fp64 for fp64 logits), as vLLM's sampler."""
    dtype = torch.promote_types(logits.dtype, torch.float32)
    return logits.log_softmax(-1, dtype=dtype)
