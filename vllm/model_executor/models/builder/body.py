# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""A training-only module without its head, for engine, start-up check and trainers.

The engine applies the head only where a token is sampled, and parity only where one is
scored. A module may have a method `hidden_states(input_ids, positions)`, which returns
what the head receives, and a method `logits(hidden_states)`. In any other module
`head.find_head` finds the head, a `HeadTap` takes its place in `forward`, and `tail`
finds what follows it.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any, NamedTuple

import torch
from torch import nn

from vllm.model_executor.layers.training.base import TrainingLayer
from vllm.model_executor.models.builder.convention import (
    CallingConvention,
    logits_of,
)
from vllm.model_executor.models.builder.head import HeadTap, find_head
from vllm.model_executor.models.builder.interface import (
    VLLM_INTERFACE,
    check_every_token,
)
from vllm.model_executor.models.builder.rows import close
from vllm.model_executor.models.builder.spec import BuilderOptions
from vllm.model_executor.models.builder.tail import (
    NoTailError,
    Tail,
    Trace,
    TracedLogits,
)
from vllm.model_executor.op_library import SUPPORTED_DTYPES
from vllm.model_executor.parallel_context import ParallelContext


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


class HeadWithTail(TrainingLayer):
    """A head and what follows it, as one module that gives the model's logits."""

    def __init__(self, head: nn.Module, tail: Tail) -> None:
        if isinstance(head, TrainingLayer):
            super().__init__(head.parallel_context)
            self.sequence_parallel = head.sequence_parallel
        else:
            super().__init__(ParallelContext.single())
        self.head, self.tail = head, tail

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """shape = [..., hidden_size] -> [..., vocab_size]."""
        return self.tail(self.head(hidden_states))


class _Logits(NamedTuple):
    """What a head gives for one row of hidden states.

    Attributes:
        slices: Number of rows: with sequence parallelism one for each rank's slice of
            the tokens.
        vocab_size: Number of logits in a row.
        dtype: Of the logits.
    """

    slices: int
    vocab_size: int
    dtype: torch.dtype


class Traced(NamedTuple):
    """A forward without its head.

    Attributes:
        hidden_states: What the head received, shape = [..., num_tokens, hidden_size].
        tail: What follows the head.
    """

    hidden_states: torch.Tensor
    tail: Tail


