# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""What the normalisations take."""

from __future__ import annotations

import torch


def check(
    name: str,
    x: torch.Tensor,
    residual: torch.Tensor | None = None,
    **parameters: torch.Tensor | None,
) -> None:
    """Check the arguments of a normalisation.

    Args:
        name: of the function, for the message.
        x: what is normalised over its last dim.
        residual: what is added to x first.
        parameters: weight, bias.

    Raises:
        ValueError: shapes or devices that do not fit each other, or a dtype that is
            not a floating-point one.
    """
    given = {"x": x, "residual": residual, **parameters}
    tensors = {key: value for key, value in given.items() if value is not None}
    fits = (
        x.ndim > 0
        and (residual is None or residual.shape == x.shape)
        and all(p is None or p.shape == x.shape[-1:] for p in parameters.values())
        and all(t.is_floating_point() for t in tensors.values())
        and all(t.device == x.device for t in tensors.values())
    )
    if not fits:
        described = ", ".join(
            f"{key}: {t.dtype} {tuple(t.shape)} on {t.device}"
            for key, t in tensors.items()
        )
        raise ValueError(
            f"{name} got {described}. It takes x [..., hidden_size], a residual of the "
            "same shape, and weight and bias [hidden_size], all with floating-point "
            "dtypes and on one device."
        )
