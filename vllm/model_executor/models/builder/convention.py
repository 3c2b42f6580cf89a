# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""How a training-only module is called, and where its result has the logits."""

import inspect
from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple

import torch
from torch import nn

from vllm.model_executor.checkpoint.wrappers import unwrapped
from vllm.model_executor.models.builder.counting import Counting, GivenPositions
from vllm.model_executor.models.builder.spec import BuilderOptions

# Names of token ids where they are not the first parameter.
IDS = ("input_ids", "tokens", "token_ids", "idx")
POSITIONS = ("positions", "position_ids", "input_pos", "pos", "pos_ids")
# Second parameters that are not positions, whatever their default.
NOT_POSITIONS = (
    *("attention_mask", "attention_masks", "attn_mask", "mask", "padding_mask"),
    *("target", "targets", "label", "labels", "y", "loss_mask"),
    *("token_type_ids", "segment_ids", "document_ids", "cache", "past_key_values"),
    *("inputs_embeds", "input_embeds", "cu_seqlens", "hidden_states", "start_pos"),
)


# The attribute of an adopted module that says how it counts its tokens.
COUNTING = "token_counting"


class CallingConvention(NamedTuple):
    """How tokens are passed to a module's `forward`.

    Attributes:
        ids: Name of the parameter for token ids; None: they are the first argument.
        positions: Name of the parameter for positions; None: there is none.
        by_keyword: Whether positions are passed by name and not as the second argument.
        batched: Whether it takes `[batch, seq]` and not `[num_tokens]`.
        packed: Whether it takes `[num_tokens]` with `cu_seqlens`.
        constants: What else is passed, by name.
        counting: How a module counts that takes no positions and was adopted.
    """

    ids: str | None
    positions: str | None
    by_keyword: bool
    batched: bool
    packed: bool
    constants: Mapping[str, Any]
    counting: Counting | None = None

    @classmethod
    def of(
        cls, module: nn.Module, options: BuilderOptions, builder: str
    ) -> "CallingConvention":
        """The convention of a module, from the signature of its `forward`.

        Token ids are the first parameter, unless that is known to be something else and
        another has one of the names in `IDS`. Positions are the parameter with one of
        the names in `POSITIONS`, else the second one if it has no default and its name
        has no other meaning. Transformers models are asked for no cache.

        Args:
            module: The training-only module.
            options: What was said of it.
            builder: What built it, for messages.

        Raises:
            TypeError: `forward` cannot be called with token ids and positions, or has
                no parameter of the name that `options.positions` gives.
        """
        signature = inspect.signature(unwrapped(module).forward)
        parameters = signature.parameters
        kinds = [p.kind for p in parameters.values()]
        variadic = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
        named = [p for p in parameters.values() if p.kind not in variadic]
        name = options.positions
        if (
            name not in (None, *parameters)
            and inspect.Parameter.VAR_KEYWORD not in kinds
        ):
            raise TypeError(
                f"positions={name!r} was given, and forward{signature} of "
                f"{type(module).__name__}, built by {builder}, has no such parameter."
            )
        if name is None:
            name = next((p.name for p in named if p.name in POSITIONS), None)
        ids = _ids(named)
        if name is None and ids is None and len(named) > 1:
            second = named[1]
            required = second.default is second.empty
            if required and second.name not in NOT_POSITIONS:
                name = second.name
        is_second = name is not None and ids is None and _is_second(named, name)
        if (
            name is None
            and len(named) < 2
            and inspect.Parameter.VAR_POSITIONAL in kinds
        ):
            # Whatever takes `(*args, **kwargs)` passes them on.
            name, is_second = "positions", True
        packed = "cu_seqlens" in parameters
        batched = not packed if options.batched is None else options.batched
        convention = cls(
            ids,
            name,
            not is_second,
            batched,
            packed and not batched,
            {"use_cache": False} if "use_cache" in parameters else {},
        )
        counting = getattr(unwrapped(module), COUNTING, None)
        if counting is not None and options.positions is None:
            convention = convention.without_positions()._replace(counting=counting)
        convention._check(signature, module, builder)
        return convention

    def without_positions(self) -> "CallingConvention":
        """The same, but positions are not passed."""
        return self._replace(positions=None, by_keyword=True)

    def _check(
        self, signature: inspect.Signature, module: nn.Module, builder: str
    ) -> None:
        args, kwargs = self._arguments(None, None)
        try:
            signature.bind(*args, **kwargs)
        except TypeError as error:
            raise TypeError(
                f"forward{signature} of {type(module).__name__}, built by {builder}, "
                f"cannot be called with token ids and positions: {error}. Give other "
                "parameters a default. Token ids are the first parameter; positions "
                f"are called {', '.join(POSITIONS)}, or are named by "
                "@model_builder(positions='name')."
            ) from error

    def _arguments(self, ids: Any, positions: Any) -> tuple[list[Any], dict[str, Any]]:
        args: list[Any] = []
        kwargs = dict(self.constants)
        if self.ids is None:
            args.append(ids)
        else:
            kwargs[self.ids] = ids
        if self.positions is not None and self.by_keyword:
            kwargs[self.positions] = positions
        elif self.positions is not None:
            args.append(positions)
        return args, kwargs

    def call(
        self,
        module: nn.Module,
        input_ids: torch.Tensor | None,
        positions: torch.Tensor,
        hidden_states: torch.Tensor | None = None,
        cu_seqlens: torch.Tensor | None = None,
    ) -> Any:
        """Call a module with tokens.

        Args:
            module: The module that this is the convention of.
            input_ids: Token ids, shape = [num_tokens], or [batch, seq] if it is
                batched; None on later pipeline stages.
            positions: The shape of `input_ids`.
            hidden_states: What the pipeline stage before returned, shape =
                [*positions.shape, hidden_size]; None on the first.
            cu_seqlens: Bounds of packed sequences, int32; None for one sequence. Only
                for a packed module.

        Returns:
            What it returned.
        """
        carried = {"hidden_states": hidden_states, "cu_seqlens": cu_seqlens}
        given = {name: x for name, x in carried.items() if x is not None}
        if self.batched and positions.ndim == 1:
            input_ids = None if input_ids is None else input_ids[None]
            positions = positions[None]
            given = {name: x[None] for name, x in given.items()}
        args, kwargs = self._arguments(input_ids, positions)
        with self._counted(positions):
            return module(*args, **kwargs, **given)

    def _counted(self, positions: torch.Tensor) -> AbstractContextManager[Any]:
        """Gives a module that counts the positions of one row.

        Rows of several sequences begin at 0, as it counts them.
        """
        if self.counting is None or positions.numel() != positions.shape[-1]:
            return nullcontext()
        return GivenPositions(self.counting, positions.flatten())

    def shape_of(self, positions: torch.Tensor) -> torch.Size:
        """Shape of the tokens that `call` passes to the module."""
        is_row = self.batched and positions.ndim == 1
        return torch.Size((1, *positions.shape)) if is_row else positions.shape


def _ids(parameters: list[inspect.Parameter]) -> str | None:
    """Name of the parameter for token ids; None: the first positional argument."""
    if not parameters:
        return None
    first = parameters[0]
    if first.name in (*POSITIONS, *NOT_POSITIONS):
        ids = next((p.name for p in parameters if p.name in IDS), None)
        if ids is not None:
            return ids
    return first.name if first.kind is inspect.Parameter.KEYWORD_ONLY else None


def _is_second(parameters: list[inspect.Parameter], name: str) -> bool:
    """Whether a parameter can be passed as the second positional argument."""
    second = parameters[1] if len(parameters) > 1 else None
    return (
        second is not None
        and second.name == name
        and second.kind is not inspect.Parameter.KEYWORD_ONLY
    )


def logits_of(output: Any) -> Any:
    """The logits in what a module returned.

    They are the result itself, its entry or attribute `logits`, or the first element of
    a tuple or list, such as `(logits, loss)`.

    Args:
        output: What the module returned.

    Returns:
        The logits; what is none of these, as it is.
    """
    if isinstance(output, Mapping) and "logits" in output:
        return output["logits"]
    if isinstance(output, tuple | list) and not hasattr(output, "logits"):
        return output[0] if output else output
    return getattr(output, "logits", output)
