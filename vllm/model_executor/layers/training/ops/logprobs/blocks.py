# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""How much of the logits is computed at once."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch


@dataclass
class Blocks:
    """How much is computed at once on a kind of device.

    Attributes:
        logits: elements of the logits in the forward, in the head's dtype. A batch of
            no more keeps them for the backward.
        log_softmax: elements of them in fp32 at a time.
        gradient: elements of the logits and of their gradient in the backward.
        tokens: the backward's tokens at a time; more make dW a sum in fp32.
        multiple: sizes of blocks are multiples of it, where they are not smaller.
        with_gradient: elements of the logits in a forward that gives gradients as well.
    """

    logits: int
    log_softmax: int
    gradient: int
    tokens: int
    multiple: int
    with_gradient: int

    def tokens_in_forward(self, vocab_size: int) -> int:
        return self._rounded(self.logits // vocab_size)

    def tokens_with_gradient(self, vocab_size: int) -> int:
        return self._rounded(self.with_gradient // vocab_size)

    def columns_in_backward(self, num_tokens: int) -> int:
        return self._rounded(self.gradient // num_tokens)

    def _rounded(self, size: int) -> int:
        return max(size // self.multiple * self.multiple, min(size, self.multiple), 1)


# CPU: products of a few MiB are efficient, and what passes between elementwise steps
# stays in the cache. CUDA: large products; 192 MiB of bf16 logits, and 512 MiB
# where their gradient overwrites them and each block is a rounding of dW.
CPU_BLOCKS = Blocks(1 << 24, 1 << 19, 1 << 22, 2048, 16, 1 << 24)
CUDA_BLOCKS = Blocks(3 << 25, 1 << 25, 1 << 26, 8192, 256, 1 << 28)


def blocks_for(tensor: torch.Tensor) -> Blocks:
    """Those of the tensor's device."""
    return CUDA_BLOCKS if tensor.device.type == "cuda" else CPU_BLOCKS


def ranges(total: int, limit: int) -> Iterator[slice]:
    """Cut [0, total) into slices of at most `limit`, and of at least one element."""
    limit = max(limit, 1)
    for start in range(0, total, limit):
        yield slice(start, min(start + limit, total))
