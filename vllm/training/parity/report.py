# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""The result of a comparison."""

from __future__ import annotations

import json
import math
from dataclasses import asdict, dataclass, field, replace

import torch

# What a comparison that knows nothing of the engine can say.
ASK_THE_ENGINE = (
    "parity.check(llm, model, prompts) names settings and weights with which trainer "
    "and engine cannot be equal: an engine outside batch-invariant mode, for one, or "
    "one of n tensor-parallel ranks and a trainer without tp_reduction_shards=n."
)


class ParityError(RuntimeError):
    """Trainer and engine differ."""


@dataclass(frozen=True)
class Difference:
    """A place where a logprob of the trainer differs from the engine's.

    Attributes:
        request: Index of the request among the outputs.
        completion: Index of the completion of that request.
        position: Of the token in its sequence, prompt included, counted from 0.
        token: Id of the token whose logprob differs; with the full vocabulary it need
            not be the one at the position.
        engine: The engine's logprob.
        trainer: The trainer's logprob.
        layer: Path of the first module whose output differs; None if not looked for,
            or if a prefill agrees in every module, so that decoding, the head or the
            sampler differs.
    """

    request: int
    completion: int
    position: int
    token: int
    engine: float
    trainer: float
    layer: str | None = None

    def __str__(self) -> str:
        text = f"request {self.request}"
        if self.completion:
            text += f" (completion {self.completion})"
        text += (
            f", position {self.position}, token {self.token}: engine "
            f"{self.engine!r}, trainer {self.trainer!r}"
        )
        return text + (f"; first differing layer {self.layer}" if self.layer else "")


@dataclass(frozen=True)
class ParityReport:
    """How the trainer's logprobs compare with the engine's.

    Attributes:
        tokens: Number of tokens compared, at least 1.
        equal: How many of them have the same logprobs bit for bit.
        max_abs_diff: Largest difference of two logprobs, in nats.
        kl: Of engine from trainer, in nats a token: the mean over the sampled tokens.
            With the full vocabulary it is exact; else estimated from the logprobs of
            the sampled tokens by exp(d) - 1 - d with d = trainer - engine, which is
            unbiased for tokens sampled at temperature 1 and never negative. 0 if no
            sampled token was compared.
        full_vocab: Whether the logprobs of the whole vocabulary were compared.
        first_difference: In the order of requests and positions.
        weights_compared: Whether the weights of both are known to be the same.
        weights_note: Why they are not known to be.
        differences: Trainer minus engine of each token, fp64, shape = [tokens]; with
            the full vocabulary that of the entry which differs most.
        next_step: What to look at if tokens differ.
    """

    tokens: int
    equal: int
    max_abs_diff: float
    kl: float
    full_vocab: bool
    first_difference: Difference | None
    weights_compared: bool = False
    weights_note: str = "compare() sees no engine, check() does"
    differences: torch.Tensor = field(
        repr=False, compare=False, default_factory=lambda: torch.zeros(0)
    )
    next_step: str = ASK_THE_ENGINE

    def __post_init__(self) -> None:
        if self.tokens < 1:
            raise ValueError(
                "No token was compared, which says nothing about parity. Give at least "
                "one output with logprobs: SamplingParams(logprobs=0, max_tokens=n)."
            )

    @property
    def all_equal(self) -> bool:
        """Whether every logprob is the same bit for bit."""
        return self.equal == self.tokens

    def raise_if_different(self) -> None:
        """Raise if a logprob differs.

        Raises:
            ParityError: A logprob differs. The message names the first difference.
        """
        if not self.all_equal:
            raise ParityError(
                f"Trainer and engine differ in {self.tokens - self.equal} of "
                f"{self.tokens} tokens, by at most {self.max_abs_diff:.3g} nats (KL "
                f"{self.kl:.3g}). First: {self.first_difference}. {self.next_step}"
            )

    def with_layer(self, layer: str | None) -> ParityReport:
        """The same report, its first difference localised."""
        assert self.first_difference is not None
        difference = replace(self.first_difference, layer=layer)
        return replace(self, first_difference=difference)

    def to_json(self) -> str:
        """All fields but `differences`, as a JSON object; infinities as text."""
        fields = asdict(replace(self, differences=torch.zeros(0)))
        del fields["differences"]
        fields["all_equal"] = self.all_equal
        return json.dumps(_finite(fields), indent=2)

    def __str__(self) -> str:
        compared = "logprobs of the vocabulary" if self.full_vocab else "logprobs"
        rows = {
            "tokens compared": f"{self.tokens} ({compared})",
            "equal bit for bit": str(self.equal),
            "max |difference|": f"{self.max_abs_diff:.3g}",
            "KL (nats per token)": f"{self.kl:.3g}",
            "first difference": str(self.first_difference or "none"),
            "weights": (
                "the same"
                if self.weights_compared
                else f"not compared ({self.weights_note})"
            ),
        }
        if not self.all_equal:
            rows["next step"] = self.next_step
        width = max(map(len, rows))
        return "\n".join(f"{name:{width}}   {value}" for name, value in rows.items())


def _finite(value: object) -> object:
    """JSON has no infinity and no NaN."""
    if isinstance(value, dict):
        return {key: _finite(each) for key, each in value.items()}
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    return value
