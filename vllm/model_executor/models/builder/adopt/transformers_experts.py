# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""Mixture-of-experts layers of transformers' models, as an implementation of theirs.

Each expert multiplies its tokens by products that add up in order, and a token's
outputs are added in the order of its experts. So a token's bits depend on nothing else.

With tensor parallelism each rank holds a slice of every expert's intermediate features.
A token's outputs are added up within a slice, and the slices as those of a
`RowParallelLinear` are: `tp_reduction_shards` of them, in rank order.
"""

from __future__ import annotations

import itertools
import weakref
from typing import Any, NamedTuple

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

from vllm.model_executor.checkpoint.specification import ParameterSharding, Part
from vllm.model_executor.determinism.functions import batch_invariant_functions
from vllm.model_executor.determinism.linear.op import linear
from vllm.model_executor.layers.training.collectives import (
    copy_to_group,
    reduce_from_group,
    sum_parts_from_group,
)
from vllm.model_executor.models.builder.adopt.converting import shard_parameters
from vllm.model_executor.models.builder.adopt.tensor_parallel import EXPERTS, Plan
from vllm.model_executor.op_library import define_op
from vllm.model_executor.parallel_context import ParallelContext

_NAME = "training_layers"
# The modules that a compiled model calls by number.
_NUMBERS = itertools.count()
_MODULES: weakref.WeakValueDictionary[int, nn.Module] = weakref.WeakValueDictionary()


class _Handle:
    """The number of a module; a copy of the module, pickled or not, has its own."""

    def __init__(self, module: nn.Module) -> None:
        self.number = next(_NUMBERS)
        _MODULES[self.number] = module

    def __reduce__(self) -> tuple[Any, ...]:
        return _Handle, (_MODULES[self.number],)


def experts(
    self: Any,
    hidden_states: torch.Tensor,
    top_k_index: torch.Tensor,
    top_k_weights: torch.Tensor,
) -> torch.Tensor:
    """What `self`, one of transformers' experts modules, computes.

    Args:
        self: Has weights of all experts in `gate_up_proj` (`up_proj` without a gate)
            and `down_proj`, shape = [num_experts, out_features, in_features], or
            transposed if `is_transposed`; and their biases if `has_bias`.
        hidden_states: shape = [num_tokens, hidden_size].
        top_k_index: Each token's experts, shape = [num_tokens, top_k].
        top_k_weights: Factors on their outputs, likewise.

    Returns:
        shape = [num_tokens, hidden_size].
    """
    context = self.parallel_context
    x = copy_to_group(hidden_states, context)
    weights = copy_to_group(top_k_weights, context)
    count = context.tp_reduction_shards // context.tp_size
    if torch.compiler.is_compiling():
        number = self.experts_handle.number
        products = _experts(x, top_k_index, weights, number, count)
    else:
        products = _compute(self, x, top_k_index, weights, count)
    if count > 1:
        return sum_parts_from_group(products.unbind(0), context)
    return reduce_from_group(products[0], context)


def _compute(
    module: Any,
    x: torch.Tensor,
    top_k_index: torch.Tensor,
    top_k_weights: torch.Tensor,
    count: int,
) -> torch.Tensor:
    """Each slice's output, of `count` on this rank, shape = [count, *x.shape]."""
    if x.is_meta or isinstance(x, torch._subclasses.FakeTensor):
        return x.new_empty(count, *x.shape)
    num_tokens, top_k = top_k_index.shape
    # Pairs of a token and an expert, sorted by expert.
    expert_of_pair, order = top_k_index.flatten().sort(stable=True)
    numbers = torch.arange(module.num_experts, device=x.device)
    ends = torch.searchsorted(expert_of_pair, numbers, right=True)
    pairs = _Pairs(expert_of_pair, ends)
    name = "gate_up_proj" if module.has_gate else "up_proj"
    y = pairs.product(x[order // top_k], _input_first(module, name))
    if module.has_bias:
        y = pairs.plus(y, getattr(module, f"{name}_bias"))
    y = module._apply_gate(y) if module.has_gate else module.act_fn(y)
    back = order.argsort()
    outputs = []
    slices = zip(
        y.chunk(count, -1),
        _input_first(module, "down_proj").chunk(count, 1),
        strict=True,
    )
    for index, (features, weight) in enumerate(slices):
        output = pairs.product(features, weight)
        if module.has_bias and index == 0:
            is_added = module.parallel_context.tp_rank == 0
            output = pairs.plus(output, module.down_proj_bias, is_added)
        weighted = output[back].unflatten(0, (num_tokens, top_k))
        weighted = weighted * top_k_weights[..., None]
        total = weighted[:, 0].float()
        for slot in range(1, top_k):
            total = total + weighted[:, slot]
        outputs.append(total.to(x.dtype))
    return torch.stack(outputs)


def _input_first(module: Any, name: str) -> torch.Tensor:
    """A weight of all experts, shape = [num_experts, in_features, out_features]."""
    weight: torch.Tensor = getattr(module, name)
    return weight if module.is_transposed else weight.transpose(1, 2)


class _Pairs:
    """Rows of tokens, sorted by the expert that each is for.

    Args:
        experts: Of each row, ascending, shape = [num_rows].
        ends: Where each expert's rows end, shape = [num_experts].
    """

    def __init__(self, experts: torch.Tensor, ends: torch.Tensor) -> None:
        self.experts, self.ends = experts, ends

    def product(self, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        """Each row times its expert's weight, shape = [num_rows, out_features]."""
        if not x.is_cuda:
            return self._one_by_one(x, weight)
        if x.dtype == torch.bfloat16:
            return torch._grouped_mm(x, weight, offs=self.ends.to(torch.int32))
        return self._all_rows_by_each(x, weight)

    def plus(
        self, y: torch.Tensor, bias: torch.Tensor, is_added: bool = True
    ) -> torch.Tensor:
        """Each row plus its expert's bias; its gradient also where it is not added."""
        rows = bias[self.experts]
        return y + rows if is_added else _WithGradientOf.apply(y, rows)

    def _one_by_one(self, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        ends = self.ends.tolist()
        products = [
            linear(x[begin:end], weight[expert].t())
            for expert, (begin, end) in enumerate(zip([0, *ends], ends))
            if end > begin
        ]
        return torch.cat(products)

    def _all_rows_by_each(self, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        # Nothing is read from the device, so that a CUDA graph can hold it.
        y = x.new_zeros(x.shape[0], weight.shape[2])
        for expert in range(weight.shape[0]):
            is_own = (self.experts == expert)[:, None]
            y = torch.where(is_own, linear(x, weight[expert].t()), y)
        return y


class _WithGradientOf(torch.autograd.Function):
    """The first tensor; the second gets the gradient that it has where it is added.

    Rank 0 alone adds the bias, and every rank has the whole gradient of the sum.
    """

    @staticmethod
    def forward(ctx: Any, y: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
        return y.view_as(y)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return grad, grad


def use_in_order_experts(model: PreTrainedModel) -> None:
    """Let a model's experts be computed here, if transformers lets it choose."""
    if not model._can_set_experts_implementation():
        return
    model.set_experts_implementation(_NAME)
    for module in model.modules():
        if hasattr(module, "_apply_gate") or hasattr(module, "is_transposed"):
            vars(module)["experts_handle"] = _Handle(module)
            vars(module)["parallel_context"] = ParallelContext.single()


class ShardedExperts(NamedTuple):
    """An experts module and how it is sharded by its intermediate features.

    Attributes:
        module: See `experts`.
        shardings: By name of its parameters, but for the bias of the output.
    """

    module: nn.Module
    shardings: dict[str, ParameterSharding]

    @classmethod
    def of(cls, module: Any) -> ShardedExperts:
        """How a module's parameters are sharded."""
        name = "gate_up_proj" if module.has_gate else "up_proj"
        is_packed = module.has_gate and module.is_concatenated
        dims = {
            name: 2 if module.is_transposed else 1,
            "down_proj": 1 if module.is_transposed else 2,
        }
        if module.has_bias:
            dims[f"{name}_bias"] = 1
        shardings: dict[str, ParameterSharding] = {}
        for parameter, dim in dims.items():
            shape = module.get_parameter(parameter).shape
            parts: tuple[Part, ...] = (Part(None, None, shape[dim]),)
            if is_packed and parameter != "down_proj":
                parts = tuple(Part(None, index, shape[dim] // 2) for index in (0, 1))
            shardings[parameter] = ParameterSharding(shape, dim, parts)
        return cls(module, shardings)

    def style(self, name: str) -> str | None:
        """What transformers calls the sharding of a parameter; None: it has none."""
        sharding = self.shardings.get(name)
        if sharding is None:
            return None
        is_last = sharding.dim == len(sharding.shape) - 1
        style = "rowwise" if is_last and not name.endswith("bias") else "colwise"
        return f"packed_{style}" if len(sharding.parts) > 1 else style

    def check_size(self, path: str, context: ParallelContext) -> None:
        """Refuse intermediate features that cannot be cut into the slices."""
        (size,) = (part.size for part in self.shardings["down_proj"].parts)
        if size % context.tp_reduction_shards:
            raise ValueError(
                f"{path}: {size} intermediate features of each expert cannot be cut "
                f"into tp_reduction_shards={context.tp_reduction_shards} slices. "
                "Choose a tensor-parallel size that divides them."
            )

    def shard(self, context: ParallelContext) -> None:
        """Keep this rank's part of the parameters."""
        shard_parameters(self.module, self.shardings, context)


def find_sharded(
    model: nn.Module, plan: Plan, context: ParallelContext
) -> dict[str, ShardedExperts]:
    """The experts that a plan shards, by path.

    Raises:
        ValueError: Modules are named that are no such experts, or their sizes do not
            fit.
    """
    found = {}
    for path, module in model.named_modules():
        if plan.styles.get(path) != EXPERTS:
            continue
        if "experts_handle" not in vars(module):
            raise ValueError(
                f"{path} ({type(module).__name__}) has the tensor-parallel style "
                f"{EXPERTS!r}, and does not use transformers' experts interface. Leave "
                "it out of tp_plan, so that every rank holds it whole."
            )
        found[path] = ShardedExperts.of(module)
        found[path].check_size(path, context)
    return found


def _of_number(
    x: torch.Tensor,
    top_k_index: torch.Tensor,
    top_k_weights: torch.Tensor,
    number: int,
    count: int,
) -> torch.Tensor:
    with batch_invariant_functions():
        return _compute(_MODULES[number], x, top_k_index, top_k_weights, count)


_experts = define_op(
    "transformers_experts(Tensor x, Tensor top_k_index, Tensor top_k_weights, "
    "int number, int count) -> Tensor",
    fake=lambda x, index, weights, number, count: x.new_empty(count, *x.shape),
    cpu=_of_number,
    cuda=_of_number,
)

ALL_EXPERTS_FUNCTIONS.register(_NAME, experts)
