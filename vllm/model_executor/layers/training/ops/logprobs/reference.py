# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""Specification of the log-probabilities and their gradient, in plain torch."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from vllm.model_executor.determinism.log_softmax_reference import log_softmax, tempered


def entropy_reference(logprobs: torch.Tensor) -> torch.Tensor:
    """-sum p log p over the last dim; a token of probability 0 adds 0."""
    finite = logprobs.clamp_min(-1000.0)
    return -(logprobs.exp() * finite).sum(-1)


def token_logprobs_reference(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    targets: torch.Tensor,
    temperature: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Log-probabilities of the targets and entropies of the rows, by autograd.

    Args:
        hidden: shape = [num_tokens, hidden_size]
        weight: shape = [vocab_size, hidden_size]
        bias: shape = [vocab_size] or None
        targets: int64, shape = [num_tokens]
        temperature: divides the logits, shape = [num_tokens]; None for 1.

    Returns:
        Both fp32 (fp64 for fp64 inputs), shape = [num_tokens].
    """
    logprobs = log_softmax(tempered(F.linear(hidden, weight, bias), temperature))
    at_targets = logprobs.gather(-1, targets.unsqueeze(-1)).squeeze(-1)
    return at_targets, entropy_reference(logprobs)


def logits_gradient_reference(
    logits: torch.Tensor,
    lse: torch.Tensor,
    targets: torch.Tensor,
    grad: torch.Tensor,
    entropy: torch.Tensor | None,
    grad_entropy: torch.Tensor | None,
    temperature: torch.Tensor | None,
    dtype: torch.dtype,
) -> torch.Tensor:
    """Gradient of the logits; arguments as in `logits_gradient`."""
    logprobs = tempered(logits.to(lse.dtype), temperature) - lse.unsqueeze(1)
    slope = grad.unsqueeze(1)
    if entropy is not None and grad_entropy is not None:
        # Where the probability is 0 in any dtype; times -inf it would be NaN.
        finite = logprobs.clamp_min(-1000.0)
        slope = slope + grad_entropy.unsqueeze(1) * (finite + entropy.unsqueeze(1))
    gradient = logprobs.exp() * -slope
    columns = torch.arange(logits.shape[1], device=logits.device)
    at_target = columns == targets.unsqueeze(1)
    return (gradient + grad.unsqueeze(1).where(at_target, 0)).to(dtype)
