# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""torch's reductions and what it builds on them, with sums by `row_sum`.

Each function has the arguments of torch's. 16-bit numbers are reduced in fp32 and the
result is rounded once. Integers, complex numbers and a few rare forms are left to
torch: then the result is NotImplemented.

Maxima, minima, sorting and counting are not here: their results do not depend on an
order.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from types import NotImplementedType
from typing import Any

import torch

from vllm.model_executor.determinism.elementwise import exp, log, sqrt
from vllm.model_executor.determinism.row_sum import row_sum
from vllm.model_executor.op_library import autocast_dtype

Dims = int | Sequence[int] | None
# A result, or NotImplemented.
Result = torch.Tensor | NotImplementedType


def sum_(
    input: torch.Tensor,
    dim: Dims = None,
    keepdim: bool = False,
    *,
    dtype: torch.dtype | None = None,
) -> Result:
    dtype = dtype or _autocast_to_fp32(input)
    if not dtype.is_floating_point:
        return NotImplemented
    return row_sum(input.to(dtype), _dims(dim), keepdim).to(dtype)


def mean(
    input: torch.Tensor,
    dim: Dims = None,
    keepdim: bool = False,
    *,
    dtype: torch.dtype | None = None,
) -> Result:
    dtype = dtype or input.dtype
    if not dtype.is_floating_point:
        return NotImplemented
    return _mean(input.to(dtype), _dims(dim), keepdim).to(dtype)


def softmax(
    input: torch.Tensor,
    dim: int | None = None,
    _stacklevel: Any = None,
    dtype: torch.dtype | None = None,
) -> Result:
    """exp(x - max) / sum of exp(x - max)."""
    return _softmax(input, dim, _stacklevel, dtype, _probabilities)


def log_softmax(
    input: torch.Tensor,
    dim: int | None = None,
    _stacklevel: Any = None,
    dtype: torch.dtype | None = None,
) -> Result:
    """x - max - log(sum of exp(x - max))."""
    return _softmax(input, dim, _stacklevel, dtype, _log_probabilities)


def softmin(
    input: torch.Tensor,
    dim: int | None = None,
    _stacklevel: Any = None,
    dtype: torch.dtype | None = None,
) -> Result:
    return softmax(-input, dim, _stacklevel, dtype)


def logsumexp(input: torch.Tensor, dim: Dims, keepdim: bool = False) -> Result:
    """max + log(sum of exp(x - max))."""
    dims = _dims(dim)
    dtype = _autocast_to_fp32(input)
    if not dtype.is_floating_point or not input.ndim or not input.numel():
        return NotImplemented
    x = _wide(input)
    peak = x.detach().amax(dims, keepdim=True)
    peak = peak.masked_fill(peak.abs() == math.inf, 0)
    result = log(row_sum(exp(x - peak), dims, keepdim))
    return (result + peak.view(result.shape)).to(dtype)


def var(input: torch.Tensor, *args: Any, **kwargs: Any) -> Result:
    moments = _moments(input, *args, **kwargs)
    return moments if moments is NotImplemented else moments[0].to(input.dtype)


def std(input: torch.Tensor, *args: Any, **kwargs: Any) -> Result:
    moments = _moments(input, *args, **kwargs)
    return moments if moments is NotImplemented else _root(moments[0]).to(input.dtype)


