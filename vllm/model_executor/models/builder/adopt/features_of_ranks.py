# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""Whether a function computes a number from features of several ranks.

Beside a forward on fake tensors, tensors with split features have three copies with
values: ones; NaN for the first rank's features; NaN for those of the others. What is
NaN in both of the latter, and not in the first, is computed from features of several
ranks, such as a mean of them. A rank has its own only, so its result would be another.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch.utils._python_dispatch import _disable_current_modes
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.weak import WeakIdKeyDictionary

_NEW = (
    torch.ops.aten.new_empty.default,
    torch.ops.aten.new_zeros.default,
    torch.ops.aten.empty_like.default,
    torch.ops.aten.zeros_like.default,
)


class FeaturesOfRanks:
    """Follows which rank's features numbers are computed from.

    A function that fails for the copies ends following its result.

    Args:
        tp_size: Number of ranks, more than one.
    """

    def __init__(self, tp_size: int) -> None:
        self.tp_size = tp_size
        self._copies = WeakIdKeyDictionary()

    def split(self, output: torch.Tensor, sizes: Sequence[int]) -> None:
        """Note the output of a layer.

        Args:
            output: shape = [..., sum of sizes].
            sizes: Features of each part of it, of which every rank has a slice.
        """
        with _with_values():
            is_first = torch.cat(
                [torch.arange(size) < size // self.tp_size for size in sizes]
            )
            ones = torch.ones(output.shape, dtype=output.dtype)
            copies = [ones.masked_fill(m, torch.nan) for m in (is_first, ~is_first)]
        self._copies[output] = [ones, *copies]

    def apply(self, func: Any, args: Any, kwargs: Any, output: Any) -> None:
        """Note what a function computed.

        Raises:
            ValueError: It uses features of several ranks for one number.
        """
        tensors = [x for x in tree_leaves((args, kwargs)) if _is_tensor(x)]
        followed = [x for x in tensors if x in self._copies]
        if not followed:
            return
        with _with_values():
            if func in _NEW:
                results = [_new(x, output.shape) for x in self._copies[followed[0]]]
            else:
                results = self._results(func, args, kwargs)
            if any(result is None for result in results):
                return
            for fake, *copies in zip(tree_leaves(output), *map(tree_leaves, results)):
                if not _is_tensor(fake) or copies[0].shape != fake.shape:
                    continue
                missing = [copy.isnan() for copy in copies]
                if bool((~missing[0] & missing[1] & missing[2]).any()):
                    raise ValueError(
                        f"calls {func} across features of which a rank has a part, so "
                        "each rank would compute it from its own part alone. Reshape "
                        "them to heads first if it is meant for each head, or gather "
                        "them with the tensor-parallel style 'colwise_gather_output'."
                    )
                self._copies[fake] = copies

    def _results(self, func: Any, args: Any, kwargs: Any) -> list[Any]:
        changes = func._schema.is_mutable
        results = []
        for index in range(3):

            def given(x: Any, index: int = index) -> Any:
                if not _is_tensor(x):
                    return x
                if x in self._copies:
                    return self._copies[x][index]
                # Whole tensors: a valid index, and any other number.
                value = 0 if x.dtype in _INTEGERS else 1
                number = torch.full((), value, dtype=x.dtype).expand(x.shape)
                return number.clone() if changes else number

            own_args, own_kwargs = tree_map(given, (args, kwargs))
            try:
                results.append(func(*own_args, **own_kwargs))
            except (RuntimeError, IndexError, ValueError):
                return [None]
        return results


_INTEGERS = (torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)


def _new(x: torch.Tensor, shape: torch.Size) -> torch.Tensor | None:
    """A copy of a new tensor that is filled in later, or of attention's result.

    Attention's result has the heads of its queries, before or after the tokens.
    """
    if x.ndim != 4 or len(shape) != 4:
        return x.clone() if x.shape == shape else None
    found = []
    for y, heads, tokens in ((x, 1, 2), (x.transpose(1, 2), 2, 1)):
        repeats, rest = divmod(shape[heads], y.shape[heads])
        if shape[0] == y.shape[0] and shape[tokens] == y.shape[tokens] and not rest:
            found.append((y, repeats, heads))
    if len(found) != 1:
        return None
    y, repeats, heads = found[0]
    y = y.repeat_interleave(repeats, heads)
    return y.clone() if y.shape == shape else y[..., :1].expand(shape).clone()


def _is_tensor(x: Any) -> bool:
    return isinstance(x, torch.Tensor)


@contextmanager
def _with_values() -> Iterator[None]:
    """Tensors that are made inside have values."""
    with _disable_current_modes(), torch._C.DisableTorchFunction(), torch.device("cpu"):
        yield
