# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""Log-probabilities of given tokens, without holding the logits of a whole batch."""

from __future__ import annotations

from typing import Literal, overload

import torch
from torch import nn

from vllm.model_executor.determinism.log_softmax import logprobs_of
from vllm.model_executor.layers.training.head_scoring import scored_head
from vllm.model_executor.layers.training.ops.logprobs.temperature import one_a_token


@overload
def token_logprobs(
    hidden_states: torch.Tensor,
    lm_head: nn.Module,
    targets: torch.Tensor,
    *,
    temperature: float | torch.Tensor = ...,
    return_entropy: Literal[False] = ...,
) -> torch.Tensor: ...


@overload
def token_logprobs(
    hidden_states: torch.Tensor,
    lm_head: nn.Module,
    targets: torch.Tensor,
    *,
    temperature: float | torch.Tensor = ...,
    return_entropy: Literal[True],
) -> tuple[torch.Tensor, torch.Tensor]: ...


def token_logprobs(
    hidden_states: torch.Tensor,
    lm_head: nn.Module,
    targets: torch.Tensor,
    *,
    temperature: float | torch.Tensor = 1.0,
    return_entropy: bool = False,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """Log-probability of each target under the head's softmax.

    Equal to ``log_softmax(lm_head(hidden_states), -1, dtype=torch.float32)`` at the
    targets, which is how vLLM's sampler computes logprobs; with a temperature the
    logits are first converted to fp32 and divided by it, as the sampler does.

    Memory: tokens and vocabulary are processed in blocks. At most 16 Mi logits on CPU
    and 96 Mi on CUDA exist at a time, in the head's dtype; a batch of no more keeps
    them for the backward, which computes those of a larger one again. A head that
    is called keeps what else it computes as well.

    Args:
        hidden_states: shape = [num_tokens, hidden_size] or [batch, seq, hidden_size],
            in the head's dtype; under autocast both are cast to its dtype. For a head
            with sequence_parallel each rank's slice of the tokens.
        lm_head: The head, any module that turns hidden states into logits of the whole
            vocabulary, on every rank. Of a `ParallelLMHead` or `torch.nn.Linear` that
            nothing changes the parameters are read. Any other (a subclass with its own
            forward, hooks, an adapter, a soft cap) is called, with blocks of tokens,
            shape = [rows, hidden_size], and again in the backward of a larger batch.
        targets: int64 or int32 token ids, the shape of hidden_states without the last
            dim; of all tokens on every rank.
        temperature: Divides the logits: a number, or a floating-point tensor that
            broadcasts to targets; at least 1e-5. It gets no gradient. vLLM raises a
            request's temperature to 0.01 at least.
        return_entropy: Return also the entropy of each token's distribution, in nats.

    Returns:
        fp32 (fp64 for fp64 inputs), the shape of targets; with return_entropy a tuple
        of two such, logprobs and entropies. Both can be differentiated once.

    Raises:
        TypeError: The head, the targets or the temperature have another type.
        ValueError: Shapes, dtypes, devices, token ids or a temperature are invalid, or
            FSDP holds the head's weight in shards. Token ids and a tensor's
            temperatures are checked on CPU. On CUDA, where reading them would wait for
            the device, a wrong id is an assertion of the device's, and temperatures are
            taken as they are.
    """
    hidden_states, head = scored_head(lm_head, hidden_states)
    tokens = _tokens(hidden_states, head.slices)
    targets = _checked(targets, tokens, hidden_states.device)
    temperatures = one_a_token(temperature, tokens, hidden_states)
    numbers = head.token_logprobs(hidden_states, targets, temperatures, return_entropy)
    return (numbers[0], numbers[1]) if return_entropy else numbers[0]


def full_logprobs(
    hidden_states: torch.Tensor,
    lm_head: nn.Module,
    *,
    temperature: float | torch.Tensor = 1.0,
) -> torch.Tensor:
    """Log-probabilities of the whole vocabulary, for example for distillation.

    The rows that `token_logprobs` takes its values from. They are held in fp32, so
    pass the hidden states of the tokens that are needed. Plain torch: can be
    differentiated as often as the head, outside of batch-invariant mode; over several
    ranks once.

    Args:
        hidden_states: As for `token_logprobs`.
        lm_head: As for `token_logprobs`, but called once, with hidden_states as given.
        temperature: As for `token_logprobs`.

    Returns:
        fp32 (fp64 for fp64 inputs), shape = [*hidden_states.shape[:-1], vocab_size], of
        all tokens on every rank.

    Raises:
        TypeError, ValueError: As `token_logprobs`.
    """
    hidden_states, head = scored_head(lm_head, hidden_states)
    tokens = _tokens(hidden_states, head.slices)
    temperatures = one_a_token(temperature, tokens, hidden_states)
    return logprobs_of(head.logits(hidden_states), temperatures)


def _tokens(hidden_states: torch.Tensor, slices: int) -> torch.Size:
    """Shape of all tokens, of which hidden_states may be a rank's slice."""
    *leading, tokens = hidden_states.shape[:-1]
    return torch.Size((*leading, tokens * slices))


def _checked(
    targets: torch.Tensor, tokens: torch.Size, device: torch.device
) -> torch.Tensor:
    """Targets as int64."""
    accepted = f"a tensor of torch.int64 or torch.int32, shape = {tuple(tokens)}"
    if not isinstance(targets, torch.Tensor):
        raise TypeError(
            f"targets is a {type(targets).__name__}; it must be {accepted}, such as "
            "torch.tensor(targets, device=hidden_states.device)."
        )
    if targets.dtype not in (torch.int64, torch.int32) or targets.shape != tokens:
        raise ValueError(
            f"targets are {targets.dtype} of shape {tuple(targets.shape)}; they must "
            f"be {accepted}."
        )
    if targets.device != device:
        raise ValueError(
            f"targets are on {targets.device}, the hidden states are on {device}; move "
            "them to one device."
        )
    return targets.long().contiguous()
