# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""Attention that a module writes out: softmax(f(q @ k^T) + mask) @ v.

The product of queries and keys gives a stand-in for the scores, which has their shape
and no values. What is applied to it is noted, until it is multiplied with the values;
then attention is computed. f is found by calling it on numbers: a scale, and after it
maybe a soft cap.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.utils._pytree import tree_leaves, tree_map

from vllm.model_executor.models.builder.adopt.masks import (
    HIDDEN,
    NOT_CAUSAL,
    causal,
    window_of,
)

# Functions by torch's names: of one score, with what they compute; those that keep its
# value; and those that only read sizes.
_ELEMENTWISE = {
    **dict.fromkeys(("mul", "mul_", "multiply", "multiply_"), "mul"),
    **dict.fromkeys(("div", "div_", "divide", "divide_", "true_divide"), "div"),
    **dict.fromkeys(("tanh", "tanh_"), "tanh"),
}
_CASTS = ("to", "float", "half", "bfloat16", "type", "type_as", "contiguous")
_SIZES = ("__get__", "size", "dim", "numel", "stride", "is_floating_point")


def _name_of(func: Any) -> str:
    return getattr(func, "__name__", "")


def starts(func: Any, args: Sequence[Any]) -> bool:
    """Whether a call may be the product of queries and keys, going by its form."""
    return (
        _name_of(func) == "matmul"
        and len(args) == 2
        and all(isinstance(arg, torch.Tensor) and arg.ndim == 4 for arg in args)
        and args[0].shape[3] == args[1].shape[2]
    )


class _Mask:
    """A mask, and the number that hides a score."""

    def __init__(self, mask: Any, number: Any = None) -> None:
        self.mask, self.number = mask, number

    def __call__(self) -> tuple[torch.Tensor, Any]:
        """What is visible, and whether it says nothing else."""
        raise NotImplementedError

    def _hides(self) -> Any:
        hides = self.number <= HIDDEN
        return hides.all() if isinstance(hides, torch.Tensor) else hides


class _Added(_Mask):
    def __call__(self) -> tuple[torch.Tensor, Any]:
        hidden = self.mask <= HIDDEN
        return ~hidden, (hidden | (self.mask == 0)).all()


class _Hidden(_Mask):
    def __call__(self) -> tuple[torch.Tensor, Any]:
        return ~self.mask, self._hides()


class _Visible(_Mask):
    def __call__(self) -> tuple[torch.Tensor, Any]:
        return self.mask, self._hides()


