# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""Comparing logprobs that an engine has given with the trainer's."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import nn

from vllm.model_executor.models.builder.spec import BuilderOptions
from vllm.training.parity.report import Difference, ParityReport
from vllm.training.parity.score import FULL_ROWS, Scorer

if TYPE_CHECKING:
    from vllm import RequestOutput
    from vllm.logprobs import Logprob


@dataclass(frozen=True)
class ScoredToken:
    """A token for which the engine gave a logprob; see `Difference`."""

    request: int
    completion: int
    position: int
    token: int
    logprobs: Mapping[int, Logprob]
    sampled: bool


@dataclass(frozen=True)
class TokenDifferences:
    """Of some tokens, one element each; values are those that differ most.

    Attributes:
        equal: bool.
        token: Ids, int64.
        engine: Logprobs, fp32.
        trainer: Logprobs, fp32.
        kl: Each token's term of the KL, fp64.
    """

    equal: torch.Tensor
    token: torch.Tensor
    engine: torch.Tensor
    trainer: torch.Tensor
    kl: torch.Tensor


def compare(
    model: nn.Module,
    outputs: Sequence[RequestOutput],
    *,
    full_vocab: bool = False,
    temperature: float = 1.0,
    batched: bool | None = None,
    head: str | None = None,
    positions: str | None = None,
) -> ParityReport:
    """Compare the logprobs in an engine's outputs with the trainer's, bit for bit.

    This compares every sampled token, and every prompt token whose logprob the outputs
    contain. It does not know the engine's settings; `check` raises for engines that
    cannot be equal.

    Args:
        model: The training model, with the engine's weights.
        outputs: The outputs of `LLM.generate` with SamplingParams(logprobs=0).
        full_vocab: Compare the logprobs of all tokens of the vocabulary, which
            SamplingParams(logprobs=-1) gives.
        temperature: Temperature of the logprobs of sampled tokens: 1, unless the engine
            was started with logprobs_mode="processed_logprobs". In that case it is the
            temperature of the sampling, which must not use top_k, top_p, min_p,
            penalties or biases.
        batched: Whether the model takes `[batch, seq]`; see `BuilderOptions.batched`.
        head: Path of the module that gives logits. Default: `lm_head`, else the only
            module, except for embeddings, with a weight of the embedding's shape.
        positions: Name of the parameter for positions; see `BuilderOptions.positions`.

    Raises:
        ValueError: There is no token to compare, the outputs lack logprobs, or the
            model's head cannot be found.
        TypeError: The model changes the output of its head by more than a function of
            each logit.
    """
    scorer = Scorer(model, BuilderOptions(head, batched, positions=positions))
    return compare_with(scorer, outputs, full_vocab, temperature)


def compare_with(
    scorer: Scorer,
    outputs: Sequence[RequestOutput],
    full_vocab: bool,
    temperature: float,
) -> ParityReport:
    """`compare` with a model that is ready to score."""
    sequences: list[list[int]] = []
    tokens: list[list[ScoredToken]] = []
    for request, output in enumerate(outputs):
        for sequence, scored in _scored_tokens(request, output):
            if scored:
                sequences.append(sequence)
                tokens.append(scored)
    flat = [token for scored in tokens for token in scored]
    if not flat:
        raise ValueError(
            "The outputs hold no token with a logprob, so there is nothing to compare. "
            "Give at least one prompt and generate with "
            "SamplingParams(logprobs=0, max_tokens=n)."
        )
    rows = scorer.hidden_states(
        sequences, [[each.position - 1 for each in scored] for scored in tokens]
    )
    found: TokenDifferences | None = None
    for sampled in (True, False):
        places = [i for i, token in enumerate(flat) if token.sampled == sampled]
        if not places:
            continue
        part = _differences(
            scorer,
            rows[places],
            [flat[i] for i in places],
            full_vocab,
            temperature if sampled else 1.0,
        )
        found = found or _empty(len(flat))
        for name, values in vars(part).items():
            getattr(found, name)[places] = values
    assert found is not None
    return _report(flat, found, full_vocab)


