# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""Into and out of a sequence-parallel region, where each rank holds a slice of tokens.

The region is between a row-parallel layer, which ends with a reduce-scatter, and the
next column-parallel one, which begins with an all-gather (arXiv:2205.05198, section
4.2). These two layers are for its ends in a model: where tokens come from, or go to,
something that every rank computes alike for all tokens.

Inside the engine every rank has all tokens, and both are the identity.
"""

from __future__ import annotations

import torch

from vllm.model_executor.layers.training.base import TrainingLayer
from vllm.model_executor.layers.training.collectives import (
    gather_from_group,
    split_to_group,
)
from vllm.model_executor.layers.training.column_linear import SEQUENCE_DIM
from vllm.model_executor.parallel_context import ParallelContext


class SplitSequence(TrainingLayer):
    """Takes this rank's slice of the tokens. The backward gathers the ranks' gradients.

    Args:
        parallel_context: The context to split by.
    """

    def __init__(self, parallel_context: ParallelContext | None = None) -> None:
        super().__init__(parallel_context)
        self.sequence_parallel = True

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Begin the region of sequence parallelism.

        Args:
            x: shape = [num_tokens, n] or [batch, seq, n], equal on all ranks.

        Returns:
            Shape of x, dim -2 divided by tp_size.

        Raises:
            ValueError: The dim is not a multiple of the number of ranks.
        """
        if not self.sequence_parallel:
            return x
        return split_to_group(x, self.parallel_context, SEQUENCE_DIM)


class GatherSequence(TrainingLayer):
    """Gathers all tokens on every rank. The backward takes this rank's gradient.

    Args:
        parallel_context: The context to gather by.
    """

    def __init__(self, parallel_context: ParallelContext | None = None) -> None:
        super().__init__(parallel_context)
        self.sequence_parallel = True

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """End the region of sequence parallelism.

        Args:
            x: shape = [num_tokens, n] or [batch, seq, n], this rank's slice of dim -2.

        Returns:
            Shape of x, dim -2 times tp_size.
        """
        if not self.sequence_parallel:
            return x
        return gather_from_group(x, self.parallel_context, SEQUENCE_DIM)
