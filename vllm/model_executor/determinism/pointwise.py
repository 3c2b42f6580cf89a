# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""Elementwise functions on CPU whose bits do not depend on where an element lies.

ATen computes a whole number of vectors at a time and the rest of each thread's part one
by one, by another formula for most functions. So here every thread's part is a whole
number of vectors: the tensor is made contiguous and padded, if it is not so already.
The results are those of torch's own kernels, and the gradients torch's own.

Correctly rounded operations (`EXACT`) need no such care: each has one right result. On
CUDA one kernel computes every element alike.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import is_traceable_wrapper_subclass


def names(text: str) -> frozenset[str]:
    """torch's own names of functions, of a text that lists them."""
    return frozenset(text.split())


EXACT = names(
    """
    _prelu_kernel abs add ceil clamp clamp_max clamp_min clip clone conj_physical
    copysign deg2rad div fill floor fmax fmin frac hardshrink hardtanh heaviside
    leaky_relu masked_fill max maximum min minimum mul nan_to_num neg nextafter positive
    rad2deg reciprocal relu relu6 round rsub sgn sign softshrink sqrt sub threshold
    true_divide trunc where
    """
)
_INEXACT = names(
    """
    acos acosh addcdiv addcmul arccos arccosh arcsin arcsinh arctan arctan2 arctanh asin
    asinh atan atan2 atanh celu cos cosh digamma elu erf erfc erfinv exp exp2 expm1
    float_power floor_divide fmod gelu hardsigmoid hardswish hypot i0 ldexp lerp lgamma
    log log10 log1p log2 log_sigmoid logaddexp logaddexp2 logit mish mvlgamma polygamma
    pow remainder rsqrt selu sigmoid silu sin sinc sinh softplus square tan tanh xlogy
    """
)
# Of torch.special and others with one form.
_INEXACT_TOO = names(
    """
    __rpow__ polar tanhshrink special_entr special_erfcx special_expit special_gammaln
    special_i0e special_i1 special_i1e special_log_ndtr special_ndtr special_ndtri
    special_psi special_xlog1py special_zeta
    """
)
# Elementwise functions that are not correctly rounded, in all their forms.
INEXACT = frozenset(
    [
        *_INEXACT,
        *_INEXACT_TOO,
        *(f"{name}_" for name in _INEXACT),
        *(f"special_{name}" for name in _INEXACT),
    ]
)
# Exact, unless numbers are complex or a summand has a factor.
SOMETIMES_EXACT = names(
    """
    add add_ div div_ divide divide_ mul mul_ multiply multiply_ rsub sub sub_ subtract
    subtract_ true_divide true_divide_
    """
)

# Two of the longest vectors, of 64 bytes, of the smallest floating-point dtype.
_LANES = 64
# ATen divides a loop among as many threads as get so many elements each.
_GRAIN = 32768
# But gelu, of more elements than these, among all threads.
_SERIAL_GELU = 20000 // _LANES * _LANES


def on_whole_vectors(
    func: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any]
) -> Any:
    """An elementwise function or op of torch, or an in-place form of one.

    Args:
        func: elementwise in all its tensors, which are broadcast.
        args: its positional arguments.
        kwargs: its other arguments, without `out`.

    Returns:
        What the function returns; NotImplemented if its arguments are not on CPU.
    """
    values = [*args, *kwargs.values()]
    tensors = [value for value in values if isinstance(value, torch.Tensor)]
    if not all(map(_is_on_cpu, tensors)):
        return NotImplemented
    # A tensor without dims has its own rule of type promotion, so it stays one.
    shaped = [t for t in tensors if t.ndim] or tensors
    shape = shaped[0].shape
    if any(t.shape != shape for t in shaped):
        shape = torch.broadcast_shapes(*(t.shape for t in shaped))
    size = shape.numel()
    length = _whole(size, _name(func))
    if length == size and all(t.shape == shape and t.is_contiguous() for t in shaped):
        return func(*args, **kwargs)
    order = _order_in_memory(shaped, shape)

    def flat(value: Any) -> Any:
        if not any(value is tensor for tensor in shaped):
            return value
        value = value.expand(shape).permute(order).reshape(-1)
        return value if length == size else F.pad(value, (0, length - size), value=1)

    result = func(*map(flat, args), **{name: flat(kwargs[name]) for name in kwargs})
    ordered = [shape[dim] for dim in order]
    back = sorted(range(len(order)), key=order.__getitem__)
    result = result[:size].view(ordered).permute(back)
    if _is_in_place(func, args, kwargs):
        return tensors[0].copy_(result)
    return result


def on_whole_vectors_if_inexact(
    func: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any]
) -> Any:
    """`on_whole_vectors`; NotImplemented if the result is rounded once.

    Nor is it called while torch.compile traces, which leaves complex numbers to torch.
    """
    if torch.compiler.is_compiling():
        return NotImplemented
    if "alpha" in kwargs:
        return on_whole_vectors(func, args, kwargs)
    for value in args:
        if isinstance(value, torch.Tensor) and value.is_complex():
            return on_whole_vectors(func, args, kwargs)
    return NotImplemented


def _name(func: Callable[..., Any]) -> str:
    """Without the overload of an op of the dispatcher."""
    return func.__name__.partition(".")[0]


def _whole(size: int, name: str) -> int:
    """The number of elements, of which every thread gets whole vectors."""
    threads = torch.get_num_threads()
    if name == "gelu":
        parts = threads if size > _SERIAL_GELU else 1
    else:
        parts = min(threads, max(1, -(-size // _GRAIN)))
    lanes = _LANES * parts
    return -(-size // lanes) * lanes


def _order_in_memory(tensors: list[torch.Tensor], shape: torch.Size) -> list[int]:
    """Dims by descending stride: torch's results have the strides of its inputs."""
    dims = list(range(len(shape)))
    whole = next((t for t in tensors if t.shape == shape), None)
    return dims if whole is None else sorted(dims, key=whole.stride, reverse=True)


def _is_on_cpu(tensor: torch.Tensor) -> bool:
    # Tensors of tensors, such as DTensors, have a layout of their own.
    return tensor.device.type == "cpu" and not is_traceable_wrapper_subclass(tensor)


def _is_in_place(
    func: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any]
) -> bool:
    # Of the functions below only an argument `inplace` is ever True.
    name = _name(func)
    named = name.endswith("_") and not name.endswith("__")
    return named or bool(kwargs.get("inplace")) or (bool(args) and args[-1] is True)
