# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""Log-probabilities of given tokens, without holding the logits of a whole batch."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from vllm.model_executor.layers.training.collectives import (
    copy_to_group,
    gather_from_group,
)
from vllm.model_executor.layers.training.embedding import ParallelLMHead
from vllm.model_executor.parallel_context import ParallelContext

# Upper bound of tokens * vocabulary in one chunk: 64 MiB of fp32.
MAX_LOGITS_PER_CHUNK = 1 << 24


def token_logprobs(
    hidden_states: torch.Tensor,
    lm_head: ParallelLMHead | nn.Linear,
    targets: torch.Tensor,
    *,
    temperature: float = 1.0,
) -> torch.Tensor:
    """Log-probability of each target under the head's softmax.

    Equal to ``log_softmax(lm_head(hidden_states), -1, dtype=torch.float32)`` at the
    targets, which is how vLLM's sampler computes logprobs; with a temperature the
    logits are first converted to fp32 and divided by it, as the sampler does.

    Tokens are processed in chunks and the logits are computed again in the backward,
    so logits of one chunk exist at a time.

    Args:
        hidden_states: shape = [num_tokens, hidden_size] or [batch, seq, hidden_size],
            in the head's dtype; under autocast both are cast to its dtype.
        lm_head: the head. Its parameters are read; its forward is not called.
        targets: int64 token ids, the shape of hidden_states without the last dim.
        temperature: divides the logits; above 0.

    Returns:
        fp32 (fp64 for fp64 inputs), the shape of targets.

    Raises:
        TypeError: a head of another kind, or one with a forward of its own.
        ValueError: shapes, dtypes, targets or a temperature that do not fit.
    """
    head = _Head.of(lm_head)
    device = hidden_states.device.type
    if torch.is_autocast_enabled(device):
        dtype = torch.get_autocast_dtype(device)
        hidden_states, head = hidden_states.to(dtype), head.to(dtype)
    _check(hidden_states, head, targets, temperature)
    hidden_states = copy_to_group(hidden_states, head.context)
    # The backward computes the logits again, in the dtype they had here.
    with torch.autocast(device, enabled=False):
        logprobs = _TokenLogprobs.apply(
            hidden_states.flatten(0, -2),
            head.weight,
            head.bias,
            targets.flatten(),
            temperature,
            head,
        )
    return logprobs.view(targets.shape)


@dataclass(frozen=True, eq=False)
class _Head:
    """What the computation needs of a head.

    Attributes:
        weight: shape = [rows on this rank, hidden_size]
        bias: shape = [rows on this rank] or None
        vocab_size: tokens over all ranks, without padding.
        vocab_start: the first token of this rank.
        context: names the tensor-parallel group.
    """

    weight: torch.Tensor
    bias: torch.Tensor | None
    vocab_size: int
    vocab_start: int
    context: ParallelContext

    def to(self, dtype: torch.dtype) -> _Head:
        """The head with its parameters cast, under autograd."""
        bias = None if self.bias is None else self.bias.to(dtype)
        return replace(self, weight=self.weight.to(dtype), bias=bias)

    @classmethod
    def of(cls, lm_head: ParallelLMHead | nn.Linear) -> _Head:
        for kind in (ParallelLMHead, nn.Linear):
            if isinstance(lm_head, kind) and type(lm_head).forward is kind.forward:
                break
        else:
            raise TypeError(
                f"token_logprobs got a {type(lm_head).__name__} as lm_head; it reads "
                "weight and bias of a ParallelLMHead or torch.nn.Linear whose forward "
                "is not overridden. For another head compute the logits and "
                "log_softmax yourself."
            )
        if isinstance(lm_head, nn.Linear):
            return cls(
                lm_head.weight,
                lm_head.bias,
                lm_head.out_features,
                0,
                ParallelContext.single(),
            )
        return cls(
            lm_head.weight,
            lm_head.bias,
            lm_head.num_embeddings,
            lm_head.vocab_start_index,
            lm_head.parallel_context,
        )

    @property
    def num_local_tokens(self) -> int:
        """Tokens whose logits this rank computes, without padding."""
        return max(0, min(len(self.weight), self.vocab_size - self.vocab_start))


