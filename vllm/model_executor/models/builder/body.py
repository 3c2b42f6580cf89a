# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""A training-only module without its head, for engine, start-up check and parity.

The engine applies the head only where a token is sampled, and parity only where one is
scored. A module may have a method `hidden_states(input_ids, positions)`, which returns
what the head receives, and a method `logits(hidden_states)`. In any other module
`head.find_head` finds the head, and a `HeadTap` takes its place in `forward`.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import nn

from vllm.model_executor.models.builder.head import HeadTap, find_head
from vllm.model_executor.models.builder.interface import check_head_output
from vllm.model_executor.models.builder.rows import close


class Method(nn.Module):
    """A view of a module that has another method as its `forward`.

    Submodules, parameters and buffers are the module's own, under their names.
    """

    def __init__(self, module: nn.Module, name: str) -> None:
        super().__init__()
        # What messages call it.
        self.__class__ = type(f"{type(module).__name__}.{name}", (Method,), {})
        self._modules = module._modules
        self._parameters = module._parameters
        self._buffers = module._buffers
        self.training = module.training
        self.forward = getattr(module, name)


class Body:
    """A module without its head.

    Args:
        module: The training-only module.

    Attributes:
        module: What is called with tokens: the module, or its method `hidden_states`.
            After `install` it returns what the head receives.
        head: What turns that into logits; `set_head` sets it.
        head_path: For messages.
    """

    def __init__(self, module: nn.Module) -> None:
        self._whole = module
        own = _has(module, "hidden_states")
        self.module = Method(module, "hidden_states") if own else module
        self.head_path = ""
        self._tap: HeadTap | None = None

    def find_head(
        self, option: str | None, caller: str, sizes: tuple[int, int] | None = None
    ) -> str | None:
        """Path of the head, as `head.find_head` finds it.

        Returns:
            The path; None if the module has a method `logits` in place of a head.

        Raises:
            TypeError: A head is named, and the module has its own `logits`.
        """
        module = self._whole
        if self.module is module or not _has(module, "logits"):
            return find_head(module, option, caller, sizes)
        if option is not None:
            raise TypeError(
                f"{caller} names the head {option!r}, and {type(module).__name__} has "
                "the methods hidden_states and logits, which say what the head is. "
                "Leave the option out, or remove the method logits."
            )
        return None

    def set_head(self, path: str | None) -> None:
        """Use the head that `find_head` returned, or what has taken its place."""
        self.head_path = path or "logits"
        if path is None:
            self.head: nn.Module = Method(self._whole, "logits")
        else:
            self.head = self._whole.get_submodule(path)
        self._tap = HeadTap(self.head) if self.module is self._whole else None

    def install(self) -> None:
        """Leave the head out of the module."""
        if self._tap is not None:
            self._tap.install()

    @contextmanager
    def installed(self) -> Iterator["Body"]:
        """Without the head inside, with it after."""
        with nullcontext() if self._tap is None else self._tap.installed():
            yield self

    def logits(self, hidden_states: torch.Tensor) -> Any:
        """What the head makes of hidden states, while it is left out."""
        with nullcontext() if self._tap is None else self._tap.removed():
            return self.head(hidden_states)

    def check_output(self, output: Any, caller: str) -> None:
        """Refuse a module that changes what its head gives.

        Args:
            output: What the module returned without its head.
            caller: Who called it, for messages.

        Raises:
            TypeError: It is not what the head receives.
        """
        if self._tap is not None:
            check_head_output(output, self._tap, self.head_path, caller)
            self._tap.hidden_states = None
        elif not isinstance(output, torch.Tensor):
            raise TypeError(
                f"hidden_states of the module built by {caller} returned "
                f"{type(output).__name__}, and has to return a tensor of shape "
                "[..., num_tokens, hidden_size]."
            )

    def difference(
        self, call: Callable[[nn.Module], Any], hidden_states: torch.Tensor
    ) -> str | None:
        """Compare `forward`, which may be trained, with the methods that are served.

        Args:
            call: Calls a module with the tokens that gave `hidden_states`.
            hidden_states: What the method of that name returned.

        Returns:
            The difference in words; None if there is none, or if the module has no
            such methods.
        """
        if self.module is self._whole or not self.head_path:
            return None
        if isinstance(self.head, Method):
            head, served = "logits", self.head(hidden_states)
            trained = call(self._whole)
        else:
            head, served = self.head_path, hidden_states
            with HeadTap(self.head).installed():
                trained = call(self._whole)
        if (
            isinstance(trained, torch.Tensor)
            and trained.shape == served.shape
            and close(trained.flatten(0, -2), served.flatten(0, -2))
        ):
            return None
        return (
            f"forward does not return {head}(hidden_states(...)), which is what the "
            "engine serves. Let forward call both and return the result unchanged. "
            "What follows the head belongs in a method logits(hidden_states)."
        )


def _has(module: nn.Module, method: str) -> bool:
    # Not an attribute of an object that happens to have the name.
    return callable(getattr(type(module), method, None))