class Scores:
    """The scores of a call, while they are computed.

    Args:
        query: shape = [batch, num_heads, seq, head_size].
        key: Transposed, shape = [batch, num_heads, head_size, seq].
        value_of: Gives the values of a mask, or None where they are not known.

    Attributes:
        stand_in: Stands for the scores.
        functions: What was applied to each score: names, and numbers.
        is_multiplied: Whether they were multiplied with the values.
        is_known: Whether the values of all masks are known.
    """

    def __init__(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value_of: Callable[[torch.Tensor], torch.Tensor | None],
    ) -> None:
        self.query, self.key = query, key.transpose(2, 3)
        shape = (*query.shape[:3], key.shape[3])
        self.stand_in = query.detach().new_zeros(()).expand(shape)
        self.functions: list[tuple[str, tuple[float, ...]]] = []
        self.is_multiplied = False
        self._value_of = value_of
        self._has_mask = self._is_softmax = False
        self._masks: list[_Mask] = []
        self.is_known = True

    def are_in(self, args: Any) -> bool:
        """Whether these scores are among a call's arguments."""
        return any(arg is self.stand_in for arg in tree_leaves(args))

    def are_multiplied(self, func: Any, args: Sequence[Any]) -> bool:
        """Whether a call is the product with the values."""
        self.is_multiplied |= (
            _name_of(func) == "matmul"
            and len(args) == 2
            and args[0] is self.stand_in
            and self._is_softmax
        )
        return self.is_multiplied

    def apply(self, func: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
        """Note a call.

        Returns:
            The stand-in, or what is not a tensor.

        Raises:
            ValueError: Attention has no such function of the scores.
        """
        name = _name_of(func)
        if name in _SIZES:
            result = func(*args, **kwargs)
            if not isinstance(result, torch.Tensor):
                return result
        others = [arg for arg in args if arg is not self.stand_in]
        is_score = not (self._has_mask or self._is_softmax)
        computes = _ELEMENTWISE.get(name)
        if name in _CASTS:
            if not (args and args[0] is self.stand_in):
                return self._cast(func, args, kwargs)
        elif computes and is_score and _is_of_one_score(computes, args) and not kwargs:
            self.functions.append((computes, tuple(float(each) for each in others)))
        elif name == "softmax" and not self._is_softmax:
            self._softmax(*args, **kwargs)
        elif name == "dropout":
            _check_dropout(*args, **kwargs)
        elif not self._is_softmax and not kwargs and self._mask(name, args, others):
            self._has_mask = True
        else:
            raise ValueError(
                f"attention that is written out applies {name!r} to its scores. Known "
                "are a scale, a soft cap, a mask, softmax over the keys and dropout, "
                "in this order. Call scaled_dot_product_attention or flex_attention."
            )
        return self.stand_in

    def _cast(self, func: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
        """Cast another tensor, such as a mask, to what the scores are."""
        given = (tuple(args), kwargs)
        args, kwargs = tree_map(
            lambda each: self.query if each is self.stand_in else each, given
        )
        return func(*args, **kwargs)

    def _softmax(
        self, input: torch.Tensor, dim: int | None = None, *_: Any, **__: Any
    ) -> None:
        if dim not in (-1, 3):
            raise ValueError(f"the softmax of attention is over dim {dim}, not -1.")
        self._is_softmax = True

    def _mask(self, name: str, args: Sequence[Any], others: list[Any]) -> bool:
        """Note a mask; False: it is something else."""
        if name in ("add", "add_") and len(args) == 2:
            self._note(_Added, others)
            return isinstance(others[0], torch.Tensor)
        if len(others) != 2:
            return False
        if name in ("masked_fill", "masked_fill_"):
            self._note(_Hidden, others)
            return True
        if name != "where":
            return False
        is_hidden = args[2] is self.stand_in
        self._note(_Hidden if is_hidden else _Visible, others)
        return True

    def _note(self, kind: type[_Mask], given: list[Any]) -> None:
        known = [
            self._value_of(each) if isinstance(each, torch.Tensor) else each
            for each in given
        ]
        if all(each is not None for each in known):
            self._masks.append(kind(*known))
        else:
            self.is_known = False

    def window(self) -> int | None:
        """The window of the mask; None: there is none, or it is not known.

        Raises:
            ValueError: It is no causal mask.
        """
        if not self._has_mask:
            raise ValueError(
                "attention that is written out has no mask. The engine keeps keys and "
                "values of the past only; bidirectional attention cannot be served."
            )
        if not self.is_known:
            return None
        seq = self.stand_in.shape[-1]
        seen, is_valid = self._seen(torch.ones(seq, seq, dtype=torch.bool))
        if not is_valid:
            raise ValueError(NOT_CAUSAL)
        return window_of(seen)

    def check(self, window: int | None) -> None:
        """Raise unless the mask is causal within a window."""
        expected = causal(self.stand_in.shape[-1], window, self.query.device)
        seen, is_valid = self._seen(torch.ones_like(expected))
        # Inductor has no comparison of the truth values of places.
        is_causal = is_valid & ((seen ^ expected).sum() == 0)
        if torch.compiler.is_compiling():
            torch._assert_async(is_causal, NOT_CAUSAL)
        elif not is_causal:
            raise ValueError(NOT_CAUSAL)

    def _seen(self, seen: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """What all masks leave visible, and whether they say nothing else."""
        is_valid = seen.any()
        for mask in self._masks:
            visible, valid = mask()
            seen, is_valid = seen & visible, is_valid & valid
        return seen, is_valid


def _is_of_one_score(name: str, args: Sequence[Any]) -> bool:
    """Whether a function is called with a score and numbers."""
    if name == "tanh":
        return True
    pair = args if name == "div" or isinstance(args[0], torch.Tensor) else args[::-1]
    return len(pair) == 2 and isinstance(pair[1], int | float)


def _check_dropout(
    input: torch.Tensor, p: float = 0.5, training: bool = True, inplace: bool = False
) -> None:
    if p and training:
        raise ValueError(
            f"attention is computed with dropout of {p}; no kernel has dropout. Set it "
            "to 0 while training too."
        )


def scale_and_cap(
    functions: Sequence[tuple[str, tuple[float, ...]]],
) -> tuple[float, float | None]:
    """The scale and the soft cap that functions of each score compute.

    Raises:
        ValueError: They compute something else.
    """
    scores = torch.linspace(-200, 200, 401, dtype=torch.float64)
    ends = torch.tensor([1e-9, 1e15], dtype=torch.float64)
    start, end = _computed(functions, ends).tolist()
    slope = start / 1e-9
    cap = None if abs(end - slope * 1e15) <= 1e-6 * abs(end) else end
    expected = slope * scores
    if cap is not None:
        expected = cap * torch.tanh(expected / cap)
    if not torch.allclose(_computed(functions, scores), expected, 1e-6, 1e-9):
        raise ValueError(
            "attention that is written out computes a function of its scores that is "
            "neither a scale nor a scale and a soft cap, cap * tanh(score / cap)."
        )
    return slope, cap


def _computed(
    functions: Sequence[tuple[str, tuple[float, ...]]], x: torch.Tensor
) -> torch.Tensor:
    for name, numbers in functions:
        if name == "tanh":
            x = x.tanh()
        elif name == "mul":
            x = x * numbers[0]
        else:
            x = x / numbers[0]
    return x
