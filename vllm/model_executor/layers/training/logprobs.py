# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""Log-probabilities of given tokens, without holding the logits of a whole batch."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Literal, overload

import torch
from torch import nn
from torch.distributed.tensor import DTensor

from vllm.model_executor.layers.training.collectives import (
    all_gather_to_group,
    copy_to_group,
    gather_from_group,
)
from vllm.model_executor.layers.training.column_linear import SEQUENCE_DIM
from vllm.model_executor.layers.training.embedding import ParallelLMHead
from vllm.model_executor.layers.training.ops.library import autocast_dtype
from vllm.model_executor.layers.training.ops.linear.op import linear
from vllm.model_executor.layers.training.ops.logprobs.log_softmax import logprobs_of
from vllm.model_executor.layers.training.ops.logprobs.op import token_logprobs_op
from vllm.model_executor.parallel_context import ParallelContext


@overload
def token_logprobs(
    hidden_states: torch.Tensor,
    lm_head: ParallelLMHead | nn.Linear,
    targets: torch.Tensor,
    *,
    temperature: float = ...,
    return_entropy: Literal[False] = ...,
) -> torch.Tensor: ...


@overload
def token_logprobs(
    hidden_states: torch.Tensor,
    lm_head: ParallelLMHead | nn.Linear,
    targets: torch.Tensor,
    *,
    temperature: float = ...,
    return_entropy: Literal[True],
) -> tuple[torch.Tensor, torch.Tensor]: ...


