# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""Random prompts."""

from collections.abc import Sequence

import torch

from tests.parity.models import CONFIGS

# Around the sizes of tiles and of blocks of the cache.
LENGTHS = (1, 2, 3, 7, 8, 9, 31, 32, 33, 64, 131, 333, 2000)


def of_lengths(model_name: str, lengths: Sequence[int], seed: int) -> list[list[int]]:
    """A prompt of each length for a model of `CONFIGS`."""
    generator = torch.Generator().manual_seed(seed)
    vocab_size = CONFIGS[model_name]["vocab_size"]
    return [
        torch.randint(vocab_size, (length,), generator=generator).tolist()
        for length in lengths
    ]


def crowd(model_name: str, count: int = 64, longest: int = 160) -> list[list[int]]:
    """Prompts of many lengths, among them one of 2,000 tokens."""
    generator = torch.Generator().manual_seed(1)
    lengths = torch.randint(1, longest, (count,), generator=generator).tolist()
    lengths[count // 2] = 2000
    return of_lengths(model_name, lengths, 2)
