# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""Whether the layers run the engine's arithmetic: batch-invariant mode.

In the mode a row of a layer's output depends on that row's input alone, not on what
else is in the batch, and its bits are those of an engine that was started with
VLLM_BATCH_INVARIANT=1.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from vllm import envs

_depth = 0


def is_batch_invariant() -> bool:
    """Whether the mode is on, in this process."""
    return _depth > 0 or envs.VLLM_BATCH_INVARIANT


@contextmanager
def batch_invariant() -> Iterator[None]:
    """Run the layers in batch-invariant mode inside this context.

    The results are then bitwise identical to those of an engine that was started with
    VLLM_BATCH_INVARIANT=1. The context may be nested and applies to all threads of the
    process. VLLM_BATCH_INVARIANT=1 in the environment turns the mode on for the whole
    process and for the engines that it starts. A backward may run outside the context,
    except that of activation checkpointing, which computes the forward again.
    """
    global _depth
    _depth += 1
    try:
        yield
    finally:
        _depth -= 1
