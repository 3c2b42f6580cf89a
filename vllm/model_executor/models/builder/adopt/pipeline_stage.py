# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""Pipeline stages of adopted models.

transformers' models have a plan, `base_model_pp_plan`, which names a list of layers and
what comes before and after it. A stage keeps some of the layers under their own names.
The model's code runs as it is: a module of another stage returns what it is called
with, and the last one before this stage's layers returns what the stage before sent. So
what a model does to its embeddings, such as scaling them or adding positions, counts on
the first stage only.

That is right if the hidden states are all that layers get from the layers before. A
forward on fake tensors shows it: nothing that is computed from the embeddings may be
used after the hidden states have been received.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from vllm.model_executor.checkpoint.wrappers import join
from vllm.model_executor.models.builder.adopt.probing import (
    paths_in_errors,
    run_on_fake_tensors,
    running_modules,
)
from vllm.model_executor.models.builder.binding import copy_attributes
from vllm.model_executor.models.builder.pipeline import stage_bounds
from vllm.model_executor.parallel_context import ParallelContext

_STAGE = "pipeline_stage"
# Calls a function with token ids and positions.
_Call = Callable[..., Any]
# Of these the result has the shape and dtype of an argument, and no value.
_WITHOUT_VALUES = {
    *(torch.ops.aten.new_empty, torch.ops.aten.new_zeros, torch.ops.aten.new_ones),
    *(torch.ops.aten.new_full, torch.ops.aten.new_empty_strided),
    *(torch.ops.aten.empty_like, torch.ops.aten.zeros_like),
    *(torch.ops.aten.ones_like, torch.ops.aten.full_like),
}


class SkippedLayer(nn.Module):
    """In the place of a module of another stage: returns the hidden states.

    Args:
        module: Whose public attributes the model's code may read.
        in_tuple: Return them as the first of a tuple.

    Attributes:
        received: What it returns in place of its input, the next time it is called.
    """

    def __init__(self, module: nn.Module, in_tuple: bool = False) -> None:
        super().__init__()
        copy_attributes(module, self)
        self.in_tuple = in_tuple
        self.received: torch.Tensor | None = None

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        hidden_states = args[0] if args else kwargs["hidden_states"]
        if self.received is not None:
            hidden_states, self.received = self.received, None
        return (hidden_states,) if self.in_tuple else hidden_states


@dataclass(frozen=True)
class Stage:
    """What a pipeline stage of a model has, and how it is called.

    Attributes:
        skipped: What stands in the place of other stages' modules, by path.
        entry: Path of the last of them before this stage's layers; None on the first.
        body: Path of the module that gives hidden states; None on the last stage, where
            the whole model is called.
    """

    skipped: Mapping[str, SkippedLayer]
    entry: str | None = None
    body: str | None = None

    def holds(self, path: str) -> bool:
        """Whether the module or parameter of a path is on this stage."""
        return not any(f"{path}.".startswith(f"{other}.") for other in self.skipped)

    def apply(self, model: nn.Module) -> None:
        """Leave out what other stages have; in place."""
        for path, layer in self.skipped.items():
            model.set_submodule(path, layer)
        vars(model)[_STAGE] = self

    def call(
        self,
        model: nn.Module,
        forward: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        embeddings: torch.Tensor | None = None,
    ) -> Any:
        """Call the stage.

        Args:
            model: The model.
            forward: Its own forward, which takes token ids first.
            args: Its arguments.
            kwargs: Its arguments, and on later stages `hidden_states`.
            embeddings: What the model takes for its embeddings on later stages. None:
                the hidden states.

        Returns:
            What `forward` returns on the last stage, else hidden states, shape =
            [batch, seq, hidden_size].
        """
        received = kwargs.pop("hidden_states", None)
        if (received is None) != (self.entry is None):
            raise ValueError(
                f"{type(model).__name__} was called with hidden_states on the first "
                "pipeline stage."
                if self.entry is None
                else f"{type(model).__name__} was called without hidden_states. A "
                "later pipeline stage takes what the stage before returned."
            )
        if self.entry is not None:
            entry: Any = model.get_submodule(self.entry)
            entry.received = received
            args = (None, *args[1:]) if args else ()
            kwargs.pop("input_ids", None)
            kwargs["inputs_embeds"] = received if embeddings is None else embeddings
        if self.body is None:
            return forward(model, *args, **kwargs)
        return model.get_submodule(self.body)(*args, **kwargs)[0]


WHOLE = Stage({})
"""Of a model that is not cut."""


def stage_of(model: nn.Module) -> Stage | None:
    """The stage that a model was cut to; None: it was not."""
    stage: Stage | None = vars(model).get(_STAGE)
    return stage