def token_logprobs(
    hidden_states: torch.Tensor,
    lm_head: ParallelLMHead | nn.Linear,
    targets: torch.Tensor,
    *,
    temperature: float = 1.0,
    return_entropy: bool = False,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """Log-probability of each target under the head's softmax.

    Equal to ``log_softmax(lm_head(hidden_states), -1, dtype=torch.float32)`` at the
    targets, which is how vLLM's sampler computes logprobs; with a temperature the
    logits are first converted to fp32 and divided by it, as the sampler does.

    Memory: tokens and vocabulary are processed in blocks. At most 16 Mi logits on CPU
    and 96 Mi on CUDA exist at a time, in the head's dtype; a batch of no more keeps
    them for the backward, which computes those of a larger one again.

    Args:
        hidden_states: shape = [num_tokens, hidden_size] or [batch, seq, hidden_size],
            in the head's dtype; under autocast both are cast to its dtype. For a head
            with sequence_parallel each rank's slice of the tokens.
        lm_head: the head. Its parameters are read; its forward is not called.
        targets: int64 token ids, the shape of hidden_states without the last dim; of
            all tokens on every rank.
        temperature: divides the logits; above 0.
        return_entropy: return also the entropy of each token's distribution, in nats.

    Returns:
        fp32 (fp64 for fp64 inputs), the shape of targets; with return_entropy a tuple
        of two such, logprobs and entropies. Both can be differentiated once.

    Raises:
        TypeError: a head of another kind, or one with a forward of its own.
        ValueError: shapes, dtypes, targets or a temperature that do not fit; a head
            whose weight FSDP holds in shards.
    """
    hidden_states, head = _inputs(hidden_states, lm_head, temperature)
    if targets.dtype != torch.int64 or targets.shape != head.tokens_of(hidden_states):
        raise ValueError(
            f"targets are {targets.dtype} of shape {tuple(targets.shape)}; they must "
            f"be torch.int64 of shape {tuple(head.tokens_of(hidden_states))}."
        )
    devices = (hidden_states.device, head.weight.device, targets.device)
    if len(set(devices)) > 1:
        raise ValueError(
            "hidden_states, the head's weight and targets are on "
            f"{devices[0]}, {devices[1]} and {devices[2]}; move them to one device."
        )
    hidden_states = head.all_tokens(hidden_states)
    leaves = (hidden_states, head.weight, head.bias)
    logprobs, entropy, _, _ = token_logprobs_op(
        hidden_states.flatten(0, -2),
        head.weight,
        head.bias,
        targets.flatten(),
        temperature,
        head.vocab_size,
        head.vocab_start,
        head.context.group("tp").group_name if head.context.tp_size > 1 else "",
        return_entropy,
        torch.is_grad_enabled()
        and any(leaf is not None and leaf.requires_grad for leaf in leaves),
    )
    logprobs = logprobs.view(targets.shape)
    return (logprobs, entropy.view(targets.shape)) if return_entropy else logprobs


def full_logprobs(
    hidden_states: torch.Tensor,
    lm_head: ParallelLMHead | nn.Linear,
    *,
    temperature: float = 1.0,
) -> torch.Tensor:
    """Log-probabilities of the whole vocabulary, as a distillation loss needs them.

    The rows that `token_logprobs` takes its values from. They are held in fp32, so
    pass the hidden states of the tokens that are needed. Plain torch: can be
    differentiated any number of times, over several ranks once.

    Args:
        hidden_states: as for `token_logprobs`.
        lm_head: as for `token_logprobs`.
        temperature: divides the logits; above 0.

    Returns:
        fp32 (fp64 for fp64 inputs), shape = [*hidden_states.shape[:-1], vocab_size], of
        all tokens on every rank.

    Raises:
        TypeError, ValueError: as `token_logprobs`.
    """
    hidden_states, head = _inputs(hidden_states, lm_head, temperature)
    hidden_states = head.all_tokens(hidden_states)
    logits = linear(hidden_states, head.weight, head.bias)
    logits = gather_from_group(logits, head.context)[..., : head.vocab_size]
    return logprobs_of(logits, temperature)


@dataclass(frozen=True, eq=False)
class _Head:
    """What the computation needs of a head.

    Attributes:
        weight: shape = [rows on this rank, hidden_size]
        bias: shape = [rows on this rank] or None
        vocab_size: tokens over all ranks, without padding.
        vocab_start: the first token of this rank.
        context: names the tensor-parallel group.
        sequence_parallel: each rank has its slice of the hidden states' tokens.
    """

    weight: torch.Tensor
    bias: torch.Tensor | None
    vocab_size: int
    vocab_start: int
    context: ParallelContext
    sequence_parallel: bool

    def tokens_of(self, hidden_states: torch.Tensor) -> torch.Size:
        """The shape of all tokens, of which hidden_states may be a rank's slice."""
        *leading, tokens = hidden_states.shape[:-1]
        if self.sequence_parallel:
            tokens *= self.context.tp_size
        return torch.Size((*leading, tokens))

    def all_tokens(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """On every rank, for its part of the vocabulary."""
        if self.sequence_parallel:
            return all_gather_to_group(hidden_states, self.context, SEQUENCE_DIM)
        return copy_to_group(hidden_states, self.context)

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
        if isinstance(lm_head.weight, DTensor):
            raise ValueError(
                "The weight of lm_head is a DTensor, sharded over ranks as "
                "fully_shard leaves it between uses, and the head's forward, which "
                "would gather it, is not called. Do not pass the head itself to "
                "fully_shard but its parent, and call token_logprobs in or after the "
                "parent's forward (reshard_after_forward=False if it is not the root); "
                "or call lm_head.unshard() before."
            )
        if isinstance(lm_head, nn.Linear):
            return cls(
                lm_head.weight,
                lm_head.bias,
                lm_head.out_features,
                0,
                ParallelContext.single(),
                False,
            )
        return cls(
            lm_head.weight,
            lm_head.bias,
            lm_head.num_embeddings,
            lm_head.vocab_start_index,
            lm_head.parallel_context,
            lm_head.sequence_parallel,
        )


def _inputs(
    hidden_states: torch.Tensor,
    lm_head: ParallelLMHead | nn.Linear,
    temperature: float,
) -> tuple[torch.Tensor, _Head]:
    """Checked, and in autocast's dtype where that is on."""
    head = _Head.of(lm_head)
    dtype = autocast_dtype(hidden_states)
    if dtype is not None:
        hidden_states, head = hidden_states.to(dtype), head.to(dtype)
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
    if not 0 < temperature < math.inf:
        raise ValueError(
            f"temperature={temperature} must be positive and finite; for greedy "
            "decoding vLLM's raw logprobs have temperature 1."
        )
    return hidden_states, head
