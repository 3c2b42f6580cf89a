# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""Log-probabilities of given tokens under a model, whatever its forward looks like."""

from __future__ import annotations

from typing import Literal, NamedTuple, overload

import torch
from torch import nn
from torch.distributed.fsdp import FSDPModule
from torch.nn.utils.rnn import pad_sequence
from torch.utils._pytree import tree_map

from vllm.model_executor.layers import training as layers
from vllm.model_executor.models.builder.body import Body, Traced
from vllm.model_executor.models.builder.spec import INFERRED, BuilderOptions


@overload
def token_logprobs(
    model: nn.Module,
    input_ids: torch.Tensor,
    targets: torch.Tensor,
    *,
    positions: torch.Tensor | None = ...,
    cu_seqlens: torch.Tensor | None = ...,
    temperature: float | torch.Tensor = ...,
    return_entropy: Literal[False] = ...,
    options: BuilderOptions = ...,
) -> torch.Tensor: ...


@overload
def token_logprobs(
    model: nn.Module,
    input_ids: torch.Tensor,
    targets: torch.Tensor,
    *,
    positions: torch.Tensor | None = ...,
    cu_seqlens: torch.Tensor | None = ...,
    temperature: float | torch.Tensor = ...,
    return_entropy: Literal[True],
    options: BuilderOptions = ...,
) -> tuple[torch.Tensor, torch.Tensor]: ...