def signature(forward: Callable[..., Any]) -> inspect.Signature:
    """A forward's, with the parameter `hidden_states`."""
    own = inspect.signature(forward)
    added = inspect.Parameter(
        "hidden_states", inspect.Parameter.KEYWORD_ONLY, default=None
    )
    parameters = list(own.parameters.values())
    variadic = [p for p in parameters if p.kind is inspect.Parameter.VAR_KEYWORD]
    others = [p for p in parameters if p not in variadic]
    return own.replace(parameters=[*others, added, *variadic])


def find_stage(
    model: Any,
    call: _Call,
    recorded: Callable[..., Any],
    head: str | None,
    context: ParallelContext,
) -> Stage:
    """What this rank's stage of a model has; the model stays as it is.

    Args:
        model: One of transformers' models.
        call: Calls a function of the model's arguments with token ids and positions.
        recorded: `transformers_attention.recorded`.
        head: Path of the head, if it is known.
        context: Of this rank.

    Raises:
        ValueError: The model cannot be cut, or has fewer layers than stages.
    """
    name = type(model).__name__
    body, layers, before, after = _plan(model)
    modules = [model.get_submodule(path) for path in layers]
    outputs = _LayerOutputs(name, modules)
    with recorded(model, lambda *_: None), outputs.installed():
        _run(model, functools.partial(call, model))
    outputs.check()

    start, end = stage_bounds(len(modules), context)
    skipped = {
        path: SkippedLayer(layer, outputs.in_tuple)
        for index, (path, layer) in enumerate(zip(layers, modules, strict=True))
        if not start <= index < end
    }
    if not context.is_last_stage:
        last = [*after, head] if head is not None else after
        skipped |= {path: SkippedLayer(model.get_submodule(path)) for path in last}
    stage = Stage(
        skipped,
        None if context.is_first_stage else layers[start - 1],
        None if context.is_last_stage else body,
    )
    with recorded(model, lambda *_: None), _put(model, skipped):
        called = _check(model, stage, call, modules[end - 1], outputs)
        unused = [] if context.is_first_stage else before
        unused = [path for path in unused if not _is_needed(model, path, called)]
    skipped |= {path: SkippedLayer(model.get_submodule(path)) for path in unused}
    return stage


def _is_needed(model: nn.Module, path: str, called: set[nn.Module]) -> bool:
    """Whether a stage calls a module, or another of its modules has its parameters."""
    module = model.get_submodule(path)
    own = {id(parameter) for parameter in module.parameters()}
    return module in called or any(
        id(parameter) in own
        for name, parameter in model.named_parameters(remove_duplicate=False)
        if not name.startswith(f"{path}.")
    )


def _plan(model: Any) -> tuple[str, list[str], list[str], list[str]]:
    """Paths of what gives hidden states, its layers, and what is before and after."""
    plan = getattr(getattr(model, "config", None), "base_model_pp_plan", None)
    if not plan:
        raise ValueError(
            f"{type(model).__name__} cannot be cut into pipeline stages: it has no "
            "base_model_pp_plan, as many of transformers' models have in their config. "
            "Use tensor_parallel_size, or build the stages with PipelineLayers."
        )
    body = model.base_model_prefix
    names = list(plan)
    paths = [join(body, name) for name in names]
    modules = dict(model.named_modules())
    if missing := [path for path in paths if path not in modules]:
        raise ValueError(
            f"base_model_pp_plan of {type(model).__name__} names {', '.join(names)}, "
            f"and it has no {', '.join(missing)}, so it cannot be cut into pipeline "
            "stages."
        )
    lists = [
        index
        for index, path in enumerate(paths)
        if isinstance(modules[path], nn.ModuleList)
    ]
    if len(lists) != 1:
        raise ValueError(
            f"base_model_pp_plan of {type(model).__name__} names {len(lists)} lists of "
            f"layers ({', '.join(names)}), and only one can be cut into stages."
        )
    (place,) = lists
    layers = [
        join(paths[place], name) for name, _ in modules[paths[place]].named_children()
    ]
    return body, layers, paths[:place], paths[place + 1 :]


def _run(model: nn.Module, call: Callable[[torch.Tensor, torch.Tensor], Any]) -> None:
    paths = {module: path for path, module in model.named_modules()}
    with running_modules() as running, paths_in_errors(running, paths):
        run_on_fake_tensors(model, call)


