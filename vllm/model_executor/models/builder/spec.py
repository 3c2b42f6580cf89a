# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""What a model builder is: its signature, its options, and calling it."""

import copy
import functools
import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from torch import nn

from vllm.model_executor.parallel_context import ParallelContext

if TYPE_CHECKING:
    from vllm.config import ModelConfig, VllmConfig

PARAMETERS = ("vllm_config", "config", "parallel_context", "prefix")
POSITIONAL = ("config", "parallel_context")
ACCEPTED = (
    f"a builder takes any subset of {', '.join(PARAMETERS)} by name, "
    "or positional parameters of any name: (config) or (config, parallel_context)"
)
_OPTIONS = "__vllm_builder_options__"


@dataclass(frozen=True)
class BuilderOptions:
    """What cannot be inferred from a training-only module.

    Attributes:
        head: Path of the module that turns hidden states into logits. Default:
            `lm_head` if there is one, else the only module that maps
            `hidden_size` to `vocab_size`. A module that has the methods
            `hidden_states(input_ids, positions)` and `logits(hidden_states)` needs
            none; with the first alone its `forward` is not called.
        batched: Whether `forward` takes `[batch, seq]` (served as one row
            `[1, num_tokens]`) rather than packed `[num_tokens]`. Default: packed
            if `forward` has a parameter `cu_seqlens`, else batched.
        supports_pp: Whether the builder builds single pipeline stages. `forward`
            then takes `hidden_states`, None on the first stage, and returns them on
            all but the last.
        uses_positions: Whether the model uses `positions`. False for a model without a
            position encoding; the startup check then logs no warning.
        positions: Name of the parameter of `forward` that takes positions. Default: one
            called `positions`, `position_ids`, `input_pos`, `pos` or `pos_ids`, else
            the second if it has no default.
    """

    head: str | None = None
    batched: bool | None = None
    supports_pp: bool = False
    uses_positions: bool = True
    positions: str | None = None


INFERRED = BuilderOptions()
"""Of a module of which nothing was said."""


def model_builder(
    build: Callable[..., nn.Module] | None = None,
    *,
    head: str | None = None,
    batched: bool | None = None,
    supports_pp: bool = False,
    uses_positions: bool = True,
    positions: str | None = None,
) -> Any:
    """Attach to a builder what cannot be inferred from the module it returns.

    Works bare (`@model_builder`) and with options
    (`@model_builder(head="output", batched=True)`); see `BuilderOptions`.

    Returns:
        The builder itself, so that it can also be called directly.
    """

    def attach(build: Callable[..., nn.Module]) -> Callable[..., nn.Module]:
        options = BuilderOptions(head, batched, supports_pp, uses_positions, positions)
        setattr(build, _OPTIONS, options)
        return build

    return attach if build is None else attach(build)


def builder_name(target: Any) -> str:
    """Where a builder is defined, for messages: `module.qualname`."""
    while isinstance(target, functools.partial):
        target = target.func
    if not hasattr(target, "__qualname__"):
        target = type(target)
    return f"{target.__module__}.{target.__qualname__}"


def builder_options(target: Any) -> BuilderOptions:
    """The options that `model_builder` attached, through `functools.partial`."""
    while isinstance(target, functools.partial) and not hasattr(target, _OPTIONS):
        target = target.func
    return getattr(target, _OPTIONS, INFERRED)


def _in_engines_dtype(model_config: "ModelConfig") -> Any:
    """The model's config, whose dtype is the engine's and not the checkpoint's.

    transformers builds a model in the dtype of its config, not in torch's default.
    """
    config = copy.deepcopy(model_config.hf_config)
    for part in (config, config.get_text_config()):
        if hasattr(part, "dtype"):
            part.dtype = model_config.dtype
    return config


def match_parameters(target: Callable[..., nn.Module]) -> dict[str, str]:
    """Decide which argument each parameter of a builder receives.

    Args:
        target: The builder.

    Returns:
        Parameter name to one of `PARAMETERS`, in the order of the signature;
        parameters that keep their default are left out.

    Raises:
        TypeError: A required parameter is not one vLLM can provide.
    """
    name = builder_name(target)
    try:
        signature = inspect.signature(target)
    except (TypeError, ValueError) as error:
        raise TypeError(
            f"The builder {name} has no signature to read ({error}); {ACCEPTED}. "
            "Wrap it in a function with such a signature."
        ) from error
    variadic = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    parameters = [p for p in signature.parameters.values() if p.kind not in variadic]
    if not parameters and signature.parameters:
        raise TypeError(
            f"The builder {name}{signature} names no parameter, so vLLM does not know "
            f"which arguments to pass; {ACCEPTED}."
        )

    required = [p for p in parameters if p.default is p.empty]
    unknown = [p.name for p in required if p.name not in PARAMETERS]
    if unknown and len(required) <= len(POSITIONAL):
        pairs = list(zip(required, POSITIONAL))
        positional = all(p.kind is not p.KEYWORD_ONLY for p in required)
        if positional and all(
            p.name == meaning or p.name not in PARAMETERS for p, meaning in pairs
        ):
            return {p.name: meaning for p, meaning in pairs}
    if unknown:
        raise TypeError(
            f"The builder {name}{signature} requires the parameter"
            f"{'s' if len(unknown) > 1 else ''} {', '.join(map(repr, unknown))}, "
            f"which vLLM does not provide; {ACCEPTED}. Give other parameters a "
            "default or bind them with functools.partial."
        )
    return {p.name: p.name for p in parameters if p.name in PARAMETERS}


@dataclass(frozen=True, eq=False)
class BuilderSpec:
    """A validated builder.

    Attributes:
        target: The callable.
        name: Where it is defined.
        parameters: Result of `match_parameters`.
        options: What `model_builder` attached.
    """

    target: Callable[..., nn.Module]
    name: str
    parameters: dict[str, str]
    options: BuilderOptions

    @classmethod
    def of(cls, target: Callable[..., nn.Module]) -> "BuilderSpec":
        """Validate `target`; raises `TypeError` as `match_parameters` does."""
        return cls(
            target,
            builder_name(target),
            match_parameters(target),
            builder_options(target),
        )

    def build(self, vllm_config: "VllmConfig", prefix: str = "") -> nn.Module:
        """Call the builder in an engine process whose groups are initialised.

        Raises:
            TypeError: The builder returned something that is no `nn.Module`.
            Exception: What the builder raised, with a note that names it.
        """
        available = {
            "vllm_config": vllm_config,
            "config": _in_engines_dtype(vllm_config.model_config),
            "parallel_context": ParallelContext.current(),
            "prefix": prefix,
        }
        signature = inspect.signature(self.target)
        args, kwargs = [], {}
        for parameter, meaning in self.parameters.items():
            kind = signature.parameters[parameter].kind
            if kind is inspect.Parameter.POSITIONAL_ONLY:
                args.append(available[meaning])
            else:
                kwargs[parameter] = available[meaning]
        try:
            module = self.target(*args, **kwargs)
        except Exception as error:
            error.add_note(f"Raised while the model builder {self.name} ran.")
            raise
        if not isinstance(module, nn.Module):
            raise TypeError(
                f"The builder {self.name} returned {type(module).__name__}, but it "
                "must return a torch.nn.Module (an instance, not a class)."
            )
        return module