def token_logprobs(
    model: nn.Module,
    input_ids: torch.Tensor,
    targets: torch.Tensor,
    *,
    positions: torch.Tensor | None = None,
    cu_seqlens: torch.Tensor | None = None,
    temperature: float | torch.Tensor = 1.0,
    return_entropy: bool = False,
    options: BuilderOptions = INFERRED,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """Log-probability of each target under a model, as an engine computes it.

    The model is a training-only module. It is called as the engine calls it, without
    its head, and `layers.training.token_logprobs` computes logprobs with the head and
    what follows it, in blocks. In batch-invariant mode the result is bitwise identical
    to the engine's if the model's layers are.

        logprobs = token_logprobs(model, tokens[:, :-1], tokens[:, 1:])

    A model without a parameter `cu_seqlens` gets packed sequences as rows of one batch,
    padded behind to the longest.

    Args:
        model: The model, in the mode in which it is to run.
        input_ids: int64, shape = [batch, seq], or [num_tokens] with `cu_seqlens`.
            Sequences begin at the first token of a row; what follows their end is
            ignored by earlier tokens.
        targets: The token to score at each place, such as the next one; int64 or int32,
            the shape of input_ids.
        positions: Of the tokens, the shape of input_ids. Default: counted from 0 in
            each sequence.
        cu_seqlens: int32 bounds of packed sequences, shape = [sequences + 1].
        temperature: Divides the logits; see `layers.training.token_logprobs`.
        return_entropy: Return also the entropy of each token's distribution.
        options: What cannot be inferred from the model, as for `@model_builder`.

    Returns:
        fp32 (fp64 for a model in fp64), the shape of targets; with return_entropy a
        tuple of two such, logprobs and entropies. Both can be differentiated once.

    Raises:
        TypeError: `forward` cannot be called with tokens, or does more to its head's
            output than a function of each logit.
        ValueError: Shapes do not fit, or the head cannot be found.
    """
    scored = _scored(
        model, input_ids, targets, positions, cu_seqlens, temperature, options
    )
    numbers = layers.token_logprobs(
        scored.hidden_states,
        scored.head,
        scored.flat(targets),
        temperature=scored.temperature,
        return_entropy=return_entropy,  # type: ignore[call-overload]
    )
    return tree_map(lambda each: each.view(input_ids.shape), numbers)


def weighted_nll(
    model: nn.Module,
    input_ids: torch.Tensor,
    targets: torch.Tensor,
    weights: torch.Tensor,
    *,
    positions: torch.Tensor | None = None,
    cu_seqlens: torch.Tensor | None = None,
    temperature: float | torch.Tensor = 1.0,
    options: BuilderOptions = INFERRED,
) -> tuple[torch.Tensor, torch.Tensor]:
    """A loss that is linear in the logprobs: -sum of weights * token_logprobs.

    For cross entropy and for on-policy policy gradients; it takes less time than
    `token_logprobs` and its backward, see `layers.training.weighted_nll`.

        loss, logprobs = weighted_nll(model, tokens[:, :-1], tokens[:, 1:], weights)

    Args:
        model: As for `token_logprobs`, and so are input_ids, targets, positions,
            cu_seqlens, temperature and options.
        weights: What each logprob is multiplied by, 0 for tokens that do not count;
            floating point, the shape of targets.

    Returns:
        The loss, fp32 (fp64 for a model in fp64), shape = [], and logprobs in the shape
        of targets, without a gradient.

    Raises:
        TypeError, ValueError: As `token_logprobs`; weights that do not fit.
    """
    scored = _scored(
        model, input_ids, targets, positions, cu_seqlens, temperature, options
    )
    loss, logprobs = layers.weighted_nll(
        scored.hidden_states,
        scored.head,
        scored.flat(targets),
        scored.flat(weights),
        temperature=scored.temperature,
    )
    return loss, logprobs.view(input_ids.shape)


class _Scored(NamedTuple):
    """What the head's numbers are computed from.

    Attributes:
        hidden_states: shape = [num_tokens, hidden_size], or [batch, seq, hidden_size].
        head: With what the model does to its output.
        temperature: Of the tokens, in the shape that hidden_states have.
        flattened: Whether a batch was flattened.
    """

    hidden_states: torch.Tensor
    head: nn.Module
    temperature: float | torch.Tensor
    flattened: bool

    def flat(self, of_tokens: torch.Tensor) -> torch.Tensor:
        """One number a token, in the shape that hidden_states have."""
        return of_tokens.flatten() if self.flattened else of_tokens


def _scored(
    model: nn.Module,
    input_ids: torch.Tensor,
    targets: torch.Tensor,
    positions: torch.Tensor | None,
    cu_seqlens: torch.Tensor | None,
    temperature: float | torch.Tensor,
    options: BuilderOptions,
) -> _Scored:
    _refuse_one_group(model)
    body = Body(model, options, "the trainer")
    body.set_head(body.find_head("token_logprobs"))
    _check(body, input_ids, targets, positions, cu_seqlens)
    shape = input_ids.shape
    if positions is None:
        positions = _counted(input_ids, cu_seqlens)
    flattens = len(shape) == 2 and not body.convention.batched
    if flattens:
        batch, seq = shape
        cu_seqlens = torch.arange(
            0, batch * seq + 1, seq, dtype=torch.int32, device=input_ids.device
        )
        if isinstance(temperature, torch.Tensor):
            temperature = temperature.expand(shape).flatten()
        input_ids, positions = input_ids.flatten(), positions.flatten()
    hidden_states, tail = _hidden_states(body, input_ids, positions, cu_seqlens)
    return _Scored(hidden_states, body.head_with(tail), temperature, flattens)


def _refuse_one_group(model: nn.Module) -> None:
    """Refuse FSDP2 of the whole model as one group.

    What such a model returns has no gradient here: the hidden states leave it at its
    head. So FSDP2 would not notice the backward, and reduce nothing.
    """
    groups = [part for part in model.modules() if isinstance(part, FSDPModule)]
    if torch.is_grad_enabled() and groups == [model]:
        raise ValueError(
            f"fully_shard was called on {type(model).__name__} alone, so gradients of "
            "this call would not be reduced over the ranks. Call fully_shard on its "
            "layers before; or call layers.training.token_logprobs in its forward."
        )


def _check(
    body: Body,
    input_ids: torch.Tensor,
    targets: torch.Tensor,
    positions: torch.Tensor | None,
    cu_seqlens: torch.Tensor | None,
) -> None:
    if input_ids.ndim != (2 if cu_seqlens is None else 1):
        raise ValueError(
            f"input_ids of shape {tuple(input_ids.shape)} must be [batch, seq], or "
            "[num_tokens] with cu_seqlens."
        )
    for name, tensor in (("targets", targets), ("positions", positions)):
        if tensor is not None and tensor.shape != input_ids.shape:
            raise ValueError(
                f"{name} of shape {tuple(tensor.shape)} must have the shape of "
                f"input_ids, {tuple(input_ids.shape)}."
            )
    if positions is not None and body.convention.positions is None:
        raise ValueError(
            f"positions were given, and forward of {type(body.module).__name__} takes "
            "none. Leave them out, or name its parameter: "
            "options=BuilderOptions(positions='name')."
        )


def _counted(input_ids: torch.Tensor, cu_seqlens: torch.Tensor | None) -> torch.Tensor:
    """Positions of sequences that begin at 0."""
    places = torch.arange(input_ids.shape[-1], device=input_ids.device)
    if cu_seqlens is None:
        return places.expand(input_ids.shape).contiguous()
    starts = cu_seqlens[:-1].long()
    lengths = cu_seqlens.diff()
    return places - starts.repeat_interleave(lengths, output_size=len(input_ids))


def _hidden_states(
    body: Body,
    input_ids: torch.Tensor,
    positions: torch.Tensor,
    cu_seqlens: torch.Tensor | None,
) -> Traced:
    """What the head receives of each token, and what follows it."""
    if body.convention.packed:
        return body.traced(input_ids, positions, None, cu_seqlens)
    if cu_seqlens is None:
        return body.traced(input_ids, positions)
    lengths = cu_seqlens.diff().tolist()
    if body.convention.batched:
        rows = (x.split(lengths) for x in (input_ids, positions))
        padded = (pad_sequence(each, batch_first=True) for each in rows)
        states, tail = body.traced(*padded)
        kept = [row[:length] for row, length in zip(states, lengths)]
        return Traced(torch.cat(kept), tail)
    sequences = zip(input_ids.split(lengths), positions.split(lengths))
    found = [body.traced(*each) for each in sequences]
    if any(each.tail != found[0].tail for each in found):
        raise TypeError(
            f"forward of {type(body.module).__name__} does something else to the "
            "logits of each sequence, so they cannot be scored together."
        )
    return Traced(torch.cat([each.hidden_states for each in found]), found[0].tail)
