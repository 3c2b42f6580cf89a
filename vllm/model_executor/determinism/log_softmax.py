# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""Temperature and log-softmax as the engine's sampler computes them.

In plain torch, but in batch-invariant mode on CUDA by the sampler's own kernels, whose
rows do not depend on their number. With y = log_softmax(z / T) and G = dL/dy:

    dL/dz = (G - exp(y) * (sum of G over the row)) / T
"""

from __future__ import annotations

from typing import Any

import torch

from vllm.model_executor.determinism import log_softmax_reference as reference
from vllm.model_executor.determinism.mode import is_batch_invariant
from vllm.model_executor.op_library import (
    define_op,
    has_kernel,
    rows_of,
)


def logprobs_of(logits: torch.Tensor, temperature: torch.Tensor | None) -> torch.Tensor:
    """Log-probabilities of the whole vocabulary, with a backward.

    Args:
        logits: shape = [..., vocab_size], floating point.
        temperature: divides the logits; above 0, shape = [...]; None for 1.

    Returns:
        fp32 (fp64 for fp64 logits), the shape of logits.
    """
    if uses_samplers_kernels(logits):
        if temperature is not None:
            temperature = temperature.flatten()
        return _log_softmax(rows_of(logits), temperature).view(logits.shape)
    return reference.log_softmax(reference.tempered(logits, temperature))


def tempered(logits: torch.Tensor, temperature: torch.Tensor | None) -> torch.Tensor:
    """Logits divided by the temperature, untouched by None; without a backward.

    Args:
        logits: shape = [num_tokens, vocab_size], floating point.
        temperature: above 0, shape = [num_tokens]; None for 1.

    Returns:
        fp32 (fp64 for fp64 logits) with a temperature, the shape of logits.
    """
    from vllm.model_executor import vllm_internals

    if temperature is None or not uses_samplers_kernels(logits):
        return reference.tempered(logits, temperature)
    divided = _aligned_copy(logits, torch.float32)
    rows = torch.arange(len(logits), dtype=torch.int32, device=logits.device)
    vllm_internals.gpu_sampler().apply_temperature(divided, rows, temperature)
    return divided


def log_softmax(logits: torch.Tensor) -> torch.Tensor:
    """Over the last dim; without a backward.

    Args:
        logits: shape = [num_tokens, vocab_size], floating point.

    Returns:
        fp32 (fp64 for fp64 logits), the shape of logits.
    """
    if not uses_samplers_kernels(logits):
        return reference.log_softmax(logits)
    tokens = torch.arange(logits.shape[1], device=logits.device)
    return logprobs_at(logits, tokens.expand(logits.shape))


def logprobs_at(logits: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
    """Log-probabilities of some tokens, by the sampler's kernel; without a backward.

    Args:
        logits: shape = [num_tokens, vocab_size], where `uses_samplers_kernels`.
        tokens: int64 token ids, shape = [num_tokens, n].

    Returns:
        fp32, shape = [num_tokens, n].
    """
    from vllm.model_executor import vllm_internals

    logits = aligned_rows(logits)
    return vllm_internals.gpu_sampler().compute_token_logprobs(logits, tokens)


def uses_samplers_kernels(logits: torch.Tensor) -> bool:
    """Whether logprobs of logits on this device are the work of these kernels."""
    return is_batch_invariant() and logits.device.type == "cuda" and has_kernel(logits)


def aligned_rows(logits: torch.Tensor) -> torch.Tensor:
    """Logits of which each row begins at a multiple of 16 elements.

    The compiler of the sampler's kernels divides a row among threads by what it knows
    of the rows' alignment, and so sums it up in another order. The head's logits have
    it, whose vocabulary is padded; the engine aligns those that it has processed.

    Args:
        logits: shape = [num_tokens, vocab_size]

    Returns:
        The logits, or a copy.
    """
    return logits if logits.stride(0) % 16 == 0 else _aligned_copy(logits, logits.dtype)


def _aligned_copy(logits: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    from vllm.model_executor import vllm_internals

    num_tokens, vocab_size = logits.shape
    padded = logits.new_empty(
        num_tokens, vllm_internals.pad_vocab_size(vocab_size), dtype=dtype
    )
    return padded[:, :vocab_size].copy_(logits)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
    logits, temperature = inputs
    ctx.dtype = logits.dtype
    ctx.save_for_backward(output, temperature)


def _backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None]:
    logprobs, temperature = ctx.saved_tensors
    grad = grad - logprobs.exp() * grad.sum(-1, keepdim=True)
    if temperature is not None:
        grad = grad / temperature.unsqueeze(-1)
    return grad.to(ctx.dtype), None


def _forward(logits: torch.Tensor, temperature: torch.Tensor | None) -> torch.Tensor:
    return log_softmax(tempered(logits, temperature))


def _fake(logits: torch.Tensor, temperature: torch.Tensor | None) -> torch.Tensor:
    return logits.new_empty(logits.shape, dtype=torch.float32)


_log_softmax = define_op(
    "log_softmax(Tensor logits, Tensor? temperature) -> Tensor",
    fake=_fake,
    cpu=_forward,
    cuda=_forward,
    setup_context=_setup_context,
    backward=_backward,
)
