# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""Tensor-parallel linear layers that are trained here and served by vLLM's own.

Column parallelism cuts a weight by output features, row parallelism by input
features; a column-parallel layer followed by a row-parallel one needs one sum over
ranks forward and one backward (Megatron-LM, arXiv:1909.08053, section 3). With
tp_size 1 a layer is `torch.nn.Linear`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import nn

from vllm.model_executor import upstream
from vllm.model_executor.layers.training.base import TrainingLayer, resolve_dtype
from vllm.model_executor.layers.training.collectives import (
    copy_to_group,
    gather_from_group,
    reduce_from_group,
    split_to_group,
    sum_gradient_over_replicas,
)
from vllm.model_executor.layers.training.sharding import ParameterSharding, ShardPart
from vllm.model_executor.parallel_context import ParallelContext

if TYPE_CHECKING:
    from vllm.config import VllmConfig

LinearOutput = torch.Tensor | tuple[torch.Tensor, None]


class _ParallelLinear(TrainingLayer):
    """Parameters and description shared by the parallel linears.

    Args:
        input_size: input features, over all ranks.
        output_size: output features, over all ranks.
        bias: add a bias.
        params_dtype: dtype of the parameters; torch's default dtype if None.
        return_bias: return `(output, None)` as vLLM's linears do; they are the
            same two values because the bias is always added.
        parallel_context: the context to shard by; `ParallelContext.current()` where
            vLLM's groups exist, else a single process.
    """

    def __init__(
        self,
        input_size: int,
        output_size: int,
        bias: bool,
        params_dtype: torch.dtype | None,
        return_bias: bool,
        parallel_context: ParallelContext | None,
    ) -> None:
        super().__init__(parallel_context)
        self.input_size = input_size
        self.output_size = output_size
        self.has_bias = bias
        self.params_dtype = resolve_dtype(params_dtype)
        self.return_bias = return_bias

    def _create_parameters(self) -> None:
        self._add_parameter("weight", self.params_dtype)
        if self.has_bias:
            self._add_parameter("bias", self.params_dtype)
        else:
            self.register_parameter("bias", None)
        self._initialise()

    def reset_parameters(self) -> None:
        """Uniform in ±1/sqrt(input_size), weight and bias, as torch.nn.Linear."""
        bound = 1 / math.sqrt(self.input_size) if self.input_size else 0.0
        self._draw("weight", lambda t: nn.init.uniform_(t, -bound, bound))
        if self.has_bias:
            self._draw("bias", lambda t: nn.init.uniform_(t, -bound, bound))

    def _check_input(self, x: torch.Tensor, expected: int) -> None:
        if x.shape[-1] != expected:
            raise ValueError(
                f"{type(self).__name__} got an input of shape {tuple(x.shape)}; its "
                f"last dim must be {expected}."
            )

    def _finish(self, output: torch.Tensor) -> LinearOutput:
        return (output, None) if self.return_bias else output

    def _engine_arguments(self, vllm_config: VllmConfig, prefix: str) -> dict[str, Any]:
        return {
            "bias": self.has_bias,
            "params_dtype": self.params_dtype,
            "quant_config": vllm_config.quant_config,
            "prefix": prefix,
            "return_bias": self.return_bias,
            "disable_tp": self._engine_disables_tp(),
        }

    def extra_repr(self) -> str:
        return (
            f"input_size={self.input_size}, output_size={self.output_size}, "
            f"bias={self.has_bias}, tp_size={self.tp_size}"
        )


class ColumnParallelLinear(_ParallelLinear):
    """y = x W^T + b with the output features cut over the ranks.

    Args:
        input_size: input features.
        output_size: output features, over all ranks.
        bias: add a bias.
        gather_output: return all output features on every rank instead of its own.
        params_dtype: dtype of the parameters; torch's default dtype if None.
        return_bias: return `(output, None)` as vLLM's linears do.
        parallel_context: the context to shard by.

    Attributes:
        weight: shape = [output_size_per_partition, input_size]
        bias: shape = [output_size_per_partition] or None

    Raises:
        ValueError: the ranks do not divide output_size.
    """

    def __init__(
        self,
        input_size: int,
        output_size: int,
        bias: bool = True,
        gather_output: bool = False,
        *,
        params_dtype: torch.dtype | None = None,
        return_bias: bool = False,
        parallel_context: ParallelContext | None = None,
    ) -> None:
        super().__init__(
            input_size, output_size, bias, params_dtype, return_bias, parallel_context
        )
        _check_divisible(self, "output_size", output_size)
        self.gather_output = gather_output
        self.input_size_per_partition = input_size
        self.output_size_per_partition = output_size // self.tp_size
        self._create_parameters()

    def _parts(self) -> tuple[ShardPart, ...]:
        return (ShardPart(None, None, self.output_size),)

    def parameter_sharding(self) -> dict[str, ParameterSharding]:
        parts = self._parts()
        rows = sum(part.size for part in parts)
        shapes = {"weight": (rows, self.input_size)} | (
            {"bias": (rows,)} if self.has_bias else {}
        )
        return {
            name: ParameterSharding(torch.Size(shape), 0, parts)
            for name, shape in shapes.items()
        }

    def forward(self, x: torch.Tensor) -> LinearOutput:
        """Apply the layer.

        Args:
            x: shape = [..., input_size], equal on all ranks.

        Returns:
            shape = [..., output_size_per_partition], or [..., output_size] with
            gather_output.
        """
        self._check_input(x, self.input_size)
        x = copy_to_group(x, self.parallel_context)
        output = F.linear(x, *self._effective_parameters())
        if self.gather_output:
            output = gather_from_group(output, self.parallel_context)
        return self._finish(output)

    def _effective_parameters(self) -> tuple[torch.Tensor, torch.Tensor | None]:
        return self.weight, self.bias

    def bind_engine(self, vllm_config: VllmConfig, prefix: str) -> nn.Module:
        return upstream.ColumnParallelLinear(
            self.input_size,
            self.output_size,
            gather_output=self.gather_output,
            **self._engine_arguments(vllm_config, prefix),
        )


