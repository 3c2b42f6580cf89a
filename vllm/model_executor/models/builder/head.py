# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""The head of a training-only module: finding it, and running the module without it."""

from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from vllm.model_executor.layers.training.base import TrainingLayer
from vllm.model_executor.layers.training.embedding import VocabParallelEmbedding


class HeadTap:
    """Stands for a head while installed: remembers its input and returns a stand-in.

    Neither the head's forward nor its hooks run then, so no logits are computed.

    Args:
        head: The head. Nothing changes before `install`.

    Attributes:
        hidden_states: What the head was last called with; None before.
        stand_in: What the head returns, a function of what it is called with; None:
            that itself.
    """

    def __init__(self, head: nn.Module) -> None:
        self.head = head
        self.hidden_states: torch.Tensor | None = None
        self.stand_in: Callable[[torch.Tensor], torch.Tensor] | None = None
        self._own: dict[str, Any] = {}

    def __call__(self, *args: torch.Tensor, **kwargs: torch.Tensor) -> torch.Tensor:
        (hidden_states,) = (*args, *kwargs.values())
        self.hidden_states = hidden_states
        return hidden_states if self.stand_in is None else self.stand_in(hidden_states)

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


def find_head(
    module: nn.Module,
    option: str | None,
    caller: str,
    sizes: tuple[int, ...] | None = None,
) -> str:
    """Path of the module that gives logits.

    It is the one that is named by `option`, else the one called `lm_head`, else the
    only one, except for embeddings, with a weight of shape [vocab_size, hidden_size].

    Args:
        module: The training-only module.
        option: The path that was given, as `@model_builder(head=...)`.
        caller: Who looks for it, such as "The builder build", for messages.
        sizes: Of the vocabulary and of a hidden state; None: those of the embedding
            with the most rows.

    Raises:
        ValueError: There is none, or several could be it.
    """
    modules = {path: part for path, part in module.named_modules() if path}
    if option is not None:
        if option not in modules:
            raise ValueError(
                f"{caller} names the head {option!r}, but the module has no such "
                f"submodule; it has {', '.join(modules)}."
            )
        return option
    if "lm_head" in modules:
        return "lm_head"
    by_name = [path for path in modules if path.endswith(".lm_head")]
    if len(by_name) == 1:
        return by_name[0]
    sizes = sizes or _embedding_sizes(module)
    by_shape = [
        path
        for path, part in modules.items()
        if not isinstance(part, EMBEDDINGS) and sizes == _weight_shape(part)
    ]
    if len(by_shape) == 1:
        return by_shape[0]
    advice = (
        "Compute the logits in a module, and call it lm_head or name it: "
        "@model_builder(head='path'), and head='path' for parity.compare, "
        "parity.check and check_servable."
    )
    embeddings = (
        path
        for path, part in modules.items()
        if isinstance(part, EMBEDDINGS) and sizes == _weight_shape(part)
    )
    tied = next(embeddings, None)
    if tied is not None and not by_name and not by_shape:
        advice += _tying(tied, modules[tied])
    raise ValueError(
        f"{caller} cannot tell which submodule of {type(module).__name__} is the head, "
        f"which turns hidden states into logits: {by_name or 'none'} are called "
        f"'lm_head', and {by_shape or 'none'} have a weight of shape {sizes}. {advice}"
    )


def _tying(path: str, embedding: nn.Module) -> str:
    """How to write a head that uses an embedding's weight."""
    vocab_size, hidden_size = _weight_shape(embedding) or ()
    head = f"nn.Linear({hidden_size}, {vocab_size}, bias=False)"
    tied = f"self.lm_head.weight = self.{path}.weight"
    if isinstance(embedding, VocabParallelEmbedding):
        head = f"ParallelLMHead({vocab_size}, {hidden_size})"
        tied = f"self.lm_head.tie_weights(self.{path})"
    return (
        f" If forward itself multiplies by the weight of {path!r}, as "
        f"F.linear(x, self.{path}.weight) or x @ self.{path}.weight.T do, replace that "
        f"by self.lm_head(x), with `self.lm_head = {head}` and `{tied}` in __init__."
    )


EMBEDDINGS = (nn.Embedding, VocabParallelEmbedding)


def _embedding_sizes(module: nn.Module) -> tuple[int, ...] | None:
    """Shape over all ranks of the embedding with the most rows; None without one."""
    embeddings = (part for part in module.modules() if isinstance(part, EMBEDDINGS))
    shapes = (shape for part in embeddings if (shape := _weight_shape(part)))
    return max(shapes, default=None)


def _weight_shape(module: nn.Module) -> tuple[int, ...] | None:
    """Shape of a module's own weight over all ranks."""
    if isinstance(module, TrainingLayer):
        sharding = module.parameter_sharding().get("weight")
        return None if sharding is None else tuple(sharding.shape)
    weight = getattr(module, "weight", None)
    return tuple(weight.shape) if isinstance(weight, torch.Tensor) else None
