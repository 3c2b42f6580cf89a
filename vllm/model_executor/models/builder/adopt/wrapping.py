# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""A module whose own code runs with functions of torch taken over.

The module's class becomes a subclass with the same name, as FSDP2 does it, so that the
module is the same object, `isinstance` holds and `copy.deepcopy` works.
"""

from __future__ import annotations

import functools
from contextlib import AbstractContextManager, nullcontext
from typing import Any, cast

from torch import nn

from vllm.model_executor.determinism.functions import batch_invariant_functions
from vllm.model_executor.models.builder.adopt import gated_mlp
from vllm.model_executor.models.builder.adopt.attention import AdoptedAttention
from vllm.model_executor.models.builder.adopt.flex_attention import without_compiler
from vllm.model_executor.models.builder.adopt.pipeline_stage import (
    signature,
    stage_of,
)
from vllm.model_executor.models.builder.adopt.torch_attention import (
    AttentionCalls,
    site_name,
)


class AdoptedModule(nn.Module):
    """Marks a module that runs its own forward with functions taken over."""

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        cls, is_stage = type(self).__mro__[2], stage_of(self) is not None
        return _new, (cls, is_stage), self.__dict__


def wrap(module: nn.Module) -> None:
    """Make a module of any class an `AdoptedModule`; in place, once."""
    if not isinstance(module, AdoptedModule):
        module.__class__ = _adopted(type(module), stage_of(module) is not None)


_CLASSES: dict[tuple[type[nn.Module], bool], type[AdoptedModule]] = {}


def _adopted(cls: type[nn.Module], is_stage: bool) -> type[AdoptedModule]:
    if (cls, is_stage) not in _CLASSES:
        _CLASSES[cls, is_stage] = _make_class(cls, is_stage)
    return _CLASSES[cls, is_stage]


def _make_class(cls: type[nn.Module], is_stage: bool) -> type[AdoptedModule]:
    original = cls.forward

    @functools.wraps(original)
    def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        if gated_mlp.ACTIVATION in self._modules and len(args) + len(kwargs) == 1:
            return gated_mlp.forward(self, *args, *kwargs.values())
        calls = AttentionCalls(self) if site_name(0) in self._modules else nullcontext()
        stage = stage_of(self)
        with batch_invariant_functions(), calls, _flex_attention(self):
            if stage is not None:
                return stage.call(self, original, args, kwargs)
            result = original(self, *args, **kwargs)
        if isinstance(calls, AttentionCalls):
            calls.finish()
        return result

    if is_stage:
        cast(Any, forward).__signature__ = signature(original)
    names = {"__module__": cls.__module__, "__qualname__": cls.__qualname__}
    return type(cls.__name__, (AdoptedModule, cls), {**names, "forward": forward})


def _flex_attention(module: nn.Module) -> AbstractContextManager[None]:
    """Where a module may call `flex_attention`."""
    first = module._modules.get(site_name(0))
    is_flex = isinstance(first, AdoptedAttention) and first.site.is_flex
    return without_compiler() if is_flex else nullcontext()


def _new(cls: type[nn.Module], is_stage: bool) -> nn.Module:
    adopted = _adopted(cls, is_stage)
    return adopted.__new__(adopted)
