# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""The head of a training-only module: finding it, and running the module without it."""

from collections import OrderedDict
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from vllm.model_executor.layers.training.base import TrainingLayer
from vllm.model_executor.layers.training.embedding import VocabParallelEmbedding


class HeadTap:
    """Stands for a head while installed: returns its input and remembers it.

    Neither the head's forward nor its hooks run then, so the module that calls it
    returns hidden states and no logits are computed.

    Args:
        head: The head. Nothing changes before `install`.

    Attributes:
        hidden_states: What the head was last called with; None before.
    """

    def __init__(self, head: nn.Module) -> None:
        self.head = head
        self.hidden_states: torch.Tensor | None = None
        self._own: dict[str, Any] = {}

    def __call__(self, *args: torch.Tensor, **kwargs: torch.Tensor) -> torch.Tensor:
        (self.hidden_states,) = (*args, *kwargs.values())
        return self.hidden_states

    def install(self) -> None:
        """Take the place of the head's forward, hooks and compiled call."""
        attributes = {
            "forward": self,
            "_forward_hooks": OrderedDict(),
            "_forward_pre_hooks": OrderedDict(),
            "_compiled_call_impl": None,
        }
        own = vars(self.head)
        self._own = {name: own[name] for name in attributes if name in own}
        own.update(attributes)

    def remove(self) -> None:
        """Give the head back what `install` replaced."""
        own = vars(self.head)
        for name in ("forward", "_compiled_call_impl"):
            own.pop(name, None)
        own.update(self._own)

    @contextmanager
    def installed(self) -> Iterator["HeadTap"]:
        """Installed inside, removed after."""
        self.install()
        try:
            yield self
        finally:
            self.remove()

    @contextmanager
    def removed(self) -> Iterator[nn.Module]:
        """The head itself inside, the tap again after."""
        self.remove()
        try:
            yield self.head
        finally:
            self.install()


def named_head(module: nn.Module, option: str | None, caller: str) -> list[str]:
    """Paths of the modules that are the head by an option, or by their name.

    One is returned if it is known.

    Raises:
        ValueError: there is no such module as the option says.
    """
    paths = [path for path, _ in module.named_modules() if path]
    if option is not None and option not in paths:
        raise ValueError(
            f"{caller} names the head {option!r}, but the module has no such "
            f"submodule; it has {', '.join(paths)}."
        )
    path = option or "lm_head"
    if path in paths:
        return [path]
    return [path for path in paths if path.rpartition(".")[2] == "lm_head"]


def find_head(
    module: nn.Module, option: str | None, sizes: tuple[int, int], builder: str
) -> str:
    """Path of the module that gives logits; see `BuilderOptions.head`.

    Args:
        module: The training-only module.
        option: The path that the builder names.
        sizes: Of the vocabulary and of a hidden state.
        builder: The builder's name, for messages.

    Raises:
        ValueError: There is none, or several could be it.
    """
    by_name = named_head(module, option, f"The builder {builder}")
    if len(by_name) == 1:
        return by_name[0]
    modules = dict(module.named_modules())
    candidates = [
        name
        for name, part in modules.items()
        if name
        and _weight_shape(part) == sizes
        and not isinstance(part, (nn.Embedding, VocabParallelEmbedding))
    ]
    if len(candidates) != 1:
        raise ValueError(
            f"Cannot tell which submodule of {type(module).__name__}, built by "
            f"{builder}, is the head that turns hidden states into logits: "
            f"{by_name or 'none'} are called 'lm_head', and {candidates or 'none'} "
            f"have a weight of shape {sizes}. Name it: @model_builder(head='path')."
        )
    return candidates[0]


def _weight_shape(module: nn.Module) -> tuple[int, ...] | None:
    """Shape of a module's own weight over all ranks."""
    if isinstance(module, TrainingLayer):
        sharding = module.parameter_sharding().get("weight")
        return None if sharding is None else tuple(sharding.shape)
    weight = getattr(module, "weight", None)
    return tuple(weight.shape) if isinstance(weight, torch.Tensor) else None
