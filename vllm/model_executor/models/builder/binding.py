# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""Turning a module of training layers into one of engine layers, in place."""

import functools
from collections import defaultdict
from typing import TYPE_CHECKING, Any

from torch import nn

from vllm.model_executor.determinism.functions import torchs_functions
from vllm.model_executor.determinism.mode import is_batch_invariant
from vllm.model_executor.layers.training.attention import TrainableAttention
from vllm.model_executor.layers.training.base import TrainingLayer, runs_own_forward
from vllm.model_executor.layers.training.embedding import ParallelLMHead
from vllm.model_executor.models.builder.interface import is_adopted

if TYPE_CHECKING:
    from vllm.config import VllmConfig

TRAINING_LAYERS = "vllm.model_executor.layers.training."


def bind_engine_layers(
    module: nn.Module,
    vllm_config: "VllmConfig",
    prefix: str = "",
    *,
    head: str | None = None,
) -> None:
    """Put vLLM's layers in the place of training layers throughout `module`.

    Parallel linears and embeddings become vLLM's own (their parameters keep their
    names), and so do norms and gated activations outside batch-invariant mode;
    attention gets a KV cache under its module path. Attention that is
    already bound stays as it is, and so do a user's subclasses of other layers,
    which run their own forward. Parameters that were tied stay tied. In
    batch-invariant mode the kernels for the model's shapes are probed before.

    Args:
        module: Built inside an engine process; changed in place.
        vllm_config: The engine's config.
        prefix: Prepended to module paths in layer names.
        head: Path of the `ParallelLMHead` that vLLM's `LogitsProcessor` applies. Any
            other head stays callable, as a training layer.

    Raises:
        ValueError: One attention layer is used in two places, which would share
            one KV cache.
        BatchInvarianceError: A kernel's results depend on the batch on this machine,
            in batch-invariant mode.
    """
    if is_batch_invariant():
        from vllm.model_executor.layers.training.self_check import self_check_engine

        self_check_engine(module, vllm_config)
    tied = _tied_parameters(module)
    replacements: dict[int, nn.Module] = {}
    attention_paths: dict[int, str] = {}
    places = [
        (path, layer)
        for path, layer in module.named_modules(remove_duplicate=False)
        if isinstance(layer, TrainingLayer)
    ]
    for path, layer in places:
        name = f"{prefix}.{path}" if prefix else path
        # Every rank of the engine has all tokens.
        layer.sequence_parallel = False
        if isinstance(layer, TrainableAttention):
            if id(layer) in attention_paths:
                raise ValueError(
                    f"{attention_paths[id(layer)]!r} and {path!r} are one "
                    "TrainableAttention. Each place needs its own KV cache: create "
                    "one TrainableAttention per use (they hold no parameters)."
                )
            if layer.engine is not None:
                continue
            name = attention_layer_name(name, len(attention_paths))
            attention_paths[id(layer)] = path
        elif not _has_engine_layer(layer) or (
            isinstance(layer, ParallelLMHead) and path != head
        ):
            continue
        if id(layer) not in replacements:
            replacement = layer.bind_engine(vllm_config, name)
            copy_attributes(layer, replacement)
            replacements[id(layer)] = replacement
        if replacements[id(layer)] is not layer:
            module.set_submodule(path, replacements[id(layer)])
    if is_adopted(module) and is_batch_invariant():
        outside = functools.cache(_outside_functions)
        for replacement in replacements.values():
            if not isinstance(replacement, TrainingLayer):
                kind: Any = type(replacement)
                replacement.__class__ = outside(kind)
    for first, *others in tied:
        parameter = module.get_parameter(first)
        for other in others:
            parent, _, name = other.rpartition(".")
            setattr(module.get_submodule(parent), name, parameter)


def _outside_functions(kind: Any) -> Any:
    """A class of engine layers whose forward calls torch's own functions.

    Code of the model around it may call batch-invariant ones. An engine layer needs
    none, and torch.compile of torch 2.11 cannot read a vLLM parameter's attributes
    among them.
    """

    @functools.wraps(kind.forward)
    def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        with torchs_functions():
            return kind.forward(self, *args, **kwargs)

    names = {"__module__": kind.__module__, "__qualname__": kind.__qualname__}
    return type(kind.__name__, (kind,), {**names, "forward": forward})


def _has_engine_layer(layer: TrainingLayer) -> bool:
    """Whether it is of exactly one of the training layers' types, and unchanged."""
    is_ours = type(layer).__module__.startswith(TRAINING_LAYERS)
    return is_ours and not runs_own_forward(layer)


def copy_attributes(layer: nn.Module, replacement: nn.Module) -> None:
    """Give the replacement the public attributes of the layer that it lacks."""
    for name, value in vars(layer).items():
        if not name.startswith("_") and not hasattr(replacement, name):
            setattr(replacement, name, value)


def attention_layer_name(path: str, index: int) -> str:
    """The name of an attention layer's KV cache.

    vLLM reads the layer's index from the only number in the name. A path with one
    number is used as it is; in any other, numbers are attached to the word before
    them and `index` is appended.

    Args:
        path: The module's path, such as `model.layers.3.attn`.
        index: How many attention layers come before it.
    """
    parts = path.split(".")
    if sum(part.isdecimal() for part in parts) == 1:
        return path
    words: list[str] = []
    for part in parts:
        if part.isdecimal() and words:
            words[-1] += part
        else:
            words.append(f"m{part}" if part.isdecimal() else part)
    return ".".join([*words, str(index)])


def _tied_parameters(module: nn.Module) -> list[list[str]]:
    """Names of each parameter that stands in several places."""
    names = defaultdict(list)
    for name, parameter in module.named_parameters(remove_duplicate=False):
        names[id(parameter)].append(name)
    return [group for group in names.values() if len(group) > 1]
