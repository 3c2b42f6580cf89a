# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""What a module does to logits after its head.

Some models cap or scale the head's output, or cast it. The engine and `token_logprobs`
compute logits of chosen tokens, so they have to repeat that. A `Trace` finds it: in a
forward its `TracedLogits` stand for the head's output and record every op that is
applied to them. They have a shape and a dtype but no values, so nothing is computed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import nn
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    FakeTensorMode,
)
from torch.utils._pytree import tree_leaves, tree_map

from vllm.model_executor.determinism.mode import is_batch_invariant
from vllm.model_executor.determinism.pointwise import EXACT, on_whole_vectors

# Ops of one logit each that torch does not tag as such.
POINTWISE = (torch.ops.aten._to_copy.default,)
# Views that are not tagged as such.
VIEWS = (torch.ops.aten._unsafe_view.default, torch.ops.aten._reshape_alias.default)


class NoTailError(Exception):
    """What follows a head cannot be repeated; says why."""


class Value(NamedTuple):
    """The result of a step; number 0 is the head's output."""

    number: int


class Stored(NamedTuple):
    """A parameter or buffer of the module: its path."""

    path: str


class Step(NamedTuple):
    """One op; its tensors are `Value` or `Stored`."""

    op: torch._ops.OpOverload
    args: tuple[Any, ...]
    kwargs: dict[str, Any]


@dataclass(frozen=True, eq=False)
class Tail:
    """A function of each logit, as a list of ops of the module's own.

    It computes what the module computes, op by op, so results are bitwise identical. In
    batch-invariant mode rows do not depend on the batch. Parameters are looked up when
    it is called. Two tails are equal if they have the same steps.

    Attributes:
        module: Whose parameters and buffers are used.
        steps: In order; the last one gives the result. Empty: logits stay as they are.
    """

    module: nn.Module
    steps: tuple[Step, ...] = ()

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Tail) and self.steps == other.steps

    def __str__(self) -> str:
        return ", ".join(str(step.op) for step in self.steps) or "nothing"

    def __call__(self, logits: torch.Tensor) -> torch.Tensor:
        """Apply it.

        Args:
            logits: The head's output, shape = [..., vocab_size].

        Returns:
            The module's, in that shape.
        """
        values = {0: logits}
        last = {
            each.number: number
            for number, step in enumerate(self.steps)
            for each in _values(step)
        }
        for number, step in enumerate(self.steps):

            def given(each: Any) -> Any:
                return values[each.number] if type(each) is Value else each

            args, kwargs = _mapped(step, lambda x: self._stored(given(x)))
            values[number + 1] = _computed(step.op, args, kwargs)
            for each in _values(step):
                if last[each.number] == number:
                    values.pop(each.number, None)
        return values[len(self.steps)]

    def _stored(self, each: Any) -> Any:
        if type(each) is not Stored:
            return each
        path, _, name = each.path.rpartition(".")
        tensor = getattr(self.module.get_submodule(path), name)
        # A dim of one token in front would add a dim to logits of many.
        return tensor.flatten() if tensor.ndim > 1 else tensor


def _computed(op: torch._ops.OpOverload, args: tuple, kwargs: dict) -> torch.Tensor:
    """The result of an op; in batch-invariant mode its rows do not depend on others."""
    is_exact = op._schema.name.removeprefix("aten::") in EXACT and "alpha" not in kwargs
    if is_batch_invariant() and not is_exact and op not in POINTWISE:
        result = on_whole_vectors(op, args, kwargs)
        if result is not NotImplemented:
            return result
    return op(*args, **kwargs)


def _is_leaf(value: Any) -> bool:
    return type(value) in (Value, Stored)


def _values(step: Step) -> Iterator[Value]:
    for leaf in tree_leaves((step.args, step.kwargs), is_leaf=_is_leaf):
        if type(leaf) is Value:
            yield leaf


def _mapped(step: Step, function: Callable[[Any], Any]) -> tuple[tuple, dict]:
    return tree_map(function, (step.args, step.kwargs), is_leaf=_is_leaf)


class _Cell:
    """What a piece of memory of logits holds now; views of all of it share the cell.

    Attributes:
        number: Of the step that computed it.
        whole: The cell of which this is a part, or that it orders otherwise.
    """

    def __init__(self, number: int, whole: _Cell | None = None) -> None:
        self.number = number
        self.whole = whole


