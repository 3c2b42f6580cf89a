# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""What the normalisations take."""

from __future__ import annotations

import torch

from vllm.model_executor.op_library import described


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
    tensors = [tensor for tensor in given.values() if tensor is not None]
    fits = (
        x.ndim > 0
        and (residual is None or residual.shape == x.shape)
        and all(p is None or p.shape == x.shape[-1:] for p in parameters.values())
        and all(t.is_floating_point() for t in tensors)
        and all(t.device == x.device for t in tensors)
    )
    if not fits:
        raise ValueError(
            f"{name} got {described(**given)}. It takes x [..., hidden_size], a "
            "residual of the same shape, and weight and bias [hidden_size], all with "
            "floating-point dtypes and on one device."
        )
