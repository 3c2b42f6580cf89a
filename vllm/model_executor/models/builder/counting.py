# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""Modules whose forward counts its tokens, in place of taking positions.

Such a forward calls `torch.arange(num_tokens)`, or takes the first rows of a table:
`cos[:num_tokens]`. That is right for a sequence from its beginning, which a trainer
passes. An engine passes tokens of many requests, each with a position of its own.

`CountingRecorder` notes such calls in forwards of two numbers of tokens; `compare`
keeps those whose length is that number. `GivenPositions` gives them the positions:
`positions` where the module counts, and `cos[positions]` where it takes rows.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch.overrides import TorchFunctionMode

# A call of arange: the number of its positional arguments, and names of the others.
RangeCall = tuple[int, tuple[str, ...]]
# The shape of a table, and the dim with a row for each position.
TableCall = tuple[tuple[int, ...], int]


class Counting(NamedTuple):
    """The calls of torch by which a forward counts its tokens.

    Attributes:
        ranges: Calls of `torch.arange`.
        tables: Calls that take the first rows of a tensor.
    """

    ranges: frozenset[RangeCall]
    tables: frozenset[TableCall]


class _Rows(NamedTuple):
    """A call that takes the first rows of a table.

    Attributes:
        table: The table.
        dim: Its rows' dim.
        length: How many rows are taken.
        index: What else the call indexes the table with, the rows left as they are.
    """

    table: torch.Tensor
    dim: int
    length: int
    index: Any

    @property
    def call(self) -> TableCall:
        return tuple(self.table.shape), self.dim


class _Range(NamedTuple):
    """A call of `torch.arange` that begins at 0.

    Attributes:
        length: How many numbers there are.
        call: Its form.
        dtype: None: that of `length`.
        device: None: torch's default.
    """

    length: int
    call: RangeCall
    dtype: torch.dtype | None
    device: torch.device | None


def _read(func: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
    """A call that may count, as `_Range` or `_Rows`; None: it is none."""
    name = getattr(func, "__name__", "")
    if name == "arange":
        return _read_range(args, kwargs)
    if name == "__getitem__":
        return _read_index(*args)
    if name == "narrow":
        return _read_narrow(*args, **kwargs)
    return None


def _read_range(args: Sequence[Any], kwargs: dict[str, Any]) -> _Range | None:
    numbers = list(args)
    if len(numbers) == 1:
        numbers.insert(0, 0)
    start = numbers[0] if numbers else kwargs.get("start", 0)
    end = numbers[1] if len(numbers) > 1 else kwargs.get("end")
    step = numbers[2] if len(numbers) > 2 else kwargs.get("step", 1)
    if not (_is(start, 0) and _is(step, 1)) or isinstance(end, float | None):
        return None
    if "out" in kwargs:
        return None
    call = len(args), tuple(sorted(kwargs))
    return _Range(end, call, kwargs.get("dtype"), kwargs.get("device"))


def _read_index(table: Any, index: Any) -> _Rows | None:
    """`table[:length]`, with whole dims, new dims and numbers beside it."""
    if not isinstance(table, torch.Tensor):
        return None
    parts = list(index) if isinstance(index, tuple) else [index]
    if not all(part is ... or isinstance(part, slice | int | None) for part in parts):
        return None
    taken = [
        place
        for place, part in enumerate(parts)
        if isinstance(part, slice) and (part.start, part.stop) != (None, None)
    ]
    if len(taken) != 1:
        return None
    part = parts[taken[0]]
    if not (part.start is None or _is(part.start, 0)) or part.stop is None:
        return None
    if not (part.step is None or _is(part.step, 1)):
        return None
    dim = sum(each is not None for each in parts[: taken[0]])
    if ... in parts[: taken[0]]:
        dim = table.ndim - sum(each is not None for each in parts[taken[0] :])
    parts[taken[0]] = slice(None)
    return _Rows(table, dim, part.stop, tuple(parts))


def _read_narrow(
    input: torch.Tensor, dim: int, start: Any, length: int
) -> _Rows | None:
    return _Rows(input, dim % input.ndim, length, ...) if _is(start, 0) else None


def _is(number: Any, value: int) -> bool:
    return isinstance(number, int) and number == value


class GivenPositions(TorchFunctionMode):
    """Gives a forward positions where it counts.

    Args:
        counting: How it counts.
        positions: Of its tokens, shape = [num_tokens].
    """

    def __init__(self, counting: Counting, positions: torch.Tensor) -> None:
        super().__init__()
        self.counting, self.positions = counting, positions

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        found = _read(func, args, kwargs)
        if isinstance(found, _Range) and found.call in self.counting.ranges:
            self._check(found.length)
            # A copy, which the module may change.
            dtype = found.dtype or self.positions.dtype
            return self.positions.to(found.device, dtype, copy=True)
        if isinstance(found, _Rows) and found.call in self.counting.tables:
            self._check(found.length)
            places = self.positions.to(found.table.device)
            return found.table.index_select(found.dim, places)[found.index]
        if getattr(func, "__name__", "") == "unflatten":
            return torch.unflatten(*args, **kwargs)  # Dynamo cannot call the method
        return func(*args, **kwargs)

    def _check(self, length: int) -> None:
        num_tokens = self.positions.shape[0]
        if not torch.compiler.is_compiling() and length != num_tokens:
            raise ValueError(
                f"forward counts to {length}, and to the number of tokens, "
                f"{num_tokens}, when the model was adopted. Each forward has to count "
                "alike; or give it a parameter `positions`."
            )


class CountingRecorder(TorchFunctionMode):
    """Notes how far the calls of a forward count.

    Args:
        num_tokens: The number of tokens of the forward.
    """

    def __init__(self, num_tokens: int) -> None:
        super().__init__()
        self.num_tokens = num_tokens
        self.ranges: dict[RangeCall, set[int]] = {}
        self.tables: dict[TableCall, set[int]] = {}

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        found = _read(func, args, kwargs)
        if isinstance(found, _Range):
            self.ranges.setdefault(found.call, set()).add(found.length)
        if isinstance(found, _Rows) and found.table.shape[found.dim] != found.length:
            self.tables.setdefault(found.call, set()).add(found.length)
        return func(*args, **kwargs)


def compare(first: CountingRecorder, second: CountingRecorder) -> Counting | None:
    """How a forward counts, from two of different numbers of tokens.

    A call that counts to the number of tokens and one of the same form that counts to
    another number cannot be told apart, so both are left alone. The check at the
    engine's start refuses what then is not given positions.

    Returns:
        None if it does not count.
    """
    lengths = first.num_tokens, second.num_tokens
    ranges = _counting(first.ranges, second.ranges, *lengths)
    tables = _counting(first.tables, second.tables, *lengths)
    return Counting(ranges, tables) if ranges or tables else None


def _counting(
    first: dict[Any, set[int]], second: dict[Any, set[int]], *lengths: int
) -> frozenset[Any]:
    """The calls that have the first length in one forward, the second in the other."""
    expected = [{length} for length in lengths]
    return frozenset(c for c in first if [first[c], second.get(c)] == expected)
