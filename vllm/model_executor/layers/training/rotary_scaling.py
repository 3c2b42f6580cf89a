# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""Cosines and sines of the rotary embedding, with the ways to scale it.

A way to scale is a function here: its keyword-only parameters are the keys that
Hugging Face's `rope_parameters` (`rope_scaling` in older configs) hold for it, those
without a default are required. Each computes in vLLM's order, so that the cache has the
bits of vLLM's own. All of it is fp32 on the CPU, the same for every device.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch

from vllm.model_executor.layers.training.arguments import is_finite

# Keys of every way to scale, which say what is scaled.
COMMON_KEYS = ("rope_theta", "partial_rotary_factor")
_MAY_BE_ZERO = ("mscale", "mscale_all_dim")
_MOST_POSITIONS = 1 << 31
_INTEGERS = ("original_max_position_embeddings", "max_trained_positions")


class Rotation(NamedTuple):
    """Positions times frequencies are the angles; cosines and sines get a magnitude."""

    positions: torch.Tensor
    frequencies: torch.Tensor
    magnitude: float = 1.0


def compute_cos_sin_cache(
    rotary_dim: int,
    max_position_embeddings: int,
    base: float,
    rope_scaling: Mapping[str, Any],
) -> torch.Tensor:
    """Cosines and sines of each position's angles.

    Args:
        rotary_dim: Number of rotated features.
        max_position_embeddings: Number of positions, as the way to scale counts them.
        base: Base of the geometric progression of frequencies.
        rope_scaling: What `check_rope_scaling` returned.

    Returns:
        fp32 on the CPU, shape = [num_positions, rotary_dim], cosines in the first half.

    Raises:
        ValueError: Numbers that do not go together.
    """
    parameters = dict(rope_scaling)
    scale = WAYS_TO_SCALE[parameters.pop("rope_type")]
    rotation = scale(rotary_dim, max_position_embeddings, base, **parameters)
    angles = torch.outer(rotation.positions, rotation.frequencies)
    cache = torch.cat((angles.cos(), angles.sin()), dim=-1)
    if rotation.magnitude != 1:
        cache = cache * rotation.magnitude
    if not cache.isfinite().all():
        raise ValueError(
            f"Rotations with rotary_dim={rotary_dim}, base={base}, "
            f"max_position_embeddings={max_position_embeddings} and "
            f"rope_scaling={dict(rope_scaling)} are not finite in fp32; choose less "
            "extreme numbers."
        )
    return cache


def check_rope_scaling(rope_scaling: Mapping[str, Any] | None) -> dict[str, Any]:
    """The way to scale and its parameters, without `COMMON_KEYS` and null values.

    Raises:
        ValueError: An unknown way, or keys or values that it does not take.
    """
    given = {key: v for key, v in (rope_scaling or {}).items() if v is not None}
    parameters = {key: v for key, v in given.items() if key not in COMMON_KEYS}
    legacy = parameters.pop("type", None)
    rope_type = parameters.pop("rope_type", legacy or "default")
    if legacy not in (None, rope_type) or rope_type not in WAYS_TO_SCALE:
        raise ValueError(
            f"rope_scaling={given} is not supported: rope_type must be one of "
            f"{', '.join(WAYS_TO_SCALE)}; older configs call it type, and if both are "
            "given they must agree."
        )
    keys = {
        name: parameter.default is parameter.empty
        for name, parameter in inspect.signature(
            WAYS_TO_SCALE[rope_type]
        ).parameters.items()
        if parameter.kind is parameter.KEYWORD_ONLY
    }
    missing = [key for key, required in keys.items() if required and key not in given]
    unknown = [key for key in parameters if key not in keys]
    if missing or unknown:
        raise ValueError(
            f"rope_scaling={given} lacks {missing} and has unknown keys {unknown}; "
            f"rope_type={rope_type!r} requires {[k for k in keys if keys[k]]} and "
            f"takes {[*(k for k in keys if not keys[k]), *COMMON_KEYS]}."
        )
    for key in given.keys() - {"type", "rope_type"}:
        _check_value(key, given[key])
    return {"rope_type": rope_type, **parameters}


def _check_value(key: str, value: Any) -> None:
    if key == "truncate":
        wanted, valid = "true or false", isinstance(value, bool)
    else:
        wanted = "a number, at least 0" if key in _MAY_BE_ZERO else "a positive number"
        valid = is_finite(value) and (value > 0 or (value == 0 and key in _MAY_BE_ZERO))
        if key in _INTEGERS:
            wanted, valid = "a positive integer", valid and value == int(value)
    if not valid:
        raise ValueError(f"rope_scaling has {key}={value!r}; it must be {wanted}.")


def _arange(*bounds: float) -> torch.Tensor:
    return torch.arange(*bounds, dtype=torch.float32, device="cpu")


def _positions(count: float) -> torch.Tensor:
    if count > _MOST_POSITIONS:
        raise ValueError(
            f"A rotary embedding of {count:g} positions is too large; check "
            "max_position_embeddings and rope_scaling."
        )
    return _arange(count)


def _wave_numbers(rotary_dim: int, base: float) -> torch.Tensor:
    """base^(2 i / rotary_dim): the inverse of each pair's frequency."""
    return base ** (_arange(0, rotary_dim, 2) / rotary_dim)


def _default(rotary_dim: int, max_positions: int, base: float) -> Rotation:
    """Frequencies base^(-2 i / rotary_dim) (arXiv:2104.09864, section 3.2.2)."""
    return Rotation(_positions(max_positions), 1.0 / _wave_numbers(rotary_dim, base))