class _LayerOutputs:
    """How the layers of a model are called, and what they return.

    Attributes:
        in_tuple: The hidden states are the first of a tuple.
        shape: Of the hidden states.
        dtype: Of the hidden states.
    """

    def __init__(self, model: str, layers: list[nn.Module]) -> None:
        self.model, self.layers = model, layers
        self.order: list[int] = []
        self.forms: set[bool] = set()
        self.shape, self.dtype = torch.Size(), torch.float32

    @contextmanager
    def installed(self) -> Iterator[None]:
        handles = [
            layer.register_forward_hook(functools.partial(self._record, index))
            for index, layer in enumerate(self.layers)
        ]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _record(self, index: int, layer: nn.Module, args: Any, output: Any) -> None:
        self.order.append(index)
        in_tuple = isinstance(output, tuple)
        tensors = [x for x in tree_leaves(output) if isinstance(x, torch.Tensor)]
        first = output[0] if in_tuple and output else output
        if len(tensors) != 1 or first is not tensors[0]:
            raise ValueError(
                f"layer {index} ({type(layer).__name__}) returns {len(tensors)} "
                "tensors. A pipeline stage sends one, the hidden states."
            )
        self.forms.add(in_tuple)
        self.shape, self.dtype = first.shape, first.dtype

    @property
    def in_tuple(self) -> bool:
        return True in self.forms

    def check(self) -> None:
        """Refuse layers that are not called one after another."""
        if self.order != list(range(len(self.layers))) or len(self.forms) != 1:
            raise ValueError(
                f"{self.model} cannot be cut into pipeline stages: it calls its "
                f"{len(self.layers)} layers in the order {self.order}. Each has to be "
                "called once, one after another."
            )


@contextmanager
def _put(model: nn.Module, skipped: Mapping[str, nn.Module]) -> Iterator[None]:
    """Modules in the place of others inside."""
    before = {path: model.get_submodule(path) for path in skipped}
    try:
        for path, module in skipped.items():
            model.set_submodule(path, module)
        yield
    finally:
        for path, module in before.items():
            model.set_submodule(path, module)


def _check(
    model: nn.Module,
    stage: Stage,
    call: _Call,
    last: nn.Module,
    outputs: _LayerOutputs,
) -> set[nn.Module]:
    """Refuse a stage that needs more than hidden states, or gives something else.

    Args:
        model: With the modules of other stages left out.
        stage: This stage.
        call: Calls a function with token ids and positions.
        last: This stage's last layer.
        outputs: What layers return.

    Returns:
        The modules that it calls.
    """
    called: set[nn.Module] = set()
    returned: list[Any] = []

    def note(module: nn.Module, args: Any, output: Any) -> None:
        returned.append(output[0] if outputs.in_tuple else output)

    def run(input_ids: torch.Tensor, positions: torch.Tensor) -> None:
        embeddings = torch.empty(outputs.shape, dtype=outputs.dtype)
        received = {}
        if stage.entry is not None:
            received["hidden_states"] = torch.empty_like(embeddings)

        def staged(*args: Any, **kwargs: Any) -> Any:
            forward = type(model).forward
            return stage.call(model, forward, args, kwargs | received, embeddings)

        with _FromEmbeddings(embeddings) as mode:
            if stage.entry is not None:
                entry = model.get_submodule(stage.entry)
                handles.append(entry.register_forward_hook(mode.receive))
            output = call(staged, input_ids, positions)
        if stage.body is not None and output is not returned[-1]:
            raise ValueError(
                f"{type(model).__name__} does something to what its layers return "
                "besides what base_model_pp_plan names, which later pipeline stages "
                "would not do."
            )

    handles = [last.register_forward_hook(note)]
    handles += [
        module.register_forward_pre_hook(lambda module, args: called.add(module))
        for module in model.modules()
    ]
    try:
        _run(model, run)
    finally:
        for handle in handles:
            handle.remove()
    return called


class _FromEmbeddings(TorchDispatchMode):
    """Refuses what is computed from a stage's embeddings after it has received.

    Args:
        embeddings: What the model takes for its embeddings.
    """

    def __init__(self, embeddings: torch.Tensor) -> None:
        super().__init__()
        # Storages, so that views count; tensors are kept, so that none is reused.
        self.kept = [embeddings]
        self.storages = {_storage(embeddings)}
        self.has_received = False

    def receive(self, module: nn.Module, args: Any, output: Any) -> None:
        """A hook of the module that returns what was received."""
        self.has_received = True

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        output = func(*args, **kwargs)
        if func.overloadpacket in _WITHOUT_VALUES:
            return output
        used = {_storage(x) for x in tree_leaves((args, kwargs)) if _is_tensor(x)}
        if used.isdisjoint(self.storages):
            return output
        if self.has_received:
            raise ValueError(
                f"uses what was computed from the embeddings, in {func}, behind the "
                "first layers. A pipeline stage receives hidden states only, so this "
                "model cannot be cut into stages."
            )
        for tensor in filter(_is_tensor, tree_leaves(output)):
            self.kept.append(tensor)
            self.storages.add(_storage(tensor))
        return output


def _is_tensor(value: Any) -> bool:
    return isinstance(value, torch.Tensor)


def _storage(tensor: torch.Tensor) -> int:
    return tensor.untyped_storage()._cdata
