# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""Tensor-parallel linear layers whose weight is stored as GPT-2's `Conv1D` stores it.

They compute y = x W + b and are sharded as the layers of `linear` are. vLLM has no such
layers, so in the engine they run their own forward.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from torch import nn

from vllm.model_executor.checkpoint.specification import ParameterSharding
from vllm.model_executor.layers.training.linear import (
    MergedColumnParallelLinear,
    ParallelLinear,
    RowParallelLinear,
)
from vllm.model_executor.parallel_context import ParallelContext

if TYPE_CHECKING:
    from vllm.config import VllmConfig


class _Transposed(ParallelLinear):
    """Stores the weight as [in_features, out_features]."""

    def parameter_sharding(self) -> dict[str, ParameterSharding]:
        shardings = super().parameter_sharding()
        weight = shardings["weight"]
        assert weight.dim is not None
        shape = torch.Size(reversed(weight.shape))
        shardings["weight"] = replace(weight, shape=shape, dim=1 - weight.dim)
        return shardings

    def _effective_parameters(self) -> tuple[torch.Tensor, torch.Tensor | None]:
        return self.weight.t(), self.bias

    def bind_engine(self, vllm_config: VllmConfig, prefix: str) -> nn.Module:
        return self


class TransposedColumnParallelLinear(_Transposed, MergedColumnParallelLinear):
    """y = x W + b with the output features sharded across ranks.

    Args:
        input_size: Input features.
        output_sizes: Output features of each part, over all ranks. Each part is sharded
            on its own, such as queries, keys and values in one layer.
        bias: Add a bias.
        params_dtype: Dtype of the parameters; torch's default dtype if None.
        parallel_context: The context to shard by.

    Attributes:
        weight: shape = [input_size, sum(output_partition_sizes)]
        bias: shape = [sum(output_partition_sizes)] or None

    Raises:
        ValueError: A part is not a multiple of tp_size.
    """

    def __init__(
        self,
        input_size: int,
        output_sizes: Sequence[int],
        bias: bool = True,
        *,
        params_dtype: torch.dtype | None = None,
        parallel_context: ParallelContext | None = None,
    ) -> None:
        super().__init__(
            input_size,
            output_sizes,
            bias,
            params_dtype=params_dtype,
            parallel_context=parallel_context,
        )


class TransposedRowParallelLinear(_Transposed, RowParallelLinear):
    """y = x W + b with the input features sharded across ranks, and a sum over ranks.

    Args:
        input_size: Input features, over all ranks.
        output_size: Output features.
        bias: Add a bias.
        input_is_parallel: As for `RowParallelLinear`.
        params_dtype: Dtype of the parameters; torch's default dtype if None.
        parallel_context: The context to shard by.

    Attributes:
        weight: shape = [input_size_per_partition, output_size]
        bias: shape = [output_size] or None

    Raises:
        ValueError: input_size is not a multiple of tp_size or tp_reduction_shards.
    """

    def __init__(
        self,
        input_size: int,
        output_size: int,
        bias: bool = True,
        input_is_parallel: bool = True,
        *,
        params_dtype: torch.dtype | None = None,
        parallel_context: ParallelContext | None = None,
    ) -> None:
        super().__init__(
            input_size,
            output_size,
            bias,
            input_is_parallel,
            params_dtype=params_dtype,
            parallel_context=parallel_context,
        )
