# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""What our layers become inside the engine where vLLM has no layer for it.

- `EngineEmbedding`: a token embedding with a factor.
- `EngineRMSNorm`: the RMS norm outside batch-invariant mode.
- `ShardedRowParallelLinear`: a row-parallel linear of more products than ranks. vLLM's
  own adds up one product a rank. With `tp_reduction_shards` each rank's slice of the
  input features is cut again, so that an engine has the bits of a trainer, or of
  another engine, with another tensor-parallel size.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from vllm.model_executor import vllm_internals
from vllm.model_executor.determinism.linear.cpu import PackedWeight
from vllm.model_executor.determinism.linear.op import linear
from vllm.model_executor.determinism.mode import is_batch_invariant
from vllm.model_executor.determinism.ordered_sum import ordered_sum


class EngineEmbedding(vllm_internals.VocabParallelEmbedding):
    """vLLM's token embedding, times `scale`."""

    def __init__(self, *args: Any, scale: float, **options: Any) -> None:
        super().__init__(*args, **options)
        self.scale = scale

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        return scaled(super().forward(input_ids), self.scale)


def scaled(x: torch.Tensor, scale: float) -> torch.Tensor:
    """x times a factor that is rounded to the dtype of x."""
    if scale == 1:
        return x
    return x * torch.tensor(scale, dtype=x.dtype).item()


class EngineRMSNorm(nn.Module):
    """RMS norm by vLLM's ops, which its compiler passes know.

    They fuse a norm with the all-reduce before it and with the quantisation after it.
    vLLM's own `RMSNorm` may overwrite its inputs, which a model's definition may use
    again; these ops are its functional forms.

    Args:
        weight: shape = [hidden_size].
        eps: added to the mean of the squares.
    """

    def __init__(self, weight: nn.Parameter, eps: float) -> None:
        super().__init__()
        self.weight = weight
        self.variance_epsilon = eps

    def forward(
        self, x: torch.Tensor, residual: torch.Tensor | None = None
    ) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
        """As the training layer's, but the sum is normalised before it is rounded."""
        ops = vllm_internals.ir_ops
        if residual is None:
            return ops.rms_norm(x, self.weight, self.variance_epsilon)
        return ops.fused_add_rms_norm(x, residual, self.weight, self.variance_epsilon)


class _ShardedProducts(vllm_internals.UnquantizedLinearMethod):
    """One product for each shard of the input features.

    Args:
        num_shards: of this rank's features.
    """

    def __init__(self, num_shards: int) -> None:
        super().__init__()
        self.num_shards = num_shards

    def process_weights_after_loading(self, layer: Any) -> None:
        # On CUDA the weight stays where a captured graph reads it.
        layer.packed = None
        if layer.weight.device.type == "cpu" and is_batch_invariant():
            shards = layer.weight.data.chunk(self.num_shards, 1)
            layer.packed = [PackedWeight(shard.contiguous()) for shard in shards]
            layer.weight = nn.Parameter(layer.weight.new_empty(0), requires_grad=False)

    def apply(
        self, layer: Any, x: torch.Tensor, bias: torch.Tensor | None = None
    ) -> torch.Tensor:
        """All products, shape = [num_shards, ..., out_features]; bias in the first."""
        products = []
        shards = layer.packed or layer.weight.chunk(self.num_shards, 1)
        for part, shard in zip(x.chunk(self.num_shards, -1), shards, strict=True):
            if isinstance(shard, PackedWeight):
                products.append(shard(part, bias))
            else:
                products.append(linear(part, shard, bias))
            bias = None
        return torch.stack(products)


class ShardedRowParallelLinear(vllm_internals.RowParallelLinear):
    """vLLM's RowParallelLinear as the ordered sum of `num_shards` products a rank."""

    def __init__(self, *args: Any, num_shards: int, **options: Any) -> None:
        super().__init__(*args, **options)
        if self.quant_config is not None:
            raise ValueError(
                f"{self.prefix}: tp_reduction_shards cuts unquantized weights only; "
                "leave it out or serve without quantization."
            )
        self.quant_method = _ShardedProducts(num_shards)

    def forward(self, input_: torch.Tensor) -> torch.Tensor | tuple[Any, None]:
        if not self.input_is_parallel and self.tp_size > 1:
            input_ = input_.chunk(self.tp_size, -1)[self.tp_rank].contiguous()
        bias = self.bias if self.tp_rank == 0 else None
        products = self.quant_method.apply(self, input_, bias)
        if self.tp_size > 1:
            products = vllm_internals.tensor_model_parallel_all_gather(products, 0)
        output = ordered_sum(products)
        return (output, None) if self.return_bias else output
