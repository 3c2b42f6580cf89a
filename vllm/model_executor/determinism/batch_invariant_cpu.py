# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""What VLLM_BATCH_INVARIANT=1 means on CPU.

- Linear layers multiply with oneDNN, whose rows do not depend on their number.
- Attention is computed in pieces of so few query tokens that each is computed as a
  decode step is, and no thread takes a part of a sequence's keys.
- An all-reduce adds up the ranks in their order.

The rest of a model built from the training layers is independent of the batch as it
is. Called by the engine; the trainer calls the same functions.
"""

from __future__ import annotations

import os
from typing import Any

import torch


def init() -> None:
    """Set up a worker process."""
    os.environ["VLLM_CPU_ATTN_SPLIT_KV"] = "0"


def pack_linear(layer: Any, remove_weight: bool) -> None:
    """Give a vLLM layer its product with a packed copy of its weight.

    Args:
        layer: a linear layer or head; `cpu_linear` becomes its product.
        remove_weight: free the weight itself.

    Raises:
        NotImplementedError: a weight that is not a matrix, as of convolutions and
            mixtures of experts.
    """
    from vllm.model_executor.determinism.linear.cpu import PackedWeight

    weight = layer.weight
    if weight.is_meta:
        layer.cpu_linear = torch.nn.functional.linear
        return
    if weight.ndim != 2:
        raise NotImplementedError(
            f"VLLM_BATCH_INVARIANT=1 on CPU has no kernel for {type(layer).__name__} "
            f"with a weight of shape {tuple(weight.shape)}; it serves models of "
            "linear layers, norms and attention. Unset VLLM_BATCH_INVARIANT."
        )
    packed = PackedWeight(weight)
    layer.cpu_linear = lambda x, weight, bias: packed(x, bias)
    if remove_weight:
        layer.weight = torch.nn.Parameter(weight.new_empty(0), requires_grad=False)


def all_reduce(communicator: Any, input_: torch.Tensor) -> torch.Tensor:
    """Sum over a communicator's ranks, in their order, in place.

    Args:
        communicator: vLLM's communicator of the group.
        input_: any shape, floating point, of this rank.
    """
    from vllm.model_executor.determinism.ordered_sum import ordered_sum

    gathered = communicator.all_gather(input_.contiguous().view(1, -1), dim=0)
    return input_.copy_(ordered_sum(gathered).view(input_.shape))