class _TokenLogprobs(Function):
    """Chunked log-softmax of a projection, at one column a row.

    With z = (h W^T + b) / T of shape [num_tokens, vocab], y = z[t] - lse(z) and the
    incoming gradient g of shape [num_tokens]:

        dL/dz = g (onehot(t) - exp(z - lse))
        dL/dh = dL/dz W / T,  dL/dW = dL/dz^T h / T,  dL/db = sum over tokens dL/dz / T

    Saved: h, W, b, t and lse = z[t] - y, which is one number a token; z is computed
    again. Each rank has the columns of its own tokens, so dL/dh is its part of a sum
    over ranks, which the caller's copy_to_group takes. dL/dW of several chunks is
    added up in fp32.
    """

    @staticmethod
    def forward(
        ctx: Any,
        hidden: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        targets: torch.Tensor,
        temperature: float,
        head: _Head,
    ) -> torch.Tensor:
        dtype = _compute_dtype(hidden)
        logprobs = hidden.new_empty(len(hidden), dtype=dtype)
        lse = torch.empty_like(logprobs)
        for rows in _chunks(len(hidden), head.vocab_size):
            logits = F.linear(hidden[rows], weight, bias)
            logits = gather_from_group(logits, head.context)[:, : head.vocab_size]
            logits = _tempered(logits, temperature, dtype)
            index = targets[rows].unsqueeze(1)
            at_target = logits.log_softmax(-1, dtype=dtype).gather(1, index)
            logprobs[rows] = at_target.squeeze(1)
            lse[rows] = (logits.gather(1, index).to(dtype) - at_target).squeeze(1)
        ctx.save_for_backward(hidden, weight, bias, targets, lse)
        ctx.temperature, ctx.head = temperature, head
        return logprobs

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        hidden, weight, bias, targets, lse = ctx.saved_tensors
        head, dtype = ctx.head, lse.dtype
        grad = grad / ctx.temperature
        count = head.num_local_tokens
        weight_rows = weight[:count]
        bias_rows = None if bias is None else bias[:count]
        need_hidden, need_weight, need_bias = ctx.needs_input_grad[:3]
        grad_hidden = torch.empty_like(hidden) if need_hidden else None
        grad_weight = torch.zeros_like(weight, dtype=dtype) if need_weight else None
        grad_bias = torch.zeros_like(bias, dtype=dtype) if need_bias else None
        for rows in _chunks(len(hidden), head.vocab_size):
            logits = F.linear(hidden[rows], weight_rows, bias_rows)
            logits = _tempered(logits, ctx.temperature, dtype).to(dtype)
            g = grad[rows].unsqueeze(1)
            grad_logits = (logits - lse[rows].unsqueeze(1)).exp_().mul_(-g)
            index = targets[rows].unsqueeze(1) - head.vocab_start
            local = (index >= 0) & (index < count)
            if count:
                grad_logits.scatter_add_(1, index.where(local, 0), g.where(local, 0))
            grad_logits = grad_logits.to(hidden.dtype)
            if grad_hidden is not None:
                grad_hidden[rows] = grad_logits @ weight_rows
            if grad_weight is not None:
                grad_weight[:count] += grad_logits.T @ hidden[rows]
            if grad_bias is not None:
                grad_bias[:count] += grad_logits.sum(0)
        return (
            grad_hidden,
            None if grad_weight is None else grad_weight.to(weight.dtype),
            None if grad_bias is None else grad_bias.to(weight.dtype),
            None,
            None,
            None,
        )


def _compute_dtype(hidden: torch.Tensor) -> torch.dtype:
    return torch.promote_types(hidden.dtype, torch.float32)


def _tempered(
    logits: torch.Tensor, temperature: float, dtype: torch.dtype
) -> torch.Tensor:
    """The logits divided by the temperature, untouched at 1."""
    if temperature == 1.0:
        return logits
    # A tensor of one dim: CUDA multiplies by the reciprocal of a scalar, which has
    # other bits than the sampler's division.
    return logits.to(dtype) / logits.new_tensor([temperature], dtype=dtype)


def _chunks(num_tokens: int, vocab_size: int) -> Iterator[slice]:
    """Cut the tokens into the fewest chunks within the bound, of even sizes."""
    limit = max(1, MAX_LOGITS_PER_CHUNK // vocab_size)
    count = math.ceil(num_tokens / limit)
    for index in range(count):
        yield slice(index * num_tokens // count, (index + 1) * num_tokens // count)


def _check(
    hidden_states: torch.Tensor,
    head: _Head,
    targets: torch.Tensor,
    temperature: float,
) -> None:
    hidden_size = head.weight.shape[1]
    if hidden_states.ndim not in (2, 3) or hidden_states.shape[-1] != hidden_size:
        raise ValueError(
            f"hidden_states of shape {tuple(hidden_states.shape)} must be "
            f"[num_tokens, {hidden_size}] or [batch, seq, {hidden_size}]."
        )
    if hidden_states.dtype != head.weight.dtype:
        raise ValueError(
            f"hidden_states are {hidden_states.dtype}, but the head's weight is "
            f"{head.weight.dtype}; cast one to the other's dtype."
        )
    if targets.dtype != torch.int64 or targets.shape != hidden_states.shape[:-1]:
        raise ValueError(
            f"targets are {targets.dtype} of shape {tuple(targets.shape)}; they must "
            f"be torch.int64 of shape {tuple(hidden_states.shape[:-1])}."
        )
    if not (temperature > 0 and math.isfinite(temperature)):
        raise ValueError(
            f"temperature={temperature} must be positive and finite; for greedy "
            "decoding vLLM's raw logprobs have temperature 1."
        )
    if targets.device.type == "cpu" and targets.numel():
        low, high = targets.min().item(), targets.max().item()
        if low < 0 or high >= head.vocab_size:
            raise ValueError(
                f"targets go from {low} to {high}; token ids are 0 to "
                f"{head.vocab_size - 1}. Leave out tokens without a target."
            )
