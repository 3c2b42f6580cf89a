# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""Masks of causal attention, as tensors."""

from __future__ import annotations

import torch

# What is added to a score that is hidden, or less: its weight is 0.
HIDDEN = -1e4
# Tokens for which masks are looked at when a model is adopted in a trainer.
MOST_IN_TRAINER = 1024


def causal(seq: int, window: int | None, device: torch.device) -> torch.Tensor:
    """Which of `seq` keys each query sees, torch.bool, shape = [seq, seq]."""
    places = torch.arange(seq, device=device)
    distance = places[:, None] - places
    return (distance >= 0) & (distance < (window or seq + 1))


def visible(mask: torch.Tensor) -> torch.Tensor:
    """What a mask leaves visible, torch.bool, its shape.

    Args:
        mask: True where a key is visible, or what is added to the scores.

    Raises:
        ValueError: Something else than 0 and a very small number is added.
    """
    if mask.dtype == torch.bool:
        return mask
    is_hidden = mask <= HIDDEN
    if not bool((is_hidden | (mask == 0)).all()):
        raise ValueError(NOT_CAUSAL)
    return ~is_hidden


def window_of(seen: torch.Tensor) -> int | None:
    """The window of a causal mask; None if every query sees all before it.

    Args:
        seen: What is visible, shape = [..., seq, seq].

    Raises:
        ValueError: It is no causal mask.
    """
    seq = seen.shape[-1]
    if seen.shape[-2:] != (seq, seq):
        raise ValueError(f"{NOT_CAUSAL} Its shape is {tuple(seen.shape)}.")
    count = int(seen.reshape(-1, seq)[seq - 1].sum())
    window = count if 0 < count < seq else None
    if not bool((seen == causal(seq, window, seen.device)).all()):
        raise ValueError(NOT_CAUSAL)
    return window


NOT_CAUSAL = (
    "attention is called with a mask that is not exactly the causal one, also within a "
    "window. Padding, position biases and other masks cannot be served: leave the mask "
    "out and use is_causal=True, or a batch without padding."
)
