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
from torch import nn

from vllm.model_executor import vllm_internals
from vllm.model_executor.checkpoint.specification import ParameterSharding, Part
from vllm.model_executor.determinism.linear.op import linear
from vllm.model_executor.layers.training.arguments import check_sizes
from vllm.model_executor.layers.training.base import TrainingLayer, resolve_dtype
from vllm.model_executor.layers.training.collectives import (
    ON_ONE_RANK,
    gather_from_group,
    reduce_from_group,
    reduce_scatter_from_group,
    reduce_scatter_parts_from_group,
    split_to_group,
    sum_gradient_over_replicas,
    sum_parts_from_group,
)
from vllm.model_executor.layers.training.column_linear import (
    SEQUENCE_DIM,
    column_parallel_linear,
)
from vllm.model_executor.layers.training.engine_layers import (
    ShardedRowParallelLinear,
)
from vllm.model_executor.op_library import autocast_dtype, refuse_forward_mode
from vllm.model_executor.parallel_context import ParallelContext

if TYPE_CHECKING:
    from vllm.config import VllmConfig


LinearOutput = torch.Tensor | tuple[torch.Tensor, None]


class ParallelLinear(TrainingLayer):
    """A linear layer that is cut over the ranks in one of its dims.

    Args:
        input_size: Input features, over all ranks.
        output_size: Output features, over all ranks.
        bias: Add a bias.
        params_dtype: Dtype of the parameters; torch's default dtype if None.
        return_bias: Return `(output, None)` as vLLM's linears do; they are the
            same two values because the bias is always added.
        sequence_parallel: The ranks hold slices of the tokens, dim -2, where the
            features are whole. In the engine tokens are never cut.
        parallel_context: The context to shard by; `ParallelContext.current()` where
            vLLM's groups exist, else a single process.
    """

    weight: nn.Parameter
    bias: nn.Parameter | None

    def __init__(
        self,
        input_size: int,
        output_size: int,
        bias: bool,
        params_dtype: torch.dtype | None,
        return_bias: bool,
        sequence_parallel: bool,
        parallel_context: ParallelContext | None,
    ) -> None:
        super().__init__(parallel_context)
        check_sizes(
            type(self).__name__, 0, input_size=input_size, output_size=output_size
        )
        self.sequence_parallel = sequence_parallel
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
        self.draw("weight", lambda t: nn.init.uniform_(t, -bound, bound))
        if self.has_bias:
            self.draw("bias", lambda t: nn.init.uniform_(t, -bound, bound))

    def _check_input(self, x: torch.Tensor, expected: int) -> None:
        if x.ndim < 1 or x.shape[-1] != expected:
            raise ValueError(
                f"{type(self).__name__} got an input of shape {tuple(x.shape)}; its "
                f"last dim must be {expected}."
            )
        weight = self.weight
        if x.device != weight.device:
            raise ValueError(
                f"{type(self).__name__} got an input on {x.device}, but its weight is "
                f"on {weight.device}; move one to the other."
            )
        if x.dtype != weight.dtype and autocast_dtype(x) is None:
            raise ValueError(
                f"{type(self).__name__} got an input of {x.dtype}, but its weight is "
                f"{weight.dtype}; cast one to the other's dtype, or use torch.autocast."
            )

    def _effective_parameters(self) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Weight, shape = [out_features, in_features] of this rank, and bias."""
        return self.weight, self.bias

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

    def _check_divisible(self, name: str, size: int) -> None:
        if size % self.tp_size:
            raise ValueError(
                f"{name}={size} of {type(self).__name__} is not divisible by "
                f"tp_size={self.tp_size}; choose a {name} that is, or a smaller "
                "tensor-parallel size."
            )


class ColumnParallelLinear(ParallelLinear):
    """y = x W^T + b with the output features sharded across ranks.

    Args:
        input_size: Input features.
        output_size: Output features, over all ranks.
        bias: Add a bias.
        gather_output: Return all output features on every rank instead of its own.
        params_dtype: Dtype of the parameters; torch's default dtype if None.
        return_bias: Return `(output, None)` as vLLM's linears do.
        sequence_parallel: The input is this rank's slice of the tokens, dim -2; the
            output has all tokens. In the engine the input has all tokens too.
        parallel_context: The context to shard by.

    Attributes:
        weight: shape = [output_size_per_partition, input_size]
        bias: shape = [output_size_per_partition] or None

    Raises:
        ValueError: output_size is not a multiple of tp_size.
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
        sequence_parallel: bool = False,
        parallel_context: ParallelContext | None = None,
    ) -> None:
        super().__init__(
            input_size,
            output_size,
            bias,
            params_dtype,
            return_bias,
            sequence_parallel,
            parallel_context,
        )
        self._check_divisible("output_size", output_size)
        self.gather_output = gather_output
        self.input_size_per_partition = input_size
        self.output_size_per_partition = output_size // self.tp_size
        self._create_parameters()

    def _parts(self) -> tuple[Part, ...]:
        return (Part(None, None, self.output_size),)

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
            x: shape = [..., input_size], equal on all ranks; with sequence_parallel
                each rank's own slice of dim -2.

        Returns:
            shape = [..., output_size_per_partition], or [..., output_size] with
            gather_output.
        """
        self._check_input(x, self.input_size)
        output = column_parallel_linear(
            x,
            *self._effective_parameters(),
            self.parallel_context,
            self.sequence_parallel,
        )
        if self.gather_output:
            output = gather_from_group(output, self.parallel_context)
        return self._finish(output)

    def bind_engine(self, vllm_config: VllmConfig, prefix: str) -> nn.Module:
        return vllm_internals.ColumnParallelLinear(
            self.input_size,
            self.output_size,
            gather_output=self.gather_output,
            **self._engine_arguments(vllm_config, prefix),
        )


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


class RowParallelLinear(ParallelLinear):
    """y = x W^T + b with the input features sharded across ranks, and a sum over ranks.

    Rank 0 adds the bias inside its GEMM, as vLLM does, so that both add in the same
    order; the bias has its full gradient on every rank.

    Args:
        input_size: Input features, over all ranks.
        output_size: Output features.
        bias: Add a bias.
        input_is_parallel: The input is this rank's slice already, as a
            column-parallel layer returns it; else it is whole and is sliced here.
        reduce_results: Add up the ranks' partial results.
        params_dtype: Dtype of the parameters; torch's default dtype if None.
        return_bias: Return `(output, None)` as vLLM's linears do.
        sequence_parallel: Return this rank's slice of the tokens, dim -2. In the
            engine all tokens are returned.
        parallel_context: The context to shard by.

    Attributes:
        weight: shape = [output_size, input_size_per_partition]
        bias: shape = [output_size] or None

    Raises:
        ValueError: input_size is not a multiple of tp_size or tp_reduction_shards; a
            bias, several products for each rank, or sequence_parallel without
            reduce_results; or sequence_parallel without input_is_parallel.
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
        sequence_parallel: bool = False,
        parallel_context: ParallelContext | None = None,
    ) -> None:
        super().__init__(
            input_size,
            output_size,
            bias,
            params_dtype,
            return_bias,
            sequence_parallel,
            parallel_context,
        )
        self._check_divisible("input_size", input_size)
        shards = self.parallel_context.tp_reduction_shards
        if input_size % shards:
            raise ValueError(
                f"input_size={input_size} of RowParallelLinear is not divisible by "
                f"tp_reduction_shards={shards}; choose a number that divides it."
            )
        self.num_products = shards // self.tp_size
        if self.num_products > 1 and not reduce_results:
            raise ValueError(
                f"reduce_results=False with tp_reduction_shards={shards} and "
                f"tp_size={self.tp_size}: a rank has several products, which are "
                "added up with those of all ranks. Use reduce_results=True."
            )
        if bias and not reduce_results:
            raise ValueError(
                "bias=True with reduce_results=False would leave the bias in one "
                "rank's partial result; use bias=False and add a bias after the sum."
            )
        if sequence_parallel and not (input_is_parallel and reduce_results):
            raise ValueError(
                "sequence_parallel=True returns this rank's tokens of the sum over "
                "ranks, for an input of all tokens and this rank's features; it needs "
                "input_is_parallel=True and reduce_results=True."
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
                (Part(None, None, self.input_size),),
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
            shape = [..., output_size]; this rank's slice of dim -2 of it with
            sequence_parallel; this rank's partial result where reduce_results is
            False.
        """
        if self.input_is_parallel:
            self._check_input(x, self.input_size_per_partition)
        else:
            self._check_input(x, self.input_size)
            x = split_to_group(x, self.parallel_context)
        bias = self.bias if self.tp_rank == 0 else None
        products = self._products(x, bias)
        if self.has_bias and self.tp_rank > 0:
            refuse_forward_mode(
                "RowParallelLinear", products[0], self.bias, instead=ON_ONE_RANK
            )
            products[0] = _BiasGradient.apply(products[0], self.bias)
        return self._finish(self._sum(products) if self.reduce_results else products[0])

    def _sum(self, products: list[torch.Tensor]) -> torch.Tensor:
        """Over the ranks; in their order if there are several products a rank."""
        context = self.parallel_context
        if self.sequence_parallel:
            if self.num_products > 1:
                return reduce_scatter_parts_from_group(products, context, SEQUENCE_DIM)
            return reduce_scatter_from_group(products[0], context, SEQUENCE_DIM)
        if self.num_products > 1:
            return sum_parts_from_group(products, context)
        return reduce_from_group(products[0], context)

    def _products(
        self, x: torch.Tensor, bias: torch.Tensor | None
    ) -> list[torch.Tensor]:
        """This rank's, the bias in the first."""
        weight, _ = self._effective_parameters()
        if self.num_products == 1:
            return [linear(x, weight, bias)]
        weights = weight.chunk(self.num_products, 1)
        first, *others = zip(x.chunk(self.num_products, -1), weights, strict=True)
        return [linear(*first, bias), *(linear(*other) for other in others)]

    def bind_engine(self, vllm_config: VllmConfig, prefix: str) -> nn.Module:
        options = self._engine_arguments(vllm_config, prefix)
        options["input_is_parallel"] = self.input_is_parallel
        sizes = self.input_size, self.output_size
        if self.num_products == 1:
            return vllm_internals.RowParallelLinear(
                *sizes, reduce_results=self.reduce_results, **options
            )
        return ShardedRowParallelLinear(*sizes, num_shards=self.num_products, **options)


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
