# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""Rotary embedding: op, backward and public function."""

from __future__ import annotations

from typing import Any

import torch

from vllm.model_executor.layers.training.ops.rotary import triton_kernels
from vllm.model_executor.layers.training.ops.rotary.reference import (
    rotary_embedding_reference,
)
from vllm.model_executor.op_library import (
    define_op,
    described,
    has_kernel,
)


def rotary_embedding(
    positions: torch.Tensor,
    query: torch.Tensor,
    key: torch.Tensor,
    cos_sin_cache: torch.Tensor,
    is_neox_style: bool,
    inverse: bool = False,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Rotate pairs of features of query and key (RoPE, arXiv:2104.09864).

    The pair (a, b) becomes (a cos - b sin, b cos + a sin), in fp32 and rounded once.
    The rotation is orthogonal up to the magnitude of (cos, sin), so the gradients are
    the rotation back of the results' gradients, with the same magnitude: the op with
    `inverse`. Nothing but positions and the cache is saved for it.

    Args:
        positions: int32 or int64, shape = [num_tokens]. On CUDA, where checking would
            stall the GPU, a position outside the cache makes its token's rotated
            features NaN.
        query: shape = [num_tokens, num_heads, head_size]; a slice of a larger tensor
            is not copied if its last dim is contiguous.
        key: shape = [num_tokens, num_kv_heads, head_size], dtype of query.
        cos_sin_cache: fp32, shape = [max_positions, rotary_dim], cosines in the first
            half. Features from rotary_dim on are copied.
        is_neox_style: a pair is feature i and i + rotary_dim / 2; else 2 i and
            2 i + 1 (GPT-J).
        inverse: rotate back: sines are negated.

    Returns:
        Rotated query and key, contiguous.

    Raises:
        ValueError: shapes, dtypes or devices that do not fit each other.
        IndexError: on CPU, a position outside the cache. In a graph made by
            torch.compile it is a RuntimeError.
    """
    _check(positions, query, key, cos_sin_cache)
    positions = positions.long().contiguous()
    if not has_kernel(query):
        function = rotary_embedding_reference
    else:
        function = _rotary_embedding
        query, key = _with_contiguous_heads(query), _with_contiguous_heads(key)
        cos_sin_cache = cos_sin_cache.contiguous()
    try:
        return function(positions, query, key, cos_sin_cache, is_neox_style, inverse)
    except (RuntimeError, IndexError):
        if positions.is_cpu:
            _check_range(positions, cos_sin_cache)
        raise


def _check(
    positions: torch.Tensor,
    query: torch.Tensor,
    key: torch.Tensor,
    cos_sin_cache: torch.Tensor,
) -> None:
    tensors = (positions, query, key, cos_sin_cache)
    fits = (
        positions.dtype in (torch.int32, torch.int64)
        and query.dtype == key.dtype
        and query.is_floating_point()
        and cos_sin_cache.dtype == torch.float32
        and all(tensor.device == query.device for tensor in tensors)
        and (positions.ndim, query.ndim, key.ndim, cos_sin_cache.ndim) == (1, 3, 3, 2)
        and positions.shape[0] == query.shape[0] == key.shape[0]
        and query.shape[2] == key.shape[2] >= cos_sin_cache.shape[1]
        and cos_sin_cache.shape[1] > 0 == cos_sin_cache.shape[1] % 2
    )
    if not fits:
        given = described(
            positions=positions, query=query, key=key, cos_sin_cache=cos_sin_cache
        )
        raise ValueError(
            f"rotary_embedding got {given}. It takes positions int32 or int64 "
            "[num_tokens], query [num_tokens, num_heads, head_size] and key "
            "[num_tokens, num_kv_heads, head_size] of one floating-point dtype, and "
            "cos_sin_cache float32 [max_positions, rotary_dim], rotary_dim even and "
            "from 2 to head_size, all on one device."
        )


def _check_range(positions: torch.Tensor, cos_sin_cache: torch.Tensor) -> None:
    last = cos_sin_cache.shape[0] - 1
    if positions.numel() and not 0 <= positions.min() <= positions.max() <= last:
        raise IndexError(
            f"positions go from {positions.min()} to {positions.max()}; the rotary "
            f"embedding holds positions 0 to {last}. Build it with a larger "
            "max_position_embeddings."
        )


def _with_contiguous_heads(x: torch.Tensor) -> torch.Tensor:
    return x if x.stride(-1) == 1 else x.contiguous()


def _fake(
    positions: torch.Tensor,
    query: torch.Tensor,
    key: torch.Tensor,
    cos_sin_cache: torch.Tensor,
    is_neox_style: bool,
    inverse: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    return query.new_empty(query.shape), key.new_empty(key.shape)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    positions, _, _, cos_sin_cache, *ctx.style = inputs
    ctx.save_for_backward(positions, cos_sin_cache)


def _backward(
    ctx: Any, grad_query: torch.Tensor, grad_key: torch.Tensor
) -> tuple[torch.Tensor | None, ...]:
    positions, cos_sin_cache = ctx.saved_tensors
    is_neox_style, inverse = ctx.style
    grads = _rotary_embedding(
        positions,
        _with_contiguous_heads(grad_query),
        _with_contiguous_heads(grad_key),
        cos_sin_cache,
        is_neox_style,
        not inverse,
    )
    return None, *grads, None, None, None


_rotary_embedding = define_op(
    "rotary_embedding(Tensor positions, Tensor query, Tensor key, "
    "Tensor cos_sin_cache, bool is_neox_style, bool inverse) -> (Tensor, Tensor)",
    fake=_fake,
    cuda=triton_kernels.rotary_embedding,
    setup_context=_setup_context,
    backward=_backward,
)
