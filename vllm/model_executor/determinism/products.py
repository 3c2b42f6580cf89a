# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""torch's products of matrices, each element added up in the order of K.

Each function has the arguments of torch's. Which kernel multiplies depends on the
number of dims and on K alone, never on a size that may be the number of tokens:

- a matrix on one side: the linear of the mode, whose bits depend on the row and on the
  row of the weight alone;
- batches on both sides: the batched product;
- groups of rows: the grouped product;
- K = 1: there is nothing to add up, so it is an elementwise product.

What is neither fp32, bf16 nor fp16 is left to torch: the result is NotImplemented.
"""

from __future__ import annotations

from types import NotImplementedType
from typing import Any, NoReturn

import torch

from vllm.model_executor.determinism.batched_matmul import batched_matmul
from vllm.model_executor.determinism.grouped_matmul import grouped_matmul
from vllm.model_executor.determinism.linear.op import linear as in_order_linear
from vllm.model_executor.determinism.row_sum import row_sum
from vllm.model_executor.op_library import KERNEL_DTYPES, autocast_dtype

Result = torch.Tensor | NotImplementedType
_LETTERS = "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ"


def linear(
    input: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None
) -> Result:
    if not _has_kernel(input, weight):
        return NotImplemented
    if weight.ndim == 1:
        product = matmul(input, weight)
        return product if bias is None else product + bias
    return _linear(input, weight, bias)


def matmul(input: torch.Tensor, other: torch.Tensor) -> Result:
    if not (_has_kernel(input, other) and input.ndim and other.ndim):
        return NotImplemented
    if input.shape[-1] != other.shape[-2 if other.ndim > 1 else 0]:
        return NotImplemented
    return _matmul(input, other)


def mm(input: torch.Tensor, mat2: torch.Tensor) -> Result:
    return matmul(input, mat2)


def mv(input: torch.Tensor, vec: torch.Tensor) -> Result:
    # Of which autocast knows nothing on CPU.
    return matmul(input, vec) if autocast_dtype(input) is None else NotImplemented


def dot(input: torch.Tensor, tensor: torch.Tensor) -> Result:
    return mv(input, tensor)


def rmatmul(input: torch.Tensor, other: torch.Tensor) -> Result:
    return matmul(other, input)


def addmm(
    input: torch.Tensor,
    mat1: torch.Tensor,
    mat2: torch.Tensor,
    *,
    beta: float = 1,
    alpha: float = 1,
) -> Result:
    """beta * input + alpha * mat1 @ mat2."""
    if not _has_kernel(input, mat1, mat2):
        return NotImplemented
    is_bias = mat1.ndim == mat2.ndim == 2 and input.shape == mat2.shape[1:]
    if is_bias and beta == alpha == 1 and mat1.shape[1] == mat2.shape[0]:
        return _linear(mat1, mat2.mT, input)
    product = matmul(mat1, mat2)
    if not isinstance(product, torch.Tensor):
        return NotImplemented
    if alpha != 1:
        product = torch.mul(product, alpha)
    if beta == 0:
        return product
    return product + (input if beta == 1 else input * beta).to(product.dtype)


def addmv(
    input: torch.Tensor, mat: torch.Tensor, vec: torch.Tensor, **factors: float
) -> Result:
    return addmm(input, mat, vec, **factors)


def baddbmm(
    input: torch.Tensor, batch1: torch.Tensor, batch2: torch.Tensor, **factors: float
) -> Result:
    return addmm(input, batch1, batch2, **factors)


def grouped_mm(
    input: torch.Tensor,
    mat2: torch.Tensor,
    offs: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
    out_dtype: torch.dtype | None = None,
) -> Result:
    """Groups of rows, each times a matrix of its own."""
    is_plain = bias is None and out_dtype in (None, input.dtype)
    if not (_has_kernel(input, mat2) and is_plain and mat2.ndim == 3):
        return NotImplemented
    if offs is None or input.ndim != 2:
        return matmul(input, mat2) if offs is None else NotImplemented
    if input.is_cuda and input.dtype == torch.bfloat16:
        return NotImplemented
    return grouped_matmul(input, mat2, offs)


def inner(input: torch.Tensor, other: torch.Tensor) -> Result:
    if not (input.ndim and other.ndim):
        return NotImplemented
    if other.ndim == 1:
        return matmul(input, other)
    product = matmul(input, other.flatten(0, -2).mT)
    if not isinstance(product, torch.Tensor):
        return NotImplemented
    return product.unflatten(-1, other.shape[:-1])


def einsum(*args: Any) -> Result:
    """Two operands at a time, from the left; each two are one product of matrices."""
    equation, *operands = args
    if len(operands) == 1 and isinstance(operands[0], (list, tuple)):
        operands = list(operands[0])
    if not _has_kernel(*operands):
        return NotImplemented
    labels, output = _labels(equation, operands)
    if len(operands) > 1:
        operands = [_autocast(operand) for operand in operands]
    total, names = operands[0], labels[0]
    for position, (operand, theirs) in enumerate(zip(operands[1:], labels[1:]), 2):
        later = set(output).union(*labels[position:])
        total, names = _contract(total, names, operand, theirs, later)
    total, names = _summed(total, names, set(output))
    return total.permute([names.index(name) for name in output])


def bilinear(*args: Any, **kwargs: Any) -> NoReturn:
    _refuse("bilinear", "Write it as a linear layer and a sum.")


def _labels(equation: str, operands: list[torch.Tensor]) -> tuple[list[str], str]:
    """The letters of each operand's dims and of the result's."""
    inputs, arrow, output = equation.replace(" ", "").partition("->")
    terms = inputs.split(",")
    if len(terms) != len(operands):
        raise ValueError(
            f"einsum({equation!r}) has {len(terms)} operands in the equation, but got "
            f"{len(operands)} tensors."
        )
    spare = [letter for letter in _LETTERS if letter not in equation]
    dims = [
        operand.ndim - len(term.replace("...", "")) if "..." in term else 0
        for term, operand in zip(terms, operands)
    ]
    ellipsis = "".join(spare[: max(dims)])
    labels = [
        term.replace("...", ellipsis[len(ellipsis) - count :])
        for term, count in zip(terms, dims)
    ]
    for term, letters, operand in zip(terms, labels, operands):
        if len(letters) != operand.ndim:
            raise ValueError(
                f"einsum({equation!r}): {term!r} does not fit a tensor of shape "
                f"{tuple(operand.shape)}."
            )
        if len(set(letters)) != len(letters):
            _refuse(f"einsum({equation!r}), a diagonal", "Call torch.diagonal first.")
    if arrow:
        return labels, output.replace("...", ellipsis)
    letters = "".join(term.replace("...", "") for term in terms)
    once = sorted(letter for letter in set(letters) if letters.count(letter) == 1)
    return labels, ellipsis + "".join(once)


def _contract(
    a: torch.Tensor, a_names: str, b: torch.Tensor, b_names: str, kept: set[str]
) -> tuple[torch.Tensor, str]:
    """The product of two operands, summed over the names that are not kept."""
    a, a_names = _summed(a, a_names, kept.union(b_names))
    b, b_names = _summed(b, b_names, kept.union(a_names))
    shared = [name for name in a_names if name in b_names]
    batch = [name for name in shared if name in kept]
    inner = [name for name in shared if name not in kept]
    rows = [name for name in a_names if name not in shared]
    columns = [name for name in b_names if name not in shared]
    sizes = dict(zip(b_names, b.shape))
    for name, size in zip(a_names, a.shape):
        # A dim of size 1 is broadcast.
        sizes[name] = size if sizes.get(name, 1) == 1 else sizes[name]

    def grouped(x: torch.Tensor, names: str, *groups: list[str]) -> torch.Tensor:
        order = [name for group in groups for name in group]
        x = x.permute([names.index(name) for name in order])
        x = x.expand([sizes[name] for name in order])
        return x.reshape([_size(sizes, group) for group in groups])

    names = [*batch, *rows, *columns]
    if batch and not (rows and columns):
        # No larger than the larger operand.
        dtype = torch.promote_types(a.dtype, torch.float32)
        left = grouped(a, a_names, batch, rows, inner).to(dtype)
        right = grouped(b, b_names, batch, columns, inner).to(dtype)
        product = row_sum(left * right, (-1,), False).to(a.dtype)
    else:
        groups = [batch] if batch else []
        left = grouped(a, a_names, *groups, rows, inner)
        right = grouped(b, b_names, *groups, columns, inner)
        product = _matmul(left, right.mT)
    return product.reshape([sizes[name] for name in names]), "".join(names)


def _summed(x: torch.Tensor, names: str, kept: set[str]) -> tuple[torch.Tensor, str]:
    dims = [dim for dim, name in enumerate(names) if name not in kept]
    if dims:
        x = row_sum(x, dims, False).to(x.dtype)
    return x, "".join(name for name in names if name in kept)


def _size(sizes: dict[str, int], names: list[str]) -> int:
    size = 1
    for name in names:
        size *= sizes[name]
    return size


def _matmul(input: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
    if other.ndim == 1:
        return _matmul(input, other.unsqueeze(1)).squeeze(-1)
    if input.ndim == 1:
        return _matmul(input.unsqueeze(0), other).squeeze(-2)
    input, other = _autocast(input), _autocast(other)
    if input.shape[-1] == 1:
        return input * other
    if other.ndim == 2:
        return _linear(input, other.mT)
    if input.ndim == 2:
        return _linear(other.mT, input).mT
    batch = torch.broadcast_shapes(input.shape[:-2], other.shape[:-2])
    input, other = (
        x.expand(*batch, *x.shape[-2:]).flatten(0, -3) for x in (input, other)
    )
    return batched_matmul(input, other).unflatten(0, batch)


def _linear(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None
) -> torch.Tensor:
    if weight.shape[0] != 1:
        return in_order_linear(x, weight, bias)
    # One row of a weight is multiplied in an order of its own, so it becomes two.
    bias = None if bias is None else bias.expand(2)
    return in_order_linear(x, weight.expand(2, -1), bias)[..., :1]


def _autocast(x: torch.Tensor) -> torch.Tensor:
    dtype = autocast_dtype(x)
    return x if dtype is None else x.to(dtype)


def _has_kernel(*tensors: torch.Tensor) -> bool:
    """Whether they are of one kind; torch has the message if they are not."""
    first = tensors[0]
    return all(
        tensor.dtype in KERNEL_DTYPES
        and tensor.device == first.device
        and (tensor.dtype == first.dtype or autocast_dtype(first) is not None)
        for tensor in tensors
    )


def _refuse(what: str, advice: str) -> NoReturn:
    raise NotImplementedError(
        f"Batch-invariant mode has no {what}: its results may depend on the other "
        f"tokens of the batch. {advice}"
    )
