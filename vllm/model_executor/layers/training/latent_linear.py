# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""The projection to latent keys and values of multi-head latent attention."""

from __future__ import annotations

import torch

from vllm.model_executor.determinism.linear.op import linear
from vllm.model_executor.layers.training.arguments import check_sizes
from vllm.model_executor.layers.training.collectives import copy_to_group
from vllm.model_executor.layers.training.linear import ColumnParallelLinear
from vllm.model_executor.parallel_context import ParallelContext


class LatentKVLinear(ColumnParallelLinear):
    """Projects to latent features and to a rotary key that all heads share.

    This is multi-head latent attention (DeepSeek-V2, arXiv:2405.04434, section 2.1),
    with heads sharded across ranks. Every rank holds the layer whole. The latent
    features lead into a column-parallel layer, whose backward adds up their gradient
    over the ranks. The rotary key is used by each rank's heads as it is, so its
    gradient is added up here.

    Args:
        input_size: Input features.
        output_size: Latent features, and those of the rotary key behind them.
        rotary_size: Features of the rotary key.
        bias: Add a bias.
        params_dtype: Dtype of the parameters; torch's default dtype if None.
        parallel_context: The ranks that share the heads.

    Attributes:
        weight: shape = [output_size, input_size]
        bias: shape = [output_size] or None
    """

    def __init__(
        self,
        input_size: int,
        output_size: int,
        rotary_size: int,
        bias: bool = True,
        *,
        params_dtype: torch.dtype | None = None,
        parallel_context: ParallelContext | None = None,
    ) -> None:
        super().__init__(
            input_size,
            output_size,
            bias,
            params_dtype=params_dtype,
            parallel_context=ParallelContext.single(),
        )
        latent_size = output_size - rotary_size
        check_sizes(
            "LatentKVLinear", 0, rotary_size=rotary_size, latent_size=latent_size
        )
        self.part_sizes = [latent_size, rotary_size]
        self.heads_context = parallel_context or ParallelContext.current_or_single()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Apply the layer.

        Args:
            x: shape = [..., input_size], equal on all ranks.

        Returns:
            shape = [..., output_size].
        """
        self._check_input(x, self.input_size)
        weight, bias = self._effective_parameters()
        output = linear(x, weight, bias)
        if self.heads_context.tp_size == 1:
            return output
        latent, rotary = output.split(self.part_sizes, -1)
        return torch.cat((latent, copy_to_group(rotary, self.heads_context)), -1)