def _scored_tokens(
    request: int, output: RequestOutput
) -> Iterator[tuple[list[int], list[ScoredToken]]]:
    """Each completion's sequence, and its tokens that have logprobs."""
    prompt = list(output.prompt_token_ids or ())
    of_prompt = output.prompt_logprobs or ()
    for index, completion in enumerate(output.outputs):
        ids = list(completion.token_ids)
        if ids and not completion.logprobs:
            raise ValueError(
                f"Output {request} has no logprobs; generate with "
                "SamplingParams(logprobs=0), or logprobs=-1 for the full vocabulary."
            )
        if len(completion.logprobs or ()) != len(ids) or not all(
            completion.logprobs or ()
        ):
            raise ValueError(
                f"Output {request} has {len(ids)} tokens, but not a logprob for each; "
                "pass the outputs as the engine returned them."
            )
        sequence = prompt + ids
        # A prompt's are the same in every completion; its first token has none.
        entries = list(enumerate(of_prompt)) if index == 0 else []
        entries += enumerate(completion.logprobs or (), len(prompt))
        yield (
            sequence,
            [
                ScoredToken(
                    request,
                    index,
                    position,
                    sequence[position],
                    logprobs,
                    position >= len(prompt),
                )
                for position, logprobs in entries
                if position > 0 and logprobs
            ],
        )


def _empty(count: int) -> TokenDifferences:
    return TokenDifferences(
        torch.zeros(count, dtype=torch.bool),
        torch.zeros(count, dtype=torch.int64),
        torch.zeros(count),
        torch.zeros(count),
        torch.zeros(count, dtype=torch.float64),
    )


def _differences(
    scorer: Scorer,
    rows: torch.Tensor,
    tokens: list[ScoredToken],
    full_vocab: bool,
    temperature: float,
) -> TokenDifferences:
    if not full_vocab:
        ids = torch.tensor([token.token for token in tokens])
        trainer = scorer.token_logprobs(rows, ids.to(rows.device), temperature)
        values = [token.logprobs[token.token].logprob for token in tokens]
        engine = torch.tensor(values, dtype=torch.float32)
        gap = _gap(engine, trainer)
        return TokenDifferences(
            engine == trainer, ids, engine, trainer, gap.exp() - 1 - gap
        )
    parts = []
    for start, trainer in zip(
        range(0, len(tokens), FULL_ROWS), scorer.full_logprobs(rows, temperature)
    ):
        engine = _engine_rows(tokens[start : start + FULL_ROWS], trainer.shape[1])
        gap = _gap(engine, trainer)
        most = gap.abs().argmax(1, keepdim=True)
        weight = engine.double().exp()
        parts.append(
            TokenDifferences(
                (engine == trainer).all(1),
                most[:, 0],
                engine.gather(1, most)[:, 0],
                trainer.gather(1, most)[:, 0],
                torch.where(weight > 0, -weight * gap, 0.0).sum(1),
            )
        )
    return TokenDifferences(
        *(torch.cat(values) for values in zip(*(vars(p).values() for p in parts)))
    )


def _gap(engine: torch.Tensor, trainer: torch.Tensor) -> torch.Tensor:
    """Trainer minus engine, fp64; infinite where one is NaN."""
    gap = (trainer.double() - engine.double()).nan_to_num(
        nan=math.inf, posinf=math.inf, neginf=-math.inf
    )
    return torch.where(engine == trainer, 0.0, gap)


def _engine_rows(tokens: list[ScoredToken], vocab_size: int) -> torch.Tensor:
    """The engine's logprobs of the vocabulary, fp32, shape = [tokens, vocab_size]."""
    for token in tokens:
        if len(token.logprobs) < vocab_size:
            raise ValueError(
                f"full_vocab=True needs the logprobs of all {vocab_size} tokens, but "
                f"output {token.request} has {len(token.logprobs)} at position "
                f"{token.position}. Start the engine with max_logprobs=-1 and generate "
                f"with SamplingParams({'' if token.sampled else 'prompt_'}logprobs=-1)."
            )
    return torch.tensor(
        [[token.logprobs[i].logprob for i in range(vocab_size)] for token in tokens],
        dtype=torch.float32,
    )


def _report(
    tokens: list[ScoredToken], found: TokenDifferences, full_vocab: bool
) -> ParityReport:
    gaps = _gap(found.engine, found.trainer)
    sampled = torch.tensor([token.sampled for token in tokens])
    first = None
    if not bool(found.equal.all()):
        index = min(
            torch.nonzero(~found.equal)[:, 0].tolist(),
            key=lambda i: (tokens[i].request, tokens[i].completion, tokens[i].position),
        )
        token = tokens[index]
        first = Difference(
            token.request,
            token.completion,
            token.position,
            int(found.token[index]),
            float(found.engine[index]),
            float(found.trainer[index]),
        )
    return ParityReport(
        tokens=len(tokens),
        equal=int(found.equal.sum()),
        max_abs_diff=float(gaps.abs().max()),
        kl=float(found.kl[sampled].mean()) if bool(sampled.any()) else 0.0,
        full_vocab=full_vocab,
        first_difference=first,
        differences=gaps,
    )
