# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""Tensor-parallel linear layers that are trained here and served by vLLM's own.

Column parallelism cuts a weight by output features, row parallelism by input
features; a column-parallel layer followed by a row-parallel one needs one sum over
ranks forward and one backward (Megatron-LM, arXiv:1909.08053, section 3). With
tp_size 1 a layer is `torch.nn.Linear`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from vllm.model_executor import vllm_internals
from vllm.model_executor.checkpoint.specification import ParameterSharding, Part
from vllm.model_executor.determinism.linear.op import linear
from vllm.model_executor.layers.training.collectives import (
    ON_ONE_RANK,
    gather_from_group,
    reduce_from_group,
    reduce_scatter_from_group,
    reduce_scatter_parts_from_group,
    split_to_group,
    sum_parts_from_group,
)
from vllm.model_executor.layers.training.column_linear import (
    SEQUENCE_DIM,
    column_parallel_linear,
)
from vllm.model_executor.layers.training.linear_base import LinearOutput, ParallelLinear
from vllm.model_executor.op_library import refuse_forward_mode
from vllm.model_executor.parallel_context import ParallelContext

if TYPE_CHECKING:
    from vllm.config import VllmConfig


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

    def _effective_parameters(self) -> tuple[torch.Tensor, torch.Tensor | None]:
        return self.weight, self.bias

    def bind_engine(self, vllm_config: VllmConfig, prefix: str) -> nn.Module:
        return vllm_internals.ColumnParallelLinear(
            self.input_size,
            self.output_size,
            gather_output=self.gather_output,
            **self._engine_arguments(vllm_config, prefix),
        )


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
        if self.num_products == 1:
            return [linear(x, self.weight, bias)]
        weights = self.weight.chunk(self.num_products, 1)
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
        from vllm.model_executor.layers.training.engine_linear import (
            ShardedRowParallelLinear,
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
