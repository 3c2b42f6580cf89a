# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""Checks of the numbers that layers are built with."""

from __future__ import annotations

from numbers import Integral, Real
from typing import Any

import torch


def check_sizes(layer: str, minimum: int = 1, **sizes: Any) -> None:
    """Check sizes and counts.

    Args:
        layer: what is built, for the message.
        minimum: the least that is accepted.
        sizes: by the names of the arguments.

    Raises:
        ValueError: one that is no integer, or less than the minimum.
    """
    for name, size in sizes.items():
        if not is_integer(size) or size < minimum:
            raise ValueError(
                f"{layer} got {name}={size!r}; it must be an integer and at least "
                f"{minimum}."
            )


def check_epsilon(layer: str, eps: Any) -> None:
    """Check what a norm adds to a variance.

    Raises:
        ValueError: it is no finite number, or negative.
    """
    if not is_finite(eps) or eps < 0:
        raise ValueError(
            f"{layer} got eps={eps!r}; it must be a finite number and at least 0."
        )


def is_integer(value: Any) -> bool:
    """Whether it is an integer of Python or NumPy, and no bool."""
    return isinstance(value, Integral) and not isinstance(value, bool)


def is_finite(value: Any) -> bool:
    """Whether it is a number of Python or NumPy that is finite in fp32, and no bool."""
    number = isinstance(value, Real) and not isinstance(value, bool)
    return number and abs(value) <= torch.finfo(torch.float32).max
