# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""Fingerprints of tensors: equal bits give equal ones, on every device.

A tensor is read as 32-bit words, each is multiplied by a 64-bit number of its place,
and the products are added up modulo 2^64. Integer addition does not depend on the
order, so CPU and CUDA agree. It finds mistakes and is no protection against forgery:
two tensors that differ agree with a probability of about 2^-33.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable

import torch

from vllm.model_executor.checkpoint.wrappers import named_tensors

# The words of one chunk are widened to 8 MiB.
CHUNK = 1 << 20


def fingerprint(tensor: torch.Tensor, device: torch.device | None = None) -> str:
    """The fingerprint of a tensor's dtype, shape and bits.

    Args:
        tensor: of any dtype and shape.
        device: where to compute; None: where the tensor is. Chunks are moved.

    Returns:
        A short text, such as `float32[3, 5]:91c5e2d0a7f43b68`.
    """
    tensor = tensor.detach()
    words = _words(tensor.reshape(1, -1))[0]
    device = tensor.device if device is None else device
    total = torch.zeros((), dtype=torch.int64, device=device)
    for number, chunk in enumerate(words.split(CHUNK)):
        chunk = chunk.to(device)
        places = _factors(CHUNK, device)[: len(chunk)]
        total += (2 * number + 1) * (chunk * places).sum()
    dtype = str(tensor.dtype).removeprefix("torch.")
    return f"{dtype}{list(tensor.shape)}:{int(total) % (1 << 64):016x}"


def buffer_fingerprints(module: torch.nn.Module) -> dict[str, str]:
    """Fingerprints of the buffers that no state dict has, by name."""
    saved = {name for name, _ in named_tensors(module)}
    every = named_tensors(module, persistent=False)
    return {name: fingerprint(tensor) for name, tensor in every if name not in saved}


def row_fingerprints(tensor: torch.Tensor) -> torch.Tensor:
    """A fingerprint of the bits of each row, int64, shape = [rows].

    Args:
        tensor: shape = [rows, ...].
    """
    rows = _words(tensor.detach().reshape(tensor.shape[0], -1))
    return (rows * _factors(rows.shape[1], rows.device)).sum(1)


def same_bits(first: torch.Tensor, second: torch.Tensor) -> bool:
    """Whether two tensors of one dtype have the same shape and bits, NaN included."""
    if first.shape != second.shape:
        return False
    views = (
        tensor.contiguous().flatten().view(torch.uint8) for tensor in (first, second)
    )
    return torch.equal(*views)


def differing(first: dict[str, str], second: dict[str, str]) -> list[str]:
    """Names, in either, whose fingerprints are not the same; sorted."""
    names: Iterable[str] = first.keys() | second.keys()
    return sorted(name for name in names if first.get(name) != second.get(name))


def _words(rows: torch.Tensor) -> torch.Tensor:
    """The bits of each row as int32, shape = [rows, words].

    Narrow elements are taken several a word where a row's bytes fill words, else one.
    """
    size, (count, width) = rows.element_size(), rows.shape
    flat = rows.contiguous().flatten()
    if flat.storage_offset() * size % 4:
        flat = flat.clone()
    if flat.dtype == torch.bool:
        flat = flat.view(torch.uint8)
    if width * size % 4 == 0:
        return flat.view(torch.int32).view(count, width * size // 4)
    narrow = {1: torch.uint8, 2: torch.int16}[size]
    return flat.view(narrow).to(torch.int32).view(count, width)


@functools.cache
def _factors(count: int, device: torch.device) -> torch.Tensor:
    """Odd numbers that look random, int64, shape = [count]; by SplitMix64."""
    state = torch.arange(1, count + 1, device="cpu") * _signed(0x9E3779B97F4A7C15)
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
        state = (state ^ _shift_right(state, shift)) * _signed(factor)
    return ((state ^ _shift_right(state, 31)) | 1).to(device)


def _signed(value: int) -> int:
    """The int64 with the bits of an unsigned number."""
    return value - (1 << 64) if value >= 1 << 63 else value


def _shift_right(state: torch.Tensor, count: int) -> torch.Tensor:
    """A shift that fills with zeros; torch's fills with the sign."""
    return (state >> count) & ((1 << (64 - count)) - 1)
