# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""Watching the row of each token at every module of a model.

A row is what a tensor holds of one token: its slice along the only dim that has as many
elements as there are tokens. A tensor with no such dim, or several, is not watched.
"""

import math
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.distributed.tensor import DTensor
from torch.utils._pytree import tree_flatten, tree_unflatten

from vllm.model_executor import vllm_internals
from vllm.model_executor.layers.training.embedding import VocabParallelEmbedding
from vllm.model_executor.models.builder.tail import TracedLogits

# Integers are compared where they are looked up. Elsewhere they may count rows, as the
# places of tokens in an expert's queue do, without an effect on any result.
LOOKUPS = (nn.Embedding, VocabParallelEmbedding, vllm_internals.VocabParallelEmbedding)
# Products that a kernel may add up in another order for a row at another place.
MAX_PRODUCTS = 4096


class Place(NamedTuple):
    """Where a tensor was seen.

    Attributes:
        path: The module's.
        call: How often the module had been called before.
        side: "input" or "output".
        number: Which of the tensors on that side.
    """

    path: str
    call: int
    side: str
    number: int


@dataclass(frozen=True)
class Sight:
    """A tensor with a row for each token.

    Attributes:
        place: Where it was seen.
        module: Which received or returned it.
        owner: Path of the module whose own code made the tensor: that which returned
            it, or which called the one that receives it; None for the model's inputs.
        rows: The tensor with the tokens as its first dim.
    """

    place: Place
    module: nn.Module
    owner: str | None
    rows: torch.Tensor

    @property
    def is_compared(self) -> bool:
        if self.rows.is_floating_point():
            return True
        return self.place.side == "input" and isinstance(self.module, LOOKUPS)


# Sees a tensor and may return rows to go on with in place of it.
Visit = Callable[[Sight], torch.Tensor | None]


@contextmanager
def watching(module: nn.Module, num_tokens: int, visit: Visit) -> Iterator[list[str]]:
    """Call `visit` for every tensor of rows that enters or leaves a module.

    Yields:
        The paths of the modules that are running, outermost first; it changes while
        they run.
    """
    running: list[str] = []
    calls: Counter[str] = Counter()

    def look(
        values: Any, path: str, layer: nn.Module, side: str, owner: str | None
    ) -> tuple[Any, bool]:
        leaves, structure = tree_flatten(values)
        changed = False
        for number, leaf in enumerate(leaves):
            dim = token_dim(leaf, num_tokens)
            if dim is None:
                continue
            place = Place(path, calls[path], side, number)
            local = leaf.to_local() if isinstance(leaf, DTensor) else leaf
            rows = visit(Sight(place, layer, owner, local.movedim(dim, 0)))
            if rows is not None and not isinstance(leaf, DTensor):
                leaves[number] = rows.movedim(0, dim)
                changed = True
        return (tree_unflatten(leaves, structure) if changed else values), changed

    def hooks_of(path: str) -> tuple[Callable, Callable]:
        def before(layer: nn.Module, args: Any, kwargs: Any) -> Any:
            owner = running[-1] if running else None
            values, changed = look((args, kwargs), path, layer, "input", owner)
            running.append(path)
            return values if changed else None

        def after(layer: nn.Module, args: Any, output: Any) -> Any:
            running.pop()
            values, changed = look(output, path, layer, "output", path)
            calls[path] += 1
            return values if changed else None

        return before, after

    handles = []
    try:
        for path, layer in module.named_modules():
            before, after = hooks_of(path)
            handles += [
                layer.register_forward_pre_hook(before, prepend=True, with_kwargs=True),
                layer.register_forward_hook(after),
            ]
        yield running
    finally:
        for handle in handles:
            handle.remove()


def token_dim(value: Any, num_tokens: int) -> int | None:
    """The only dim of a tensor that has `num_tokens` elements."""
    if not isinstance(value, torch.Tensor) or isinstance(value, TracedLogits):
        return None
    dims = [dim for dim, size in enumerate(value.shape) if size == num_tokens]
    return dims[0] if len(dims) == 1 else None


@dataclass
class Recording:
    """What every module received and returned in one forward.

    Attributes:
        rows: Copies of the rows, by place.
    """

    rows: dict[Place, torch.Tensor] = field(default_factory=dict)

    def visit(self, sight: Sight) -> None:
        if sight.is_compared:
            self.rows[sight.place] = sight.rows.detach().clone()


@dataclass
class Comparison:
    """Compares the rows of a forward with those of a recorded one.

    Where rows differ, the recorded ones go on. So each module is judged by itself:
    whatever comes after it has the inputs that it had in the recorded forward.

    Args:
        recording: The forward to compare with.
        rows: Which rows have to be as recorded, shape = [rows].
        recorded: Which recorded row each of them has to equal, shape = [rows].
        poison: Whether all rows but those become NaN wherever a module returns them,
            which any arithmetic passes on, also a product with zero.

    Attributes:
        differing: Where rows differed by more than another order of a kernel's sums
            explains.
    """

    recording: Recording
    rows: torch.Tensor
    recorded: torch.Tensor
    poison: bool = False
    differing: list[Sight] = field(default_factory=list)

    def visit(self, sight: Sight) -> torch.Tensor | None:
        recorded = self.recording.rows.get(sight.place)
        if recorded is None or recorded.shape != sight.rows.shape:
            return None
        # What a model is given is another thing in each forward.
        result = None
        expected = recorded[self.recorded]
        if sight.owner is not None and not same(sight.rows[self.rows], expected):
            if not close(sight.rows[self.rows], expected):
                self.differing.append(sight)
            result = sight.rows.clone()
            result[self.rows] = expected
        if self.poison and sight.place.side == "output":
            kept = sight.rows[self.rows] if result is None else expected
            if kept.is_floating_point():
                result = torch.full_like(sight.rows, math.nan)
                result[self.rows] = kept
        return result


def same(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Whether all elements are equal; NaN equals NaN."""
    if torch.equal(a, b):
        return True
    return bool(torch.isclose(a, b, rtol=0, atol=0, equal_nan=True).all())


def close(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Whether each row differs by no more than another order of sums explains.

    A sum of K products in fp32 that is added up otherwise differs by at most K units in
    the last place of its largest partial sum; the result is rounded to its dtype, and a
    module may round a few times. Integers have to be equal.
    """
    if a.dtype != b.dtype or not a.is_floating_point():
        return a.dtype == b.dtype and bool((a == b).all())
    eps = MAX_PRODUCTS * torch.finfo(torch.float32).eps + 4 * torch.finfo(a.dtype).eps
    a, b = a.flatten(1).double(), b.flatten(1).double()
    finite = torch.isfinite(a) & torch.isfinite(b)
    scale = torch.where(finite, b.abs(), 0).amax(1, keepdim=True)
    within = (a - b).abs() <= eps * scale
    return bool((within | torch.isclose(a, b, rtol=0, atol=0, equal_nan=True)).all())