def var_mean(input: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
    moments = _moments(input, *args, **kwargs)
    if moments is NotImplemented:
        return moments
    return tuple(moment.to(input.dtype) for moment in moments)


def std_mean(input: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
    moments = _moments(input, *args, **kwargs)
    if moments is NotImplemented:
        return moments
    return _root(moments[0]).to(input.dtype), moments[1].to(input.dtype)


def vector_norm(
    x: torch.Tensor,
    ord: float = 2,
    dim: Dims = None,
    keepdim: bool = False,
    *,
    dtype: torch.dtype | None = None,
) -> Result:
    """(sum of |x|^ord)^(1/ord), for 1 and 2; the largest or smallest |x|."""
    dtype = dtype or _autocast_to_fp32(x)
    if not dtype.is_floating_point:
        return NotImplemented
    norm = _norm(x.to(dtype), ord, _dims(dim), keepdim)
    return norm if norm is NotImplemented else norm.to(dtype)


def norm(
    input: torch.Tensor,
    p: float | str | None = "fro",
    dim: Dims = None,
    keepdim: bool = False,
    out: torch.Tensor | None = None,
    dtype: torch.dtype | None = None,
) -> Result:
    if p == "nuc" or out is not None:
        return NotImplemented
    order: Any = 2 if p in ("fro", None) else p
    return vector_norm(input, order, dim, keepdim, dtype=dtype)


def linalg_norm(
    A: torch.Tensor,
    ord: float | str | None = None,
    dim: Dims = None,
    keepdim: bool = False,
    *,
    dtype: torch.dtype | None = None,
) -> Result:
    """A vector's norm, or the Frobenius norm."""
    dims = _dims(dim)
    order = len(dims) or A.ndim
    if ord is None or (ord == "fro" and order == 2):
        return vector_norm(A, 2, dim, keepdim, dtype=dtype)
    if isinstance(ord, str) or order != 1:
        return NotImplemented
    return vector_norm(A, ord, dim, keepdim, dtype=dtype)


def normalize(
    input: torch.Tensor,
    p: float = 2.0,
    dim: int = 1,
    eps: float = 1e-12,
) -> Result:
    """x / max(norm, eps)."""
    dtype = _autocast_to_fp32(input)
    length = _norm(input, p, _dims(dim), True)
    if length is NotImplemented:
        return length
    return (_wide(input) / length.clamp_min(eps)).to(dtype)


def cosine_similarity(
    x1: torch.Tensor, x2: torch.Tensor, dim: int = 1, eps: float = 1e-8
) -> Result:
    """The product of both vectors, each divided by max(its norm, eps)."""
    dtype = torch.promote_types(_autocast_to_fp32(x1), _autocast_to_fp32(x2))
    if not dtype.is_floating_point:
        return NotImplemented
    x1, x2 = torch.broadcast_tensors(x1.to(dtype), x2.to(dtype))
    units = [_wide(x) / _norm(x, 2, (dim,), True).clamp_min(eps) for x in (x1, x2)]
    return row_sum(units[0] * units[1], (dim,), False).to(dtype)


def rms_norm(
    input: torch.Tensor,
    normalized_shape: Sequence[int],
    weight: torch.Tensor | None = None,
    eps: float | None = None,
) -> Result:
    """x / sqrt(mean of x^2 + eps) * weight (arXiv:1910.07467)."""
    if not input.is_floating_point() or tuple(normalized_shape) != tuple(
        input.shape[input.ndim - len(normalized_shape) :]
    ):
        return NotImplemented
    dims = tuple(range(-len(normalized_shape), 0))
    x = _wide(input)
    eps = torch.finfo(input.dtype).eps if eps is None else eps
    result = x / sqrt(_mean(x * x, dims, True) + eps)
    return (result if weight is None else result * weight).to(input.dtype)


def group_norm(
    input: torch.Tensor,
    num_groups: int,
    weight: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
    eps: float = 1e-5,
    cudnn_enabled: bool = True,
) -> Result:
    """(x - mean) / sqrt(variance + eps) * weight + bias in each group of channels."""
    if not input.is_floating_point() or input.ndim < 2 or input.shape[1] % num_groups:
        return NotImplemented
    x = _wide(input).reshape(input.shape[0], num_groups, -1)
    centred = x - _mean(x, (-1,), True)
    result = centred / sqrt(_mean(centred * centred, (-1,), True) + eps)
    result = result.view(input.shape)
    of_channels = (-1, *[1] * (input.ndim - 2))
    if weight is not None:
        result = result * weight.view(of_channels)
    if bias is not None:
        result = result + bias.view(of_channels)
    return result.to(input.dtype)


def cumsum(
    input: torch.Tensor, dim: int, *, dtype: torch.dtype | None = None
) -> Result:
    """Sums of all elements up to each, by doubling the number that is added up."""
    dtype = dtype or _autocast_to_fp32(input)
    if not dtype.is_floating_point or not input.ndim:
        return NotImplemented
    x = _wide(input.to(dtype))
    length, step = x.shape[dim], 1
    while step < length:
        sums = x.narrow(dim, step, length - step) + x.narrow(dim, 0, length - step)
        x = torch.cat((x.narrow(dim, 0, step), sums), dim)
        step *= 2
    return x.to(dtype, copy=x is input)


def _softmax(
    x: torch.Tensor,
    dim: int | None,
    stacklevel: Any,
    dtype: torch.dtype | None,
    normalised: Callable[[torch.Tensor, int], torch.Tensor],
) -> Result:
    # torch.softmax has the dtype where F.softmax has _stacklevel.
    dtype = dtype or (stacklevel if isinstance(stacklevel, torch.dtype) else None)
    dtype = dtype or _autocast_to_fp32(x)
    if not dtype.is_floating_point or dim is None or not x.ndim or not x.numel():
        return NotImplemented
    x = _wide(x.to(dtype))
    # The gradient through the maximum is zero.
    return normalised(x - x.detach().amax(dim, keepdim=True), dim).to(dtype)


def _probabilities(x: torch.Tensor, dim: int) -> torch.Tensor:
    weights = exp(x)
    return weights / row_sum(weights, (dim,), True)


def _log_probabilities(x: torch.Tensor, dim: int) -> torch.Tensor:
    return x - log(row_sum(exp(x), (dim,), True))


def _mean(x: torch.Tensor, dims: tuple[int, ...], keepdim: bool) -> torch.Tensor:
    return row_sum(x, dims, keepdim) / _length(x, dims)


def _moments(
    x: torch.Tensor,
    dim: Dims = None,
    unbiased: bool = True,
    keepdim: bool = False,
    *,
    correction: float | None = None,
) -> tuple[torch.Tensor, torch.Tensor] | NotImplementedType:
    """Variance and mean; torch takes `unbiased` in the place of `dim`, too."""
    if not x.is_floating_point():
        return NotImplemented
    if isinstance(dim, bool):
        unbiased, dim = dim, None
    dims = _dims(dim)
    correction = float(unbiased) if correction is None else correction
    x = _wide(x)
    mean = _mean(x, dims, True)
    centred = x - mean
    squares = row_sum(centred * centred, dims, keepdim)
    if not keepdim:
        mean = mean.view(squares.shape)
    return squares / max(_length(x, dims) - correction, 0), mean


def _norm(
    x: torch.Tensor, order: float, dims: tuple[int, ...], keepdim: bool
) -> Result:
    x = _wide(x)
    if order == 2:
        return _root(row_sum(x * x, dims, keepdim))
    if order == 1:
        return row_sum(x.abs(), dims, keepdim)
    if order == math.inf:
        return x.abs().amax(dims, keepdim)
    if order == -math.inf:
        return x.abs().amin(dims, keepdim)
    return NotImplemented


def _root(x: torch.Tensor) -> torch.Tensor:
    """The square root; its gradient at 0 is 0, as that of torch's norms."""
    zero = x == 0
    return sqrt(x.masked_fill(zero, 1)).masked_fill(zero, 0)


def _length(x: torch.Tensor, dims: tuple[int, ...]) -> int:
    if not (dims and x.ndim):
        return x.numel()
    return math.prod([x.shape[dim] for dim in dims])


def _dims(dim: Dims) -> tuple[int, ...]:
    if dim is None:
        return ()
    return (dim,) if isinstance(dim, int) else tuple(dim)


def _wide(x: torch.Tensor) -> torch.Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))


def _autocast_to_fp32(x: torch.Tensor) -> torch.dtype:
    """The dtype of the results of those functions that CUDA's autocast runs in fp32."""
    if x.is_cuda and x.is_floating_point() and autocast_dtype(x) is not None:
        return torch.promote_types(x.dtype, torch.float32)
    return x.dtype
