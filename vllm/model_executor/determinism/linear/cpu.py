# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""Matrix products on CPU whose rows do not depend on the number of rows.

They are oneDNN's, as in the CPU engine. A row's bits depend on M at M = 1 only, where
some machines run another kernel, so one row is multiplied as two. A dtype for which
oneDNN has no such product on this machine is multiplied in fp32, which is exact for the
products of 16-bit numbers, and rounded once. The op is in `csrc/training/cpu`.
"""

from __future__ import annotations

import functools

import torch

from vllm.model_executor.op_library import (
    BUILD_EXTENSION,
    HAS_CPU_KERNELS,
    define_op,
)


class PackedWeight:
    """A weight as oneDNN multiplies it.

    Args:
        weight: shape = [N, K]; fp32, bf16 or fp16. It is copied.

    Attributes:
        handle: int64 tensor of one element, oneDNN's handle, valid as long as this
            object lives.
        product_dtype: what inputs are cast to.
        out_features: N.
    """

    def __init__(self, weight: torch.Tensor) -> None:
        from vllm.model_executor import vllm_internals

        self.product_dtype = product_dtype(weight.dtype)
        self.out_features = weight.shape[0]
        weight = weight.detach().to(self.product_dtype)
        # oneDNN takes [K, N] with rows or columns that are contiguous and apart.
        if not (_has_rows_apart(weight) or _has_rows_apart(weight.t())):
            weight = weight.contiguous()
        self._handler = vllm_internals.onednn().pack(weight.t())
        self.handle: torch.Tensor = self._handler.handler_tensor

    def __call__(
        self, x: torch.Tensor, bias: torch.Tensor | None = None
    ) -> torch.Tensor:
        """x W^T + b, for any shape [..., K], as an op that torch.compile leaves alone.

        Returns:
            shape = [..., N], dtype of x.
        """
        rows = _packed_linear(
            x.reshape(-1, x.shape[-1]),
            bias,
            self.handle,
            self.out_features,
            self.product_dtype == torch.float32,
        )
        return rows.view(*x.shape[:-1], self.out_features)


def _has_rows_apart(matrix: torch.Tensor) -> bool:
    return matrix.stride(1) == 1 and matrix.stride(0) >= matrix.shape[1]


@functools.cache
def product_dtype(dtype: torch.dtype) -> torch.dtype:
    """In which dtype this machine multiplies inputs of a dtype.

    AMX multiplies 16-bit numbers, and oneDNN adds its products of more than some 500
    columns in an order that depends on the number of rows (vLLM 0.32.0).

    Raises:
        RuntimeError: vLLM's build for CPU, whose oneDNN this is, is not there, or the
            extension.
    """
    from vllm.model_executor import vllm_internals

    onednn = vllm_internals.onednn()
    if not onednn.is_built:
        raise RuntimeError(
            "Batch-invariant mode on CPU multiplies with vLLM's oneDNN, which this "
            "build of vLLM does not have; install vLLM's build for CPU."
        )
    if not HAS_CPU_KERNELS:
        raise RuntimeError(
            "Batch-invariant mode on CPU needs the extension, which is not built. To "
            f"build it, {BUILD_EXTENSION}."
        )
    if dtype != torch.float32 and torch.cpu._is_amx_tile_supported():
        return torch.float32
    try:
        onednn.pack(torch.zeros(32, 32, dtype=dtype))
    except RuntimeError:
        return torch.float32
    return dtype


def in_order_linear(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None
) -> torch.Tensor:
    """x W^T + b; the weight is packed for this call.

    Args:
        x: shape = [M, K]
        weight: shape = [N, K]
        bias: shape = [N] or None

    Returns:
        shape = [M, N], dtype of x.
    """
    if not (x.numel() and weight.numel()):
        output = x.new_zeros(x.shape[0], weight.shape[0])
        return output if bias is None else output + bias
    return PackedWeight(weight)(x, bias)


def _fake(
    x: torch.Tensor,
    bias: torch.Tensor | None,
    handle: torch.Tensor,
    out_features: int,
    in_fp32: bool,
) -> torch.Tensor:
    return x.new_empty(x.shape[0], out_features)


_packed_linear = define_op(
    "packed_linear(Tensor x, Tensor? bias, Tensor handle, int out_features, "
    "bool in_fp32) -> Tensor",
    fake=_fake,
)
