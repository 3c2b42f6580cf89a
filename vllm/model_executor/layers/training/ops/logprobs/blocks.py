# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""How much of the logits is computed at once."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass


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
    """

    logits: int
    log_softmax: int
    gradient: int
    tokens: int
    multiple: int

    def tokens_in_forward(self, vocab_size: int) -> int:
        return self._rounded(self.logits // vocab_size)

    def columns_in_backward(self, num_tokens: int) -> int:
        return self._rounded(self.gradient // num_tokens)

    def _rounded(self, size: int) -> int:
        return max(size // self.multiple * self.multiple, min(size, self.multiple), 1)


def ranges(total: int, limit: int) -> Iterator[slice]:
    """Cut [0, total) into slices of at most `limit`, and of at least one element."""
    limit = max(limit, 1)
    for start in range(0, total, limit):
        yield slice(start, min(start + limit, total))
