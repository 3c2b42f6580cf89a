# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""Whether ranks compute what a model computes, and every parameter's whole gradient.

A column-parallel layer gives each rank other features, until a row-parallel layer adds
up. A function across features, such as a mean, would be another on each rank: see
`features_of_ranks`. What every rank holds whole and uses with such features in between
gets a part of its gradient on each rank: a norm of each head, or a key that all heads
share. Layers of the styles for these add up the parts. Without such a style the forward
is right and training is wrong. A forward on fake tensors looks for both.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from vllm.model_executor.models.builder.adopt.features_of_ranks import FeaturesOfRanks
from vllm.model_executor.models.builder.adopt.probing import find_calls
from vllm.model_executor.models.builder.adopt.tensor_parallel import (
    LATENT,
    NORM,
    SPLIT_OUTPUT,
    Plan,
)

# Forwards of more, which are for masks, split features alike.
_FEW_TOKENS = 16


def check_split_features(
    model: nn.Module,
    plan: Plan,
    call: Callable[[torch.Tensor, torch.Tensor], Any],
    transformers: Any,
    tp_size: int,
    is_trained: bool,
) -> None:
    """Refuse a plan that makes results wrong, or a part of a parameter's gradient.

    Args:
        model: Not yet sharded.
        plan: Of the model.
        call: Calls the model with token ids and positions.
        transformers: `transformers_attention`, for one of transformers' models.
        tp_size: Number of ranks, more than one.
        is_trained: Look at gradients too.

    Raises:
        ValueError: Names the module that computes a number from features of several
            ranks, or that uses split features with something else.
    """
    mode = _SplitFeatures(plan, is_trained)
    handles = []

    def probe(input_ids: torch.Tensor, positions: torch.Tensor) -> None:
        # Fake tensors have taken the parameters' places.
        is_short = input_ids.numel() <= _FEW_TOKENS
        mode.features = FeaturesOfRanks(tp_size) if is_short else None
        mode.parameters = {_storage(p): name for name, p in model.named_parameters()}
        with mode:
            call(input_ids, positions)

    for path, style in plan.styles.items():
        try:
            module = model.get_submodule(path)
        except AttributeError:
            continue  # a parameter, which its module shards
        handles.append(module.register_forward_pre_hook(mode.enter(style)))
        handles.append(module.register_forward_hook(mode.leave(path, style)))
    try:
        find_calls(model, probe, transformers)
    finally:
        for handle in handles:
            handle.remove()


class _SplitFeatures(TorchDispatchMode):
    """Follows which tensors hold a rank's part of the features.

    Attributes:
        features: Follows the ranks' features too.
        parameters: Names by storage.
    """

    def __init__(self, plan: Plan, is_trained: bool) -> None:
        super().__init__()
        self.plan, self.is_trained = plan, is_trained
        self.features: FeaturesOfRanks | None = None
        self.parameters: dict[int, str] = {}
        # Storages, so that views count; they are kept, so that none is reused.
        self.kept: list[torch.UntypedStorage] = []
        self.split: set[int] = set()
        # Of what has a gradient and is the same on all ranks.
        self.whole: set[int] = set()
        # Styles of the layers that are running.
        self.running: list[str] = []

    def enter(self, style: str) -> Callable[..., None]:
        """A hook of layers with a style, which know what they do."""
        return lambda module, args: self.running.append(style)

    def leave(self, path: str, style: str) -> Callable[..., None]:
        """A hook that says what a layer's result is."""

        def leave(module: nn.Module, args: Any, output: Any) -> None:
            self.running.pop()
            if style in SPLIT_OUTPUT:
                layout = self.plan.style(path)
                if self.features is not None and layout is not None:
                    self.features.split(output, layout.parts(output.shape[-1]))
                self._add(output, self.split)
            elif style == NORM and not self.split.isdisjoint(_storages(args)):
                self._add(output, self.split)
            elif style != LATENT:
                self._add(output, self.whole)

        return leave

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        output = func(*args, **kwargs)
        if self.features is not None and not {*self.running} - {NORM}:
            self.features.apply(func, args, kwargs, output)
        if self.running or not self.is_trained:
            return output
        used = _storages((args, kwargs))
        if self.split.isdisjoint(used):
            if used & (self.whole | self.parameters.keys()):
                self._add(output, self.whole)
            return output
        self._add(output, self.split)
        if names := [self.parameters[s] for s in used if s in self.parameters]:
            what = f"the parameter {names[0]}, which every rank holds whole,"
        elif used & (self.whole - self.split):
            what = "a result that is the same on all ranks"
        else:
            return output
        raise ValueError(
            f"uses {what} in {func} with features of which a rank has a part, so its "
            "gradient would be a part too. Give norms of each head the tensor-parallel "
            f"style {NORM!r} and the projection to a key that all heads share "
            f"{LATENT!r}, or gather the features ('colwise_gather_output')."
        )

    def _add(self, values: Any, storages: set[int]) -> None:
        for tensor in tree_leaves(values):
            if isinstance(tensor, torch.Tensor):
                self.kept.append(tensor.untyped_storage())
                storages.add(_storage(tensor))


def _storages(values: Any) -> set[int]:
    return {_storage(x) for x in tree_leaves(values) if isinstance(x, torch.Tensor)}


def _storage(tensor: torch.Tensor) -> int:
    return tensor.untyped_storage()._cdata
