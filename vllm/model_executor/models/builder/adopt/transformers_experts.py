# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""Mixture-of-experts layers of transformers' models, as an implementation of theirs.

Each expert multiplies its tokens by products that add up in order, and a token's
outputs are added in the order of its experts. So a token's bits depend on nothing else.
"""

from __future__ import annotations

import itertools
import weakref
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

from vllm.model_executor.determinism.functions import batch_invariant_functions
from vllm.model_executor.determinism.linear.op import linear
from vllm.model_executor.op_library import define_op

_NAME = "training_layers"
# The modules that a compiled model calls by number.
_NUMBERS = itertools.count()
_MODULES: weakref.WeakValueDictionary[int, nn.Module] = weakref.WeakValueDictionary()


class _Handle:
    """The number of a module, or of its copy if the module is copied."""

    def __init__(self, module: nn.Module) -> None:
        self.number = next(_NUMBERS)
        _MODULES[self.number] = module

    def __deepcopy__(self, memo: dict[int, Any]) -> _Handle:
        return _Handle(memo[id(_MODULES[self.number])])


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
    if torch.compiler.is_compiling():
        number = self.experts_handle.number
        return _experts(hidden_states, top_k_index, top_k_weights, number)
    return _compute(self, hidden_states, top_k_index, top_k_weights)


def _compute(
    module: Any, x: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
) -> torch.Tensor:
    if x.is_meta or isinstance(x, torch._subclasses.FakeTensor):
        return torch.empty_like(x)
    num_tokens, top_k = top_k_index.shape
    # Pairs of a token and an expert, sorted by expert.
    expert_of_pair, order = top_k_index.flatten().sort(stable=True)
    numbers = torch.arange(module.num_experts, device=x.device)
    ends = torch.searchsorted(expert_of_pair, numbers, right=True)
    pairs = _Pairs(expert_of_pair, ends)
    y = x[order // top_k]
    y = pairs.product(module, "gate_up_proj" if module.has_gate else "up_proj", y)
    y = module._apply_gate(y) if module.has_gate else module.act_fn(y)
    y = pairs.product(module, "down_proj", y)
    weighted = y[order.argsort()].unflatten(0, (num_tokens, top_k))
    weighted = weighted * top_k_weights[..., None]
    total = weighted[:, 0].float()
    for slot in range(1, top_k):
        total = total + weighted[:, slot]
    return total.to(x.dtype)


class _Pairs:
    """Rows of tokens, sorted by the expert that each is for.

    Args:
        experts: Of each row, ascending, shape = [num_rows].
        ends: Where each expert's rows end, shape = [num_experts].
    """

    def __init__(self, experts: torch.Tensor, ends: torch.Tensor) -> None:
        self.experts, self.ends = experts, ends

    def product(self, module: Any, name: str, x: torch.Tensor) -> torch.Tensor:
        """Each row times its expert's weight, plus the bias."""
        weight = getattr(module, name)
        if not module.is_transposed:
            weight = weight.transpose(1, 2)
        if not x.is_cuda:
            y = self._one_by_one(x, weight)
        elif x.dtype == torch.bfloat16:
            y = torch._grouped_mm(x, weight, offs=self.ends.to(torch.int32))
        else:
            y = self._all_rows_by_each(x, weight)
        if module.has_bias:
            y = y + getattr(module, f"{name}_bias")[self.experts]
        return y

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


def use_in_order_experts(model: PreTrainedModel) -> None:
    """Let a model's experts be computed here, if transformers lets it choose."""
    if not model._can_set_experts_implementation():
        return
    model.set_experts_implementation(_NAME)
    for module in model.modules():
        if hasattr(module, "_apply_gate") or hasattr(module, "is_transposed"):
            vars(module)["experts_handle"] = _Handle(module)


def _of_number(
    x: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor, number: int
) -> torch.Tensor:
    with batch_invariant_functions():
        return _compute(_MODULES[number], x, top_k_index, top_k_weights)


_experts = define_op(
    "transformers_experts(Tensor x, Tensor top_k_index, Tensor top_k_weights, "
    "int number) -> Tensor",
    fake=lambda x, top_k_index, top_k_weights, number: torch.empty_like(x),
    cpu=_of_number,
    cuda=_of_number,
)

ALL_EXPERTS_FUNCTIONS.register(_NAME, experts)