class MergedColumnParallelLinear(ColumnParallelLinear):
    """Several column-parallel linears of one input as one GEMM, e.g. gate and up.

    Each rank's output holds its slice of every part side by side. There is no
    gather_output: across ranks that order would not be the parts' order.

    Args:
        input_size: input features.
        output_sizes: output features of each part, over all ranks.
        bias: add a bias.
        part_names: names of the checkpoint's separate tensors, one for each part
            ("gate_proj", "up_proj"); None where the checkpoint holds one fused
            tensor under this layer's own name.
        params_dtype: dtype of the parameters; torch's default dtype if None.
        return_bias: return `(output, None)` as vLLM's linears do.
        parallel_context: the context to shard by.

    Attributes:
        weight: shape = [sum(output_partition_sizes), input_size]
        bias: shape = [sum(output_partition_sizes)] or None

    Raises:
        ValueError: the ranks do not divide a part, or the names do not fit the parts.
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
        parallel_context: ParallelContext | None = None,
    ) -> None:
        self.output_sizes = list(output_sizes)
        self.part_names = _check_part_names(part_names, len(self.output_sizes))
        tp_size = (parallel_context or ParallelContext.current_or_single()).tp_size
        for index, size in enumerate(self.output_sizes):
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
            parallel_context=parallel_context,
        )

    def _parts(self) -> tuple[ShardPart, ...]:
        names = self.part_names or (None,) * len(self.output_sizes)
        return tuple(
            ShardPart(name, index, size)
            for index, (name, size) in enumerate(
                zip(names, self.output_sizes, strict=True)
            )
        )

    def bind_engine(self, vllm_config: VllmConfig, prefix: str) -> nn.Module:
        return upstream.MergedColumnParallelLinear(
            self.input_size,
            self.output_sizes,
            **self._engine_arguments(vllm_config, prefix),
        )


class QKVParallelLinear(ColumnParallelLinear):
    """The query, key and value projections as one GEMM, cut over the ranks by heads.

    Where there are fewer KV heads than ranks, consecutive ranks hold the same KV
    head.

    Args:
        hidden_size: input features.
        head_size: size of each head.
        total_num_heads: query heads, over all ranks.
        total_num_kv_heads: key/value heads, over all ranks; total_num_heads if None.
        bias: add a bias.
        part_names: names of the checkpoint's three tensors ("q_proj", "k_proj",
            "v_proj"); None where the checkpoint holds one fused tensor under this
            layer's own name.
        params_dtype: dtype of the parameters; torch's default dtype if None.
        return_bias: return `(output, None)` as vLLM's linears do.
        parallel_context: the context to shard by.

    Attributes:
        num_heads: query heads on this rank.
        num_kv_heads: key/value heads on this rank.
        num_kv_head_replicas: ranks that hold the same KV head.
        q_size: query features on this rank.
        kv_size: key features on this rank, and value features.
        weight: shape = [q_size + 2 * kv_size, hidden_size]
        bias: shape = [q_size + 2 * kv_size] or None

    Raises:
        ValueError: the heads cannot be cut over the ranks.
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
        parallel_context: ParallelContext | None = None,
    ) -> None:
        context = parallel_context or ParallelContext.current_or_single()
        self.hidden_size = hidden_size
        self.head_size = head_size
        self.total_num_heads = total_num_heads
        self.total_num_kv_heads = (
            total_num_heads if total_num_kv_heads is None else total_num_kv_heads
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
            parallel_context=context,
        )

    def _parts(self) -> tuple[ShardPart, ...]:
        q_name, k_name, v_name = self.part_names or (None, None, None)
        q_size = self.total_num_heads * self.head_size
        kv_size = self.total_num_kv_heads * self.head_size
        replicas = self.num_kv_head_replicas
        return (
            ShardPart(q_name, "q", q_size),
            ShardPart(k_name, "k", kv_size, replicas),
            ShardPart(v_name, "v", kv_size, replicas),
        )

    def _effective_parameters(self) -> tuple[torch.Tensor, torch.Tensor | None]:
        weight, bias = (
            None
            if param is None
            else sum_gradient_over_replicas(
                param, self.q_size, self.num_kv_head_replicas, self.parallel_context
            )
            for param in (self.weight, self.bias)
        )
        return weight, bias

    def bind_engine(self, vllm_config: VllmConfig, prefix: str) -> nn.Module:
        return upstream.QKVParallelLinear(
            self.hidden_size,
            self.head_size,
            self.total_num_heads,
            self.total_num_kv_heads,
            **self._engine_arguments(vllm_config, prefix),
        )