def _linear(
    rotary_dim: int, max_positions: int, base: float, *, factor: float
) -> Rotation:
    """Position interpolation: positions / factor (arXiv:2306.15595).

    There are factor times max_positions of them.
    """
    return Rotation(
        _positions(max_positions * factor) / factor,
        1.0 / _wave_numbers(rotary_dim, base),
    )


def _dynamic(
    rotary_dim: int,
    max_positions: int,
    base: float,
    *,
    factor: float | None = None,
    max_trained_positions: int | None = None,
    alpha: float | None = None,
) -> Rotation:
    """NTK-aware scaling: a larger base (arXiv:2309.00071, sections 3.1, 3.3).

    The base is multiplied by scale^(d / (d - 2)) of d rotated features, which leaves
    the highest frequency and stretches the lowest by scale. scale is `alpha`, or what
    the dynamic variant has for a sequence of max_positions,
    factor * max_positions / max_trained_positions - (factor - 1). As in vLLM it does
    not change with the length of the sequence at hand: a served token's rotation must
    not depend on how many tokens follow. max_trained_positions is max_positions if
    None, and then nothing is scaled.
    """
    if (factor is None) == (alpha is None) or rotary_dim == 2:
        raise ValueError(
            "rope_type='dynamic' takes either factor, with max_trained_positions or "
            "without, or alpha, and at least 4 rotated features; got "
            f"factor={factor}, alpha={alpha} and {rotary_dim} rotated features."
        )
    if factor is not None:
        trained = max_trained_positions or max_positions
        alpha = factor * max_positions / trained - (factor - 1)
        if alpha <= 0:
            raise ValueError(
                f"rope_type='dynamic' got factor={factor}, max_trained_positions="
                f"{trained} and max_position_embeddings={max_positions}, the number of "
                f"positions to serve. They scale the base by a power of {alpha}, which "
                "must be above 0; serve more positions."
            )
    assert alpha is not None, "checked above"
    base = base * alpha ** (rotary_dim / (rotary_dim - 2))
    return _default(rotary_dim, max_positions, base)


def _yarn(
    rotary_dim: int,
    max_positions: int,
    base: float,
    *,
    factor: float,
    original_max_position_embeddings: int,
    beta_fast: float = 32,
    beta_slow: float = 1,
    mscale: float = 0,
    mscale_all_dim: float = 0,
    attention_factor: float | None = None,
    truncate: bool = True,
) -> Rotation:
    """YaRN (arXiv:2309.00071, sections 3.2 and 3.4).

    Pairs that turn more than beta_fast times over the original positions keep their
    frequency, those that turn less than beta_slow times are interpolated by factor,
    and between them a ramp over the pair's index i mixes both. `truncate` rounds the
    ramp's ends outwards to whole pairs. There are factor times
    original_max_position_embeddings positions; max_positions is not read.

    The magnitude is 0.1 ln(factor) + 1 unless attention_factor gives it, or mscale
    and mscale_all_dim do, as the ratio of two such terms.
    """
    if base == 1:
        raise ValueError("rope_type='yarn' needs a base other than 1; got base=1.")

    def pair_turning(turns: float) -> float:
        """The pair, as a real number, that turns so often over the original length."""
        wavelength = original_max_position_embeddings / (turns * 2 * math.pi)
        return rotary_dim * math.log(wavelength) / (2 * math.log(base))

    def magnitude(weight: float = 1.0) -> float:
        return 0.1 * weight * math.log(factor) + 1.0 if factor > 1 else 1.0

    low, high = pair_turning(beta_fast), pair_turning(beta_slow)
    if truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, rotary_dim - 1)
    if low == high:
        high += 0.001  # The ramp is a step.
    ramp = ((_arange(rotary_dim // 2) - low) / (high - low)).clamp(0, 1)
    kept = 1 - ramp
    wave_numbers = _wave_numbers(rotary_dim, base)
    interpolated = 1.0 / (factor * wave_numbers)
    frequencies = interpolated * (1 - kept) + 1.0 / wave_numbers * kept

    if attention_factor is None:
        attention_factor = magnitude()
        if mscale and mscale_all_dim:
            attention_factor = magnitude(mscale) / magnitude(mscale_all_dim)
    positions = _positions(original_max_position_embeddings * factor)
    return Rotation(positions, frequencies, attention_factor)


def _llama3(
    rotary_dim: int,
    max_positions: int,
    base: float,
    *,
    factor: float,
    low_freq_factor: float,
    high_freq_factor: float,
    original_max_position_embeddings: int,
) -> Rotation:
    """Llama 3.1's scaling (arXiv:2407.21783; its code defines it).

    With n the number of a pair's turns over the original positions: n above
    high_freq_factor keeps the frequency, n below low_freq_factor divides it by factor,
    and between them both are mixed linearly in n.
    """
    frequencies = 1.0 / _wave_numbers(rotary_dim, base)
    wavelengths = 2 * math.pi / frequencies
    original = original_max_position_embeddings
    kept: torch.Tensor | float = 0.0
    if low_freq_factor != high_freq_factor:
        kept = original / wavelengths - low_freq_factor
        kept = kept / (high_freq_factor - low_freq_factor)
    mixed = (1 - kept) * frequencies / factor + kept * frequencies
    mixed = torch.where(
        wavelengths > original / low_freq_factor, frequencies / factor, mixed
    )
    short = wavelengths < original / high_freq_factor
    return Rotation(_positions(max_positions), torch.where(short, frequencies, mixed))


WAYS_TO_SCALE: dict[str, Callable[..., Rotation]] = {
    "default": _default,
    "linear": _linear,
    "dynamic": _dynamic,
    "yarn": _yarn,
    "llama3": _llama3,
}
