# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""A batch-invariant engine in a process of its own."""

from collections.abc import Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any

import torch

from tests.parity import in_engine
from tests.parity.processes import Process

# Requests at a time; the tokens of a step are odd, so that prompts are cut at odd
# places, and the cache is so small that requests get in each other's way.
OPTIONS = {
    "max_num_seqs": 64,
    "max_num_batched_tokens": 131,
    "max_model_len": 2048,
    "max_logprobs": -1,
}


@dataclass
class Sample:
    """One request's prompt and completion.

    Attributes:
        prompt: token ids.
        completion: token ids.
        prompt_logprobs: of all prompt tokens but the first, fp32; empty if not asked
            for.
        logprobs: of the completion's tokens, fp32, shape = [n] or [n, vocab_size].
        cached: how many tokens of the prompt were found in the prefix cache.
    """

    prompt: list[int]
    completion: list[int]
    prompt_logprobs: torch.Tensor
    logprobs: torch.Tensor
    cached: int

    @property
    def tokens(self) -> list[int]:
        return self.prompt + self.completion


def of_completions(
    values: Sequence[torch.Tensor], samples: Sequence[Sample]
) -> list[torch.Tensor]:
    """Of each sequence's logprobs, without its first token's, the completion's."""
    return [row[len(s.prompt) - 1 :] for row, s in zip(values, samples, strict=True)]


@dataclass
class Engine:
    """Starts engines in one process, one at a time.

    Attributes:
        options: of the engine that runs or begins to; empty if there is none.
        starting: done when it runs.
    """

    process: Process
    options: dict[str, Any] = field(default_factory=dict)
    starting: Future | None = None

    def begin(self, **options: Any) -> None:
        """Begin to start an engine of these options, unless it runs already."""
        options = OPTIONS | options
        if options != self.options:
            self.options = options
            self.starting = self.process.submit(in_engine.start, options)

    def start(self, **options: Any) -> None:
        """Have an engine of these options."""
        self.begin(**options)
        try:
            self.process.result(self.starting)
        except BaseException:
            self.options = {}
            raise

    def stop(self) -> None:
        self.options = {}
        self.process.call(in_engine.stop)

    def sample(
        self, prompts: Sequence[Sequence[int]], max_tokens: int, **params: Any
    ) -> list[Sample]:
        """Generate for all prompts at once; `params` as of `SamplingParams`.

        Returns:
            All completions of the first prompt, then those of the next.
        """
        each = params | {"max_tokens": max_tokens}
        return self.sample_each(prompts, [each] * len(prompts))

    def sample_each(
        self, prompts: Sequence[Sequence[int]], params: Sequence[dict[str, Any]]
    ) -> list[Sample]:
        """As `sample`, with parameters for each prompt."""
        outputs = self.process.call(
            in_engine.generate,
            [list(prompt) for prompt in prompts],
            [{"temperature": 1.0, "logprobs": 0} | each for each in params],
        )
        return [
            Sample(
                list(prompt),
                completion["completion"],
                torch.from_numpy(completion["prompt_logprobs"]),
                torch.from_numpy(completion["logprobs"]),
                completion["cached"],
            )
            for prompt, completions in zip(prompts, outputs, strict=True)
            for completion in completions
        ]

    def prefill(self, sequences: Sequence[Sequence[int]]) -> list[torch.Tensor]:
        """Logprobs of the sequences as prompts, all tokens but the first."""
        samples = self.sample(sequences, 1, prompt_logprobs=0)
        return [sample.prompt_logprobs for sample in samples]

    def reload_weights(self) -> None:
        """Read the weights again and forget what was computed with the old."""
        self.process.call(in_engine.reload_weights)

    def counter(self, name: str) -> int:
        """What one of vLLM's counters has counted since the start."""
        return self.process.call(in_engine.counter, name)
