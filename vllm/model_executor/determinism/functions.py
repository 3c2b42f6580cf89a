# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""Batch-invariant arithmetic for a model's own calls of torch.

A layer of `layers.training` runs ops whose rows do not depend on the batch. What a
model computes itself between its layers are torch's functions, many of which choose a
kernel or an order by the shape of the batch. Inside `batch_invariant_functions` torch's
products, reductions and elementwise functions give each token's row the same bits,
whatever other rows are in the batch. `row_independence` tells what a model calls of
which that is not known.

torch.compile traces through it. A compiler's own loops for elementwise functions have
other bits than eager torch.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from torch.overrides import (
    TorchFunctionMode,
    _get_current_function_mode_stack,
    _pop_mode,
    _push_mode,
)

from vllm.model_executor.determinism import elementwise, pointwise, products, reductions
from vllm.model_executor.determinism.mode import is_batch_invariant

# Takes a function of torch and its arguments; NotImplemented: torch's own is right.
Replacement = Callable[[Callable[..., Any], Sequence[Any], Mapping[str, Any]], Any]

# By torch's own name for a function, which its forms (method, function) share. Each
# has the arguments of torch's.
_FUNCTIONS: dict[str, Callable[..., Any]] = {
    "_grouped_mm": products.grouped_mm,
    "__rmatmul__": products.rmatmul,
    "addmm": products.addmm,
    "addmv": products.addmv,
    "baddbmm": products.baddbmm,
    "bilinear": products.bilinear,
    "bmm": products.mm,
    "dot": products.dot,
    "einsum": products.einsum,
    "inner": products.inner,
    "linalg_matmul": products.matmul,
    "linear": products.linear,
    "matmul": products.matmul,
    "mm": products.mm,
    "mv": products.mv,
    "cosine_similarity": reductions.cosine_similarity,
    "cumsum": reductions.cumsum,
    "group_norm": reductions.group_norm,
    "linalg_norm": reductions.linalg_norm,
    "linalg_vector_norm": reductions.vector_norm,
    "log_softmax": reductions.log_softmax,
    "logsumexp": reductions.logsumexp,
    "mean": reductions.mean,
    "norm": reductions.norm,
    "normalize": reductions.normalize,
    "rms_norm": reductions.rms_norm,
    "softmax": reductions.softmax,
    "softmin": reductions.softmin,
    "special_log_softmax": reductions.log_softmax,
    "special_logsumexp": reductions.logsumexp,
    "special_softmax": reductions.softmax,
    "std": reductions.std,
    "std_mean": reductions.std_mean,
    "sum": reductions.sum_,
    "var": reductions.var,
    "var_mean": reductions.var_mean,
    "glu": elementwise.glu,
}
# numpy's names, which torch takes too.
_NAMES = {"axis": "dim", "keepdims": "keepdim"}


class BatchInvariantFunctions(TorchFunctionMode):
    """Replaces torch's functions whose rows may depend on the batch."""

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        result = replaced(func, args, kwargs)
        return func(*args, **kwargs) if result is NotImplemented else result


def batch_invariant_functions() -> AbstractContextManager[Any]:
    """Make torch's functions batch-invariant inside this context, on this thread.

    Nothing is entered outside of batch-invariant mode, and where the context is active
    already. Functions that only copy, compare or round correctly stay torch's own, as
    do functions of which nothing is known.
    """
    if not is_batch_invariant() or _is_active():
        return nullcontext()
    return BatchInvariantFunctions()


@contextmanager
def torchs_functions() -> Iterator[None]:
    """Leave `batch_invariant_functions` inside this context.

    For code that is batch-invariant without them. Modes that were entered after them
    are left as well.
    """
    left: list[TorchFunctionMode] = []
    while _is_active():
        left.append(_pop_mode())
    try:
        yield
    finally:
        for mode in reversed(left):
            _push_mode(mode)


def _is_active() -> bool:
    return any(
        isinstance(mode, BatchInvariantFunctions)
        for mode in _get_current_function_mode_stack()
    )


def replaced(
    func: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any]
) -> Any:
    """The batch-invariant result of a function of torch.

    Returns:
        NotImplemented if the function is not replaced for these arguments.

    Raises:
        NotImplementedError: a form of a product that has no batch-invariant kernel.
    """
    if torch.compiler.is_compiling():
        # To Dynamo a function is not always the same object.
        replacement = _BY_NAME.get(getattr(func, "__name__", ""))
    else:
        replacement = _BY_FUNCTION.get(func)
    if replacement is None:
        return NotImplemented
    if "out" not in kwargs:
        return replacement(func, args, kwargs)
    others = {name: value for name, value in kwargs.items() if name != "out"}
    result, out = replacement(func, args, others), kwargs["out"]
    if result is NotImplemented or out is None:
        return result
    if out.shape != result.shape:
        out.resize_(result.shape)
    return out.copy_(result)


def _called_as_torchs(function: Callable[..., Any]) -> Replacement:
    def replacement(
        func: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any]
    ) -> Any:
        names = {_NAMES.get(name, name): value for name, value in kwargs.items()}
        return function(*args, **names)

    return replacement


_BY_NAME: dict[str, Replacement] = {
    **{name: _called_as_torchs(function) for name, function in _FUNCTIONS.items()},
    **dict.fromkeys((*pointwise.INEXACT, "sqrt", "sqrt_"), elementwise.called),
    **dict.fromkeys(pointwise.SOMETIMES_EXACT, pointwise.on_whole_vectors_if_inexact),
}
_NAMESPACES = (
    torch,
    torch._C.TensorBase,
    torch.Tensor,
    torch._C._nn,
    F,
    torch.special,
    torch.linalg,
)
_BY_FUNCTION: dict[Callable[..., Any], Replacement] = {
    function: _BY_NAME[function.__name__]
    for namespace in _NAMESPACES
    for function in vars(namespace).values()
    if callable(function) and getattr(function, "__name__", None) in _BY_NAME
}
