# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""Column-parallel linears that fuse several projections of one input."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import nn

from vllm.model_executor import vllm_internals
from vllm.model_executor.checkpoint.specification import Part
from vllm.model_executor.layers.training.arguments import check_sizes
from vllm.model_executor.layers.training.collectives import sum_gradient_over_replicas
from vllm.model_executor.layers.training.linear import ColumnParallelLinear
from vllm.model_executor.parallel_context import ParallelContext

if TYPE_CHECKING:
    from vllm.config import VllmConfig


class MergedColumnParallelLinear(ColumnParallelLinear):
    """Several column-parallel linear layers of one input as one GEMM, e.g. gate and up.

    Each rank's output is the concatenation of its slices of all parts. There is no
    gather_output, because the gathered slices would not be in the order of the parts.

    Args:
        input_size: Input features.
        output_sizes: Output features of each part, over all ranks.
        bias: Add a bias.
        part_names: Names of the checkpoint's separate tensors, one for each part
            ("gate_proj", "up_proj"); None where the checkpoint holds one fused
            tensor under this layer's own name.
        params_dtype: Dtype of the parameters; torch's default dtype if None.
        return_bias: Return `(output, None)` as vLLM's linears do.
        sequence_parallel: As for `ColumnParallelLinear`.
        parallel_context: The context to shard by.

    Attributes:
        weight: shape = [sum(output_partition_sizes), input_size]
        bias: shape = [sum(output_partition_sizes)] or None

    Raises:
        ValueError: A part is not a multiple of tp_size, or there is not one name for
            each part.
    """

    def __init__(
        self,
        input_size: int,
        output_sizes: Sequence[int],
        bias: bool = True,
        *,
        part_names: Sequence[str] | None = None,
        params_dtype: torch.dtype | None = None,
        return_bias: bool = False,
        sequence_parallel: bool = False,
        parallel_context: ParallelContext | None = None,
    ) -> None:
        self.output_sizes = list(output_sizes)
        self.part_names = _check_part_names(part_names, len(self.output_sizes))
        tp_size = (parallel_context or ParallelContext.current_or_single()).tp_size
        for index, size in enumerate(self.output_sizes):
            check_sizes(
                "MergedColumnParallelLinear", 0, **{f"output_sizes[{index}]": size}
            )
            if size % tp_size:
                raise ValueError(
                    f"output_sizes[{index}]={size} is not divisible by "
                    f"tp_size={tp_size}; choose sizes that are, or a smaller "
                    "tensor-parallel size."
                )
        self.output_partition_sizes = [size // tp_size for size in self.output_sizes]
        super().__init__(
            input_size,
            sum(self.output_sizes),
            bias,
            params_dtype=params_dtype,
            return_bias=return_bias,
            sequence_parallel=sequence_parallel,
            parallel_context=parallel_context,
        )

    def _parts(self) -> tuple[Part, ...]:
        names = self.part_names or (None,) * len(self.output_sizes)
        return tuple(
            Part(name, index, size)
            for index, (name, size) in enumerate(
                zip(names, self.output_sizes, strict=True)
            )
        )

    def bind_engine(self, vllm_config: VllmConfig, prefix: str) -> nn.Module:
        return vllm_internals.MergedColumnParallelLinear(
            self.input_size,
            self.output_sizes,
            **self._engine_arguments(vllm_config, prefix),
        )


class QKVParallelLinear(ColumnParallelLinear):
    """Query, key and value projections as one GEMM, with heads sharded across ranks.

    If there are fewer KV heads than ranks, consecutive ranks hold the same KV head.

    Args:
        hidden_size: Input features.
        head_size: Size of each head.
        total_num_heads: Query heads, over all ranks.
        total_num_kv_heads: key/value heads, over all ranks; total_num_heads if None.
        bias: Add a bias.
        part_names: Names of the checkpoint's three tensors ("q_proj", "k_proj",
            "v_proj"); None where the checkpoint holds one fused tensor under this
            layer's own name.
        params_dtype: Dtype of the parameters; torch's default dtype if None.
        return_bias: Return `(output, None)` as vLLM's linears do.
        sequence_parallel: As for `ColumnParallelLinear`.
        parallel_context: The context to shard by.

    Attributes:
        num_heads: Query heads on this rank.
        num_kv_heads: key/value heads on this rank.
        num_kv_head_replicas: Ranks that hold the same KV head.
        q_size: Query features on this rank.
        kv_size: Key features on this rank, and value features.
        weight: shape = [q_size + 2 * kv_size, hidden_size]
        bias: shape = [q_size + 2 * kv_size] or None

    Raises:
        ValueError: The heads cannot be sharded across the ranks.
    """

    def __init__(
        self,
        hidden_size: int,
        head_size: int,
        total_num_heads: int,
        total_num_kv_heads: int | None = None,
        bias: bool = True,
        *,
        part_names: Sequence[str] | None = None,
        params_dtype: torch.dtype | None = None,
        return_bias: bool = False,
        sequence_parallel: bool = False,
        parallel_context: ParallelContext | None = None,
    ) -> None:
        context = parallel_context or ParallelContext.current_or_single()
        self.hidden_size = hidden_size
        self.head_size = head_size
        self.total_num_heads = total_num_heads
        self.total_num_kv_heads = (
            total_num_heads if total_num_kv_heads is None else total_num_kv_heads
        )
        check_sizes(
            "QKVParallelLinear",
            head_size=head_size,
            total_num_heads=self.total_num_heads,
            total_num_kv_heads=self.total_num_kv_heads,
        )
        self.part_names = _check_part_names(part_names, 3)
        self.num_heads, self.num_kv_heads, self.num_kv_head_replicas = _split_heads(
            self.total_num_heads, self.total_num_kv_heads, context.tp_size
        )
        self.q_size = self.num_heads * head_size
        self.kv_size = self.num_kv_heads * head_size
        self.output_partition_sizes = [self.q_size, self.kv_size, self.kv_size]
        self.output_sizes = [n * context.tp_size for n in self.output_partition_sizes]
        super().__init__(
            hidden_size,
            sum(self.output_sizes),
            bias,
            params_dtype=params_dtype,
            return_bias=return_bias,
            sequence_parallel=sequence_parallel,
            parallel_context=context,
        )

    def _parts(self) -> tuple[Part, ...]:
        q_name, k_name, v_name = self.part_names or (None, None, None)
        q_size = self.total_num_heads * self.head_size
        kv_size = self.total_num_kv_heads * self.head_size
        replicas = self.num_kv_head_replicas
        return (
            Part(q_name, "q", q_size),
            Part(k_name, "k", kv_size, replicas),
            Part(v_name, "v", kv_size, replicas),
        )

    def _effective_parameters(self) -> tuple[torch.Tensor, torch.Tensor | None]:
        def shared(param: torch.Tensor) -> torch.Tensor:
            return sum_gradient_over_replicas(
                param, self.q_size, self.num_kv_head_replicas, self.parallel_context
            )

        return shared(self.weight), None if self.bias is None else shared(self.bias)

    def bind_engine(self, vllm_config: VllmConfig, prefix: str) -> nn.Module:
        return vllm_internals.QKVParallelLinear(
            self.hidden_size,
            self.head_size,
            self.total_num_heads,
            self.total_num_kv_heads,
            **self._engine_arguments(vllm_config, prefix),
        )


def _check_part_names(
    names: Sequence[str] | None, count: int
) -> tuple[str, ...] | None:
    if names is None:
        return None
    if isinstance(names, str) or len(names) != count or len(set(names)) != count:
        raise ValueError(
            f"part_names={names!r} must hold {count} different names, one for each "
            "part, or be None for a checkpoint with one fused tensor."
        )
    return tuple(names)


def _split_heads(
    num_heads: int, num_kv_heads: int, tp_size: int
) -> tuple[int, int, int]:
    """Query heads, KV heads on each rank, and ranks that share a KV head."""
    if num_heads % num_kv_heads:
        raise ValueError(
            f"total_num_heads={num_heads} must be a positive multiple of "
            f"total_num_kv_heads={num_kv_heads}."
        )
    if num_heads % tp_size:
        raise ValueError(
            f"total_num_heads={num_heads} is not divisible by tp_size={tp_size}; "
            "choose a tensor-parallel size that divides the heads."
        )
    if tp_size >= num_kv_heads:
        if tp_size % num_kv_heads:
            raise ValueError(
                f"tp_size={tp_size} is not a multiple of "
                f"total_num_kv_heads={num_kv_heads}, so the KV heads cannot be "
                "replicated evenly; choose a tensor-parallel size that is a multiple "
                "or a divisor of the KV heads."
            )
        return num_heads // tp_size, 1, tp_size // num_kv_heads
    if num_kv_heads % tp_size:
        raise ValueError(
            f"total_num_kv_heads={num_kv_heads} is not divisible by "
            f"tp_size={tp_size}; choose a tensor-parallel size that divides the KV "
            "heads, or is a multiple of them."
        )
    return num_heads // tp_size, num_kv_heads // tp_size, 1