class Body:
    """A module without its head.

    Args:
        module: The training-only module.
        options: What was said of it.
        caller: Who calls it, for messages.

    Attributes:
        module: What is called with tokens: the module, or its method `hidden_states`.
        convention: How it is called.
        head: What turns what it returns into logits; `set_head` sets it.
        head_path: For messages.
        apply_head: Gives logits while the head is left out; None on ranks that sample
            nothing.
        tail: What `forward` does to the head's output; None before `find_tail`, when
            it has to return just that.
    """

    def __init__(self, module: nn.Module, options: BuilderOptions, caller: str) -> None:
        self._whole = module
        self._options = options
        self._caller = caller
        own = _has(module, "hidden_states")
        self.module = Method(module, "hidden_states") if own else module
        self.convention = CallingConvention.of(self.module, options, caller)
        self.head_path = ""
        self.apply_head: Callable[[torch.Tensor], Any] = self._call_head
        self.tail: Tail | None = None
        self._vocab_size: int | None = None
        self._logits: _Logits | None = None
        self._tap: HeadTap | None = None

    def find_head(
        self, caller: str, sizes: tuple[int, int] | None = None
    ) -> str | None:
        """Path of the head, as `head.find_head` finds it.

        Args:
            caller: Who looks for it, for messages.
            sizes: Of the vocabulary and of a hidden state, if they are known.

        Returns:
            The path; None if the module has a method `logits` in place of a head.

        Raises:
            TypeError: A head is named, and the module has its own `logits`.
        """
        module, option = self._whole, self._options.head
        self._vocab_size = sizes and sizes[0]
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

    def call(self, *tokens: Any) -> Any:
        """Call the module while the head is left out.

        Args:
            tokens: See `CallingConvention.call`.

        Returns:
            What it returned; `hidden_states` takes that.
        """
        return self.convention.call(self.module, *tokens)

    def hidden_states(self, output: Any) -> torch.Tensor:
        """What the head received.

        Args:
            output: What `call` returned.

        Returns:
            shape = [..., num_tokens, hidden_size]

        Raises:
            TypeError: The module does something else to the head's output than `tail`.
        """
        if self._tap is None:
            return self._checked(output)
        received, self._tap.hidden_states = self._tap.hidden_states, None
        is_expected = self.tail is not None or logits_of(output) is received
        if received is None or not is_expected:
            raise self._refusal(received, output)
        return received

    def traced(self, *tokens: Any) -> Traced:
        """Call the module, and find what it does to the head's output.

        Args:
            tokens: See `CallingConvention.call`.

        Raises:
            TypeError: That cannot be repeated.
            ValueError: The head was not given every token.
        """
        with self.installed():
            traced = self._traced(*tokens)
        if not getattr(self.head, "sequence_parallel", False):
            shape = self.convention.shape_of(tokens[1])
            check_every_token(traced.hidden_states, shape, self._caller)
        return traced

    def head_with(self, tail: Tail) -> nn.Module:
        """A module that turns hidden states into the model's logits."""
        return HeadWithTail(self.head, tail) if tail.steps else self.head

    def find_tail(self, first: tuple, second: tuple) -> None:
        """Find out what the module does to the head's output, while it is left out.

        Without gradients, of which the numbers that are changed in between have none.

        Args:
            first: Arguments of `call`.
            second: Others, of as few tokens in common as possible.

        Raises:
            TypeError: That cannot be repeated, or depends on the tokens.
        """
        if self._tap is None:
            return
        tail = self._traced(*first).tail
        with _other_numbers(self._whole):
            other = self._traced(*second).tail
        if tail != other:
            raise self._refused(
                "what it does depends on the tokens, or on a number that it reads from "
                f"a tensor ({tail}; {other} for others)"
            )
        self.tail = tail
        self._tap.stand_in = self._stand_in if tail.steps else None

    def _traced(self, *tokens: Any) -> Traced:
        tap = self._tap
        if tap is None:
            return Traced(self._checked(self.call(*tokens)), Tail(self._whole))
        before, tap.stand_in = tap.stand_in, self._stand_in
        try:
            output = self.call(*tokens)
        except NoTailError as error:
            raise self._refused(str(error)) from error
        finally:
            tap.stand_in = before
        received, tap.hidden_states = tap.hidden_states, None
        logits = logits_of(output)
        if isinstance(logits, TracedLogits):
            if logits.recorder.hidden_states is not received:
                raise self._refused("forward calls the head again after that")
            try:
                return Traced(received, logits.recorder.tail(logits))
            except NoTailError as error:
                raise self._refused(str(error)) from error
        if received is None or logits is not received:
            raise self._refusal(received, output)
        return Traced(received, Tail(self._whole))

    def _stand_in(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """What `forward` goes on with in place of logits."""
        if torch.compiler.is_compiling():
            if self._logits is None:
                return hidden_states
            # A compiler removes what is done to them, as nothing uses it.
            shape = (*hidden_states.shape[:-1], self._logits.vocab_size)
            return hidden_states.new_zeros(shape, dtype=self._logits.dtype)
        if self._logits is None:
            row = self.apply_head(hidden_states.flatten(0, -2)[:1])
            if row is None:
                assert self._vocab_size is not None
                row = hidden_states.new_empty(1, self._vocab_size)
            if not isinstance(row, torch.Tensor) or row.ndim != 2:
                raise TypeError(
                    f"The head {self.head_path!r} of the module built by "
                    f"{self._caller} returned {_kind(row)} for hidden states of shape "
                    f"{[1, hidden_states.shape[-1]]}, and has to return logits, "
                    "shape = [1, vocab_size]."
                )
            self._logits = _Logits(row.shape[0], row.shape[1], row.dtype)
        return Trace(self._whole, hidden_states, *self._logits).logits()

    def _call_head(self, hidden_states: torch.Tensor) -> Any:
        with nullcontext() if self._tap is None else self._tap.removed():
            return self.head(hidden_states)

    def logits(self, hidden_states: torch.Tensor) -> Any:
        """The module's logits for hidden states, while the head is left out."""
        logits = self.apply_head(hidden_states)
        if logits is None or self.tail is None:
            return logits
        return self.tail(logits)

    def _checked(self, output: Any) -> torch.Tensor:
        """The hidden states that the module says itself."""
        if isinstance(output, torch.Tensor):
            return output
        raise TypeError(
            f"hidden_states of the module built by {self._caller} returned "
            f"{_kind(output)}, and has to return a tensor of shape "
            "[..., num_tokens, hidden_size]."
        )

    def _refusal(self, received: torch.Tensor | None, output: Any) -> TypeError:
        """Of an output that is not made from the head's."""
        if received is None:
            return self._refused("forward did not call the head")
        reason = f"forward returned another {_kind(logits_of(output))}"
        if torch.compiler.is_compiling() or _is_compiled(self.module):
            reason += (
                ". It is compiled as a whole, so what follows the head cannot be seen: "
                "compile its layers instead (layer.compile())"
            )
        return self._refused(reason)

    def _refused(self, reason: str) -> TypeError:
        return TypeError(
            f"forward of the module built by {self._caller} does not return the output "
            f"of its head {self.head_path!r}, or a function of each logit: {reason}. "
            "So logits cannot be computed for the sampled positions alone. Scale, cap "
            "or cast logits one by one, with numbers, parameters and buffers; move "
            "anything else into the head module, or return a module with vLLM's "
            f"interface ({', '.join(VLLM_INTERFACE)})."
        )

    def difference(self, tokens: tuple, hidden_states: torch.Tensor) -> str | None:
        """Compare `forward`, which may be trained, with the methods that are served.

        Args:
            tokens: The arguments of `call` that gave `hidden_states`.
            hidden_states: What the method of that name returned.

        Returns:
            The difference in words; None if there is none, or if the module has no
            such methods.
        """
        if self.module is self._whole or not self.head_path:
            return None
        whole = self._whole
        convention = CallingConvention.of(whole, self._options, self._caller)
        if isinstance(self.head, Method):
            head, served = "logits", self.head(hidden_states)
            trained = logits_of(convention.call(whole, *tokens))
        else:
            head, served = self.head_path, hidden_states
            with HeadTap(self.head).installed():
                trained = logits_of(convention.call(whole, *tokens))
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


@contextmanager
def _other_numbers(module: nn.Module) -> Iterator[None]:
    """Parameters and buffers of one number have another one inside."""
    numbers = [
        tensor
        for tensor in (*module.parameters(), *module.buffers())
        if tensor.numel() == 1 and tensor.dtype in SUPPORTED_DTYPES
    ]
    before = [tensor.clone() for tensor in numbers]
    try:
        for tensor in numbers:
            tensor.add_(1)
        yield
    finally:
        for tensor, value in zip(numbers, before):
            tensor.copy_(value)


def _is_compiled(module: nn.Module) -> bool:
    return module._compiled_call_impl is not None or hasattr(module, "_orig_mod")


def _kind(value: Any) -> str:
    return type(value).__name__