class RowParallelLinear(_ParallelLinear):
    """y = x W^T + b with the input features cut over the ranks and the results added.

    Rank 0 adds the bias inside its GEMM, as vLLM does, so that both add in the same
    order; the bias has its full gradient on every rank.

    Args:
        input_size: input features, over all ranks.
        output_size: output features.
        bias: add a bias.
        input_is_parallel: the input is this rank's slice already, as a
            column-parallel layer returns it; else it is whole and is sliced here.
        reduce_results: add up the ranks' partial results.
        params_dtype: dtype of the parameters; torch's default dtype if None.
        return_bias: return `(output, None)` as vLLM's linears do.
        parallel_context: the context to shard by.

    Attributes:
        weight: shape = [output_size, input_size_per_partition]
        bias: shape = [output_size] or None

    Raises:
        ValueError: the ranks do not divide input_size, or a bias without a sum.
    """

    def __init__(
        self,
        input_size: int,
        output_size: int,
        bias: bool = True,
        input_is_parallel: bool = True,
        *,
        reduce_results: bool = True,
        params_dtype: torch.dtype | None = None,
        return_bias: bool = False,
        parallel_context: ParallelContext | None = None,
    ) -> None:
        super().__init__(
            input_size, output_size, bias, params_dtype, return_bias, parallel_context
        )
        _check_divisible(self, "input_size", input_size)
        if bias and not reduce_results:
            raise ValueError(
                "bias=True with reduce_results=False would leave the bias in one "
                "rank's partial result; use bias=False and add a bias after the sum."
            )
        self.input_is_parallel = input_is_parallel
        self.reduce_results = reduce_results
        self.input_size_per_partition = input_size // self.tp_size
        self.output_size_per_partition = output_size
        self._create_parameters()

    def parameter_sharding(self) -> dict[str, ParameterSharding]:
        shardings = {
            "weight": ParameterSharding(
                torch.Size((self.output_size, self.input_size)),
                1,
                (ShardPart(None, None, self.input_size),),
            )
        }
        if self.has_bias:
            shardings["bias"] = ParameterSharding.replicated((self.output_size,))
        return shardings

    def forward(self, x: torch.Tensor) -> LinearOutput:
        """Apply the layer.

        Args:
            x: shape = [..., input_size_per_partition], or [..., input_size] where
                input_is_parallel is False.

        Returns:
            shape = [..., output_size]; this rank's partial result where
            reduce_results is False.
        """
        if self.input_is_parallel:
            self._check_input(x, self.input_size_per_partition)
        else:
            self._check_input(x, self.input_size)
            x = split_to_group(x, self.parallel_context)
        output = F.linear(x, self.weight, self.bias if self.tp_rank == 0 else None)
        if self.has_bias and self.tp_rank > 0:
            output = _BiasGradient.apply(output, self.bias)
        if self.reduce_results:
            output = reduce_from_group(output, self.parallel_context)
        return self._finish(output)

    def bind_engine(self, vllm_config: VllmConfig, prefix: str) -> nn.Module:
        return upstream.RowParallelLinear(
            self.input_size,
            self.output_size,
            input_is_parallel=self.input_is_parallel,
            reduce_results=self.reduce_results,
            **self._engine_arguments(vllm_config, prefix),
        )


class _BiasGradient(torch.autograd.Function):
    """Leaves the output alone; gives the bias the gradient it has on rank 0.

    With Y the sum over ranks and the bias b added once, dL/db is the sum of dL/dY
    over all leading dims, and every rank has the whole dL/dY.
    """

    @staticmethod
    def forward(ctx: Any, output: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
        return output.view_as(output)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return grad, grad.reshape(-1, grad.shape[-1]).sum(0)


def _check_divisible(layer: _ParallelLinear, name: str, size: int) -> None:
    if size % layer.tp_size:
        raise ValueError(
            f"{name}={size} of {type(layer).__name__} is not divisible by "
            f"tp_size={layer.tp_size}; choose a {name} that is, or a smaller "
            "tensor-parallel size."
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
    if num_heads < 1 or num_kv_heads < 1 or num_heads % num_kv_heads:
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
