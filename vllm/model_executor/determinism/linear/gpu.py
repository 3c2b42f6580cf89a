# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""Matrix products on CUDA that add up K in one order, by the fastest of three kernels.

Each adds the products of an element in the order of K, in fp32, adds the bias in fp32
and rounds once, so all have the bits of vLLM's batch-invariant GEMM:

- that GEMM, `matmul_persistent`, which takes everything;
- ours for few rows, in bf16 and fp16;
- cuBLASLt without split-K, for more rows in bf16 and fp16. cuBLAS promises nothing
  about its order, so it multiplies only what has the form of a product in which it was
  seen to have the bits of `matmul_persistent`, in this process: see `prove`. So that
  the steps of an engine do not bring new forms for ever, many rows are multiplied in
  pieces of few different sizes.
"""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable
from typing import Any, NamedTuple

import torch

from vllm.logger import init_logger
from vllm.model_executor.determinism.linear.triton_kernels import (
    few_rows_linear,
)

logger = init_logger(__name__)

# Up to here our kernel is the fastest on an H200, and up to there faster than vLLM's.
FEW_ROWS = 32
SOME_ROWS = 64
# Up to here a product of any number of rows is proven by itself; CUDA graphs have them.
EXACT_ROWS = 512

_SPLIT_K_SETTING = {
    torch.bfloat16: "allow_bf16_reduced_precision_reduction",
    torch.float16: "allow_fp16_reduced_precision_reduction",
}
# Another order of K changes one rounding in some thousands.
_LEAST_COMPARED = 1 << 18
_MOST_ROUNDS = 64
# Of more rows these many, evenly spaced, so that each tile of a kernel has some.
_MOST_ROWS = 512
_ALIGNMENT = 256


class Form(NamedTuple):
    """What a library may choose its kernel by.

    Attributes:
        num_rows: M
        weight_shape: N, K
        dtype: of x and weight.
        bias: its dtype and stride; None without a bias.
        x_strides: in elements.
        weight_strides: likewise.
        alignments: of x, weight, output and bias: the largest power of two up to 256
            that divides the address; 0 without a bias.
        device: index of the GPU.
    """

    num_rows: int
    weight_shape: tuple[int, ...]
    dtype: torch.dtype
    bias: tuple[torch.dtype, int] | None
    x_strides: tuple[int, ...]
    weight_strides: tuple[int, ...]
    alignments: tuple[int, int, int, int]
    device: int


_verdicts: dict[Form, bool] = {}
_settings_lock = threading.Lock()


def in_order_linear(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None
) -> torch.Tensor:
    """x W^T + b; a row's bits depend on that row, the weight and the bias alone.

    A product of a new form that cuBLASLt may take is preceded by `prove`, but not while
    a CUDA graph is captured: run it once before.

    Args:
        x: shape = [M, K]; fp32, bf16 or fp16.
        weight: shape = [N, K], dtype of x.
        bias: shape = [N] or None.

    Returns:
        shape = [M, N], dtype of x.
    """
    candidate = _candidate(x, weight)
    # Ours has the order by construction, so that prove only confirms it.
    if candidate is few_rows_linear:
        return candidate(x, weight, bias)
    if candidate is not None:
        output = x.new_empty(x.shape[0], weight.shape[0])
        pieces = [(x[rows], output[rows]) for rows in row_pieces(x.shape[0])]
        if all(_verdict(candidate, piece, weight, bias, to) for piece, to in pieces):
            for piece, to in pieces:
                candidate(piece, weight, bias, to)
            return output
        del output, pieces
    if x.shape[0] <= SOME_ROWS and _has_fast_kernels(x, weight):
        return few_rows_linear(x, weight, bias)
    return _reference(x, weight, bias)


def row_pieces(num_rows: int) -> list[slice]:
    """The rows that cuBLASLt multiplies at once: all, or two overlapping halves.

    Above EXACT_ROWS the sizes are multiples of a step, of some 64 an octave. Rows in
    both halves are computed twice, with the same bits.
    """

    def step(rows: int) -> int:
        return max(64, 1 << (rows.bit_length() - 7))

    if num_rows <= EXACT_ROWS or num_rows % step(num_rows) == 0:
        return [slice(0, num_rows)]
    half = -(-num_rows // 2)
    half = -(-half // step(half)) * step(half)
    return [slice(0, half), slice(num_rows - half, num_rows)]


def prove(
    num_rows: int, weight: torch.Tensor, bias: torch.Tensor | None = None
) -> bool | None:
    """Whether the fast kernel for a form has the bits of vLLM's, on this machine.

    Both multiply random rows of x with the weight.

    Args:
        num_rows: M
        weight: shape = [N, K]
        bias: shape = [N] or None.

    Returns:
        None if nothing was proven: vLLM's kernel takes such products itself, a CUDA
        graph is being captured, or the results are not numbers or mostly zero.
    """
    x = weight.new_empty(num_rows, weight.shape[1])
    output = weight.new_empty(num_rows, weight.shape[0])
    candidate = _candidate(x, weight)
    return None if candidate is None else _verdict(candidate, x, weight, bias, output)


def verdicts() -> dict[Form, bool]:
    """The forms compared so far, and whether the bits were those of vLLM's kernel."""
    return dict(_verdicts)


def _candidate(x: torch.Tensor, weight: torch.Tensor) -> Callable[..., Any] | None:
    """The kernel that would be faster than vLLM's; None: there is none."""
    if not _has_fast_kernels(x, weight):
        return None
    if x.shape[0] <= FEW_ROWS:
        return few_rows_linear
    return cublaslt_linear if _has_in_order_cublas(x.get_device()) else None


