# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""The temperature that a caller gives, as the ops take it."""

from __future__ import annotations

import torch

# Below it vLLM's sampler takes the most likely token and divides by nothing.
SMALLEST = 1e-5
LARGEST = torch.finfo(torch.float32).max

_ACCEPTED = (
    f"it must be a number from {SMALLEST} to {LARGEST:.1e}, or a floating-point tensor "
    "of such"
)


def one_a_token(
    temperature: float | torch.Tensor, tokens: torch.Size, like: torch.Tensor
) -> torch.Tensor | None:
    """Check a temperature and give every token its own.

    The values of a tensor are read on CPU alone, outside of compilation: on a GPU that
    would wait for it.

    Args:
        temperature: a number, or a tensor that broadcasts to `tokens`.
        tokens: shape of the targets.
        like: has the device and the dtype of the hidden states.

    Returns:
        fp32 (fp64 like fp64), shape = tokens, contiguous; None for the number 1.

    Raises:
        TypeError: neither a number nor a floating-point tensor.
        ValueError: a value, shape or device that is not accepted; a tensor that
            requires a gradient.
    """
    dtype = torch.promote_types(like.dtype, torch.float32)
    if isinstance(temperature, torch.Tensor):
        _check_tensor(temperature, tokens, like.device)
        temperature = temperature.detach().to(dtype)
        _check_values(temperature)
        return temperature.expand(tokens).contiguous()
    if isinstance(temperature, bool) or not isinstance(temperature, float | int):
        raise TypeError(f"temperature is {temperature!r}; {_ACCEPTED}.")
    if not SMALLEST <= temperature <= LARGEST:
        raise ValueError(
            f"temperature={temperature}; {_ACCEPTED}. For greedy decoding vLLM's raw "
            "logprobs have temperature 1."
        )
    if temperature == 1:
        return None
    return torch.full(tokens, temperature, dtype=dtype, device=like.device)


def _check_tensor(
    temperature: torch.Tensor, tokens: torch.Size, device: torch.device
) -> None:
    if not temperature.is_floating_point():
        raise TypeError(f"temperature is a tensor of {temperature.dtype}; {_ACCEPTED}.")
    if temperature.requires_grad and torch.is_grad_enabled():
        raise ValueError(
            "temperature requires a gradient, which is not computed. Pass "
            "temperature.detach(); to learn a temperature divide the logits by it in "
            "the forward of the head."
        )
    if temperature.device != device:
        raise ValueError(
            f"temperature is on {temperature.device}, the hidden states are on "
            f"{device}; move it there."
        )
    missing = len(tokens) - temperature.ndim
    if missing < 0 or any(
        given not in (1, size)
        for given, size in zip(temperature.shape, tokens[missing:])
    ):
        raise ValueError(
            f"temperature of shape {tuple(temperature.shape)} does not broadcast to "
            f"the tokens, {tuple(tokens)}; give one value, or one a token."
        )


def _check_values(temperature: torch.Tensor) -> None:
    if temperature.device.type != "cpu" or torch.compiler.is_compiling():
        return
    wrong = ~((temperature >= SMALLEST) & temperature.isfinite())
    if wrong.any():
        value = temperature[wrong][0].item()
        raise ValueError(f"temperature holds {value}; {_ACCEPTED}.")