class TracedLogits(torch.Tensor):
    """Logits without values that record what is done to them."""

    recorder: Trace
    fake: torch.Tensor
    cell: _Cell

    @staticmethod
    def __new__(cls, trace: Trace, fake: torch.Tensor, cell: _Cell) -> TracedLogits:
        traced = torch.Tensor._make_wrapper_subclass(
            cls,
            fake.shape,
            strides=fake.stride(),
            storage_offset=fake.storage_offset(),
            dtype=fake.dtype,
            device=fake.device,
        )
        traced.recorder, traced.fake, traced.cell = trace, fake, cell
        return traced

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]
        return f"TracedLogits(shape={tuple(self.shape)}, dtype={self.dtype})"

    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, op: Any, types: Any, args: tuple = (), kwargs: dict | None = None
    ) -> Any:
        leaves = tree_leaves((args, kwargs))
        traced = next(leaf for leaf in leaves if isinstance(leaf, TracedLogits))
        return traced.recorder.record(op, args, kwargs or {})


class Trace:
    """Records what a forward does to the output of its head.

    Args:
        module: Whose forward it is.
        hidden_states: What the head was called with.
        slices: How many rows of logits it makes of a row of hidden states.
        vocab_size: How many logits are in a row.
        dtype: Of the logits.

    """

    def __init__(
        self,
        module: nn.Module,
        hidden_states: torch.Tensor,
        slices: int,
        vocab_size: int,
        dtype: torch.dtype,
    ) -> None:
        self.module = module
        self.hidden_states = hidden_states
        self.vocab_size = vocab_size
        self.steps: list[Step] = []
        self.problems: dict[int, str] = {}
        self.fake_mode = FakeTensorMode(allow_non_fake_inputs=True)
        shape = [*hidden_states.shape[:-1], vocab_size]
        if slices > 1:
            shape[-2] *= slices
        with self.fake_mode:
            self.fake = torch.empty(shape, dtype=dtype, device=hidden_states.device)

    def logits(self) -> TracedLogits:
        """What stands for the head's output.

        The trace does not refer to it, so hidden states are freed without a garbage
        collection.
        """
        return TracedLogits(self, self.fake, _Cell(0))

    def tail(self, output: TracedLogits) -> Tail:
        """What turns the head's output into what forward has returned.

        Raises:
            NoTailError: It is not a function of each logit.
        """
        needed = {output.cell.number}
        for number in range(output.cell.number, 0, -1):
            if number not in needed:
                continue
            if number in self.problems:
                raise NoTailError(self.problems[number])
            needed |= {each.number for each in _values(self.steps[number - 1])}
        order = sorted(needed | {0})
        renamed = {number: Value(place) for place, number in enumerate(order)}

        def rename(each: Any) -> Any:
            return renamed[each.number] if type(each) is Value else each

        steps = [self.steps[number - 1] for number in order[1:]]
        return Tail(
            self.module,
            tuple(Step(step.op, *_mapped(step, rename)) for step in steps),
        )

    def record(self, op: Any, args: tuple, kwargs: dict) -> Any:
        """Note an op that logits are given to; its result has no values either.

        Raises:
            NoTailError: It reads values.
        """
        for leaf in tree_leaves((args, kwargs)):
            if isinstance(leaf, TracedLogits) and leaf.recorder is not self:
                raise NoTailError(f"{op} joins those of two calls of the head")
        if not isinstance(op, torch._ops.OpOverload):
            raise NoTailError(f"{op} is not an op of each logit")
        # Inference mode does not take composite ops apart.
        parts = op.decompose(*args, **kwargs)
        if parts is not NotImplemented:
            return parts
        result = self._computed(op, args, kwargs)
        first = args[0] if args else None
        if op._schema.is_mutable:
            return self._record_in_place(op, args, kwargs, result)
        if isinstance(first, TracedLogits) and self._is_view(op, first, result):
            return TracedLogits(self, result, first.cell)
        number = self._add(op, args, kwargs, result)
        is_part = isinstance(first, TracedLogits) and op.is_view
        whole = first.cell if is_part else None  # type: ignore[union-attr]

        def traced(each: Any) -> Any:
            if not isinstance(each, torch.Tensor):
                return each
            return TracedLogits(self, each, _Cell(number, whole))

        return tree_map(traced, result)

    def _computed(self, op: Any, args: tuple, kwargs: dict) -> Any:
        """The result, without values."""

        def fake(each: Any) -> Any:
            return each.fake if isinstance(each, TracedLogits) else each

        try:
            with self.fake_mode:
                return op(*tree_map(fake, args), **tree_map(fake, kwargs))
        except (DataDependentOutputException, DynamicOutputShapeException) as error:
            raise NoTailError(f"{op} reads their values") from error

    def _is_view(self, op: Any, logits: TracedLogits, result: Any) -> bool:
        """Whether the result has the same logits in the same order."""
        return (
            (op.is_view or op in VIEWS)
            and isinstance(result, torch.Tensor)
            and result.numel() == logits.numel()
            and result.shape[-1:] == logits.shape[-1:]
            and result.is_contiguous()
        )

    def _record_in_place(self, op: Any, args: tuple, kwargs: dict, result: Any) -> Any:
        """Note an op that writes: what it writes to holds the result from now on."""
        target = args[0] if args else None
        name = op._schema.name.removeprefix("aten::")
        packet = getattr(torch.ops.aten, name.removesuffix("_"), None)
        pure = getattr(packet, op._overloadname, None)
        if isinstance(target, TracedLogits) and name.endswith("_") and pure:
            pointwise = torch.Tag.pointwise in pure.tags
            computed = self._computed(pure, args, kwargs) if pointwise else result
            target.cell.number = self._add(pure, args, kwargs, computed)
            if computed.dtype != target.dtype:
                target.cell.number = self._problem(op, "rounds its result")
            cell = target.cell.whole
            while cell is not None:
                cell.number = self._problem(op, "writes to a part of them")
                cell = cell.whole
            return target
        number = self._problem(op, "writes to a tensor")
        for leaf in tree_leaves((args, kwargs)):
            if isinstance(leaf, TracedLogits):
                leaf.cell.number = number

        def traced(each: Any) -> Any:
            if not isinstance(each, torch.Tensor):
                return each
            return TracedLogits(self, each, _Cell(number))

        return tree_map(traced, result)

    def _add(self, op: Any, args: tuple, kwargs: dict, result: Any) -> int:
        """Add a step.

        Returns:
            The number of its result.
        """
        problem = ""

        def named(each: Any) -> Any:
            nonlocal problem
            if isinstance(each, TracedLogits):
                if each.cell.whole is not None:
                    problem = f"{op} uses a part of them, or another order"
                return Value(each.cell.number)
            if isinstance(each, torch.Tensor):
                each = self._named(each)
                if each is None:
                    problem = (
                        f"{op} uses a tensor of forward's that is no parameter and no "
                        "buffer with one number, or one for each token of the "
                        "vocabulary"
                    )
            return each

        args, kwargs = tree_map(named, (args, kwargs))
        if torch.Tag.pointwise not in op.tags and op not in POINTWISE:
            problem = f"{op} is not a function of each logit"
        elif (
            not isinstance(result, torch.Tensor)
            or result.numel() != self.fake.numel()
            or result.shape[-1] != self.vocab_size
            or result.device != self.fake.device
        ):
            problem = f"{op} gives another shape or device"
        self.steps.append(Step(op, args, kwargs))
        if problem:
            self.problems[len(self.steps)] = problem
        return len(self.steps)

    def _problem(self, op: Any, what: str) -> int:
        self.steps.append(Step(op, (), {}))
        self.problems[len(self.steps)] = f"{op} {what}"
        return len(self.steps)

    def _named(self, tensor: torch.Tensor) -> Stored | None:
        """The parameter or buffer that it is, if it is the same for each token."""
        if tensor.ndim and tensor.shape[-1] != tensor.numel():
            return None
        if tensor.numel() not in (1, self.vocab_size):
            return None
        stored = (
            *self.module.named_parameters(remove_duplicate=False),
            *self.module.named_buffers(remove_duplicate=False),
        )
        return next((Stored(path) for path, each in stored if each is tensor), None)