def _has_fast_kernels(x: torch.Tensor, weight: torch.Tensor) -> bool:
    return x.dtype in _SPLIT_K_SETTING and x.stride(1) == weight.stride(1) == 1


@functools.cache
def _has_in_order_cublas(device: int) -> bool:
    """Whether cuBLASLt is worth a trial: from Hopper on.

    Before, vLLM replaces torch's products in its batch-invariant mode, by ours.
    """
    if torch.version.cuda is None:
        return False
    return torch.cuda.get_device_capability(device) >= (9, 0)


def _reference(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None
) -> torch.Tensor:
    from vllm.model_executor import vllm_internals

    kernels = vllm_internals.batch_invariant_kernels()
    # It takes the bias to be contiguous.
    bias = None if bias is None else bias.contiguous()
    return kernels.matmul_persistent(x, weight.t(), bias)


def cublaslt_linear(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    output: torch.Tensor,
) -> torch.Tensor:
    """output = x W^T + b by cuBLASLt, which may not split K; returns it.

    torch's settings for it are global, so they are changed for the call only, by one
    thread at a time.
    """
    settings = torch.backends.cuda.matmul
    name = _SPLIT_K_SETTING[x.dtype]
    library = torch.backends.cuda.preferred_blas_library
    with _settings_lock:
        previous_library = library()
        previous = getattr(settings, name), getattr(settings, f"{name}_split_k")
        fp16_sums = settings.allow_fp16_accumulation
        try:
            library("cublaslt")
            setattr(settings, name, (False, False))
            settings.allow_fp16_accumulation = False
            if bias is None:
                return torch.mm(x, weight.t(), out=output)
            return torch.addmm(bias, x, weight.t(), out=output)
        finally:
            library(previous_library)
            setattr(settings, name, previous)
            settings.allow_fp16_accumulation = fp16_sums


def _form(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    output: torch.Tensor,
) -> Form:
    return Form(
        x.shape[0],
        weight.shape,
        x.dtype,
        None if bias is None else (bias.dtype, bias.stride(0)),
        x.stride(),
        weight.stride(),
        (
            _alignment(x),
            _alignment(weight),
            _alignment(output),
            0 if bias is None else _alignment(bias),
        ),
        x.get_device(),
    )


def _alignment(tensor: torch.Tensor) -> int:
    address = tensor.data_ptr() | _ALIGNMENT
    return address & -address


def _verdict(
    candidate: Callable[..., Any],
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    output: torch.Tensor,
) -> bool | None:
    """The verdict on a form, after a comparison in `output` if there is none yet."""
    form = _form(x, weight, bias, output)
    verdict = _verdicts.get(form)
    if verdict is None and not _is_capturing(x):
        try:
            verdict = _compare(candidate, x, weight, bias, output)
        except torch.OutOfMemoryError:
            logger.warning_once(
                "Too little GPU memory is left to compare cuBLASLt with vLLM's "
                "batch-invariant GEMM for a weight of shape %s; vLLM's, which is "
                "slower, multiplies until there is. Lower gpu_memory_utilization.",
                tuple(weight.shape),
            )
            return None
        if verdict is not None:
            _verdicts[form] = verdict
        if verdict is False:
            logger.info_once(
                "%s does not give the bits of vLLM's batch-invariant GEMM in some "
                "products with a weight of shape %s in %s; cuBLASLt is not used there.",
                candidate.__name__,
                tuple(weight.shape),
                x.dtype,
            )
    return verdict


def _is_capturing(x: torch.Tensor) -> bool:
    return x.is_cuda and torch.cuda.is_current_stream_capturing()


@torch.no_grad()
def _compare(
    candidate: Callable[..., Any],
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    output: torch.Tensor,
) -> bool | None:
    """Whether two kernels agree on random numbers in the form of x.

    Returns:
        None if the results could not show a difference.
    """
    out_features = weight.shape[0]
    num_rows = x.shape[0]
    compared = min(num_rows, _MOST_ROWS)
    size = compared * out_features
    if not size:
        return None
    places = torch.arange(compared, device=x.device)
    rows = places * (num_rows - 1) // max(1, compared - 1)
    # Not torch's own generator: what the caller draws from it must not change.
    generator = torch.Generator(x.device).manual_seed(0)
    differences = torch.zeros((), dtype=torch.int64, device=x.device)
    telling = torch.zeros_like(differences)
    rounds = min(_MOST_ROUNDS, -(-_LEAST_COMPARED // size))
    for _ in range(rounds):
        random = _random_like(x, generator)
        try:
            result = candidate(random, weight, bias, output)[rows]
        except torch.OutOfMemoryError:
            raise
        except RuntimeError:
            # The library has no kernel for the form.
            return False
        # The reference's rows do not depend on each other.
        expected = _reference(random[rows], weight, bias)
        differences += (result.view(torch.int16) != expected.view(torch.int16)).sum()
        telling += (expected.isfinite() & (expected != 0)).sum()
    if 2 * int(telling) < rounds * size:
        return None
    return int(differences) == 0


def _random_like(x: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Random numbers with the strides and the alignment of x."""
    span = 1 + sum(
        (size - 1) * stride for size, stride in zip(x.shape, x.stride(), strict=True)
    )
    memory = x.new_empty(_ALIGNMENT // x.element_size() + span)
    memory.normal_(generator=generator)
    offset = (_alignment(x) - memory.data_ptr()) % _ALIGNMENT // x.element_size()
    return memory[offset:].as_strided(x.shape, x.stride())
