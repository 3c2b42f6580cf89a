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


def weighted_nll(
    hidden_states: torch.Tensor,
    lm_head: nn.Module,
    targets: torch.Tensor,
    weights: torch.Tensor,
    *,
    temperature: float | torch.Tensor = 1.0,
) -> tuple[torch.Tensor, torch.Tensor]:
    """A loss that is linear in the logprobs: -sum of weights * token_logprobs.

    Its gradients are computed in the forward, from logits that are there, so it takes
    three products with the head where `token_logprobs` and its backward take four.
    Cross entropy is such a loss: weights of 1 / num_tokens. So are REINFORCE, GRPO and
    PPO where the ratio of probabilities is 1, as it is on-policy with equal bits:
    weights of advantage / num_tokens.

        loss, logprobs = weighted_nll(hidden_states, lm_head, targets, weights)
        loss.backward()

    The weight's gradient is kept from the forward on, as large as the weight. For a
    16-bit head on CUDA it is rounded once for each block of 256 Mi logits. A head that
    is called (see `token_logprobs`) is differentiated as there.

    Args:
        hidden_states: As for `token_logprobs`.
        lm_head: As for `token_logprobs`.
        targets: As for `token_logprobs`.
        weights: What each logprob is multiplied by, 0 for tokens that do not count;
            floating point, the shape of targets. It gets no gradient.
        temperature: As for `token_logprobs`.

    Returns:
        The loss, fp32 (fp64 for fp64 inputs), shape = [], and logprobs in the shape of
        targets, without a gradient. In batch-invariant mode and on CPU the logprobs
        have the bits of `token_logprobs`. The loss can be differentiated once, with one
        backward.

    Raises:
        TypeError: As `token_logprobs`; weights are not floating point.
        ValueError: As `token_logprobs`; weights of another shape or device, or with a
            gradient.
    """
    hidden_states, head = scored_head(lm_head, hidden_states)
    tokens = _tokens(hidden_states, head.slices)
    targets = _checked(targets, tokens, hidden_states.device)
    weights = _checked_weights(weights, targets, hidden_states)
    temperatures = one_a_token(temperature, tokens, hidden_states)
    return head.weighted_nll(hidden_states, targets, weights, temperatures)


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


def _checked_weights(
    weights: torch.Tensor, targets: torch.Tensor, hidden_states: torch.Tensor
) -> torch.Tensor:
    """Weights in the dtype of logprobs, contiguous."""
    accepted = f"a floating-point tensor, shape = {tuple(targets.shape)}"
    if not isinstance(weights, torch.Tensor) or not weights.is_floating_point():
        given = getattr(weights, "dtype", type(weights).__name__)
        raise TypeError(f"weights are {given}; they must be {accepted}.")
    if weights.shape != targets.shape or weights.device != targets.device:
        raise ValueError(
            f"weights of shape {tuple(weights.shape)} on {weights.device} must be "
            f"{accepted}, on {targets.device}."
        )
    if weights.requires_grad:
        raise ValueError(
            "weights require a gradient, which weighted_nll does not compute. Pass "
            "weights.detach(), or compute the loss from token_logprobs."
        )
    dtype = torch.promote_types(hidden_states.dtype, torch.float32)
    return weights.to(dtype).contiguous()
