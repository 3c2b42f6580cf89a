# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""What adopted models are called with, and the tokens that an engine should give."""

from collections.abc import Callable

import torch

from vllm import LLM, SamplingParams

PROMPTS = [[5, 6, 7, 8, 9], [10, 11, 12], [3 + i % 90 for i in range(40)], [4]]


def token_ids(*shape: int, first: int = 0, vocabulary: int = 128) -> torch.Tensor:
    """The same random tokens each time, from `first` on."""
    generator = torch.Generator().manual_seed(1)
    return torch.randint(first, vocabulary, shape, generator=generator)


def assert_greedy_tokens(
    logits: Callable[[torch.Tensor], torch.Tensor], llm: LLM, tolerance: float
) -> None:
    """Each token has the largest logit of the unmodified model, or nearly so.

    Args:
        logits: Of tokens, shape = [1, seq], the unmodified model's, shape = [1, seq,
            vocab_size].
        llm: The engine of the adopted model.
        tolerance: How far below the largest a token's logit may be.
    """
    sampling = SamplingParams(temperature=0, max_tokens=8, detokenize=False)
    prompts = [{"prompt_token_ids": prompt} for prompt in PROMPTS]
    for prompt, output in zip(PROMPTS, llm.generate(prompts, sampling)):
        tokens = prompt + list(output.outputs[0].token_ids)
        with torch.no_grad():
            rows = logits(torch.tensor([tokens]))[0].float()
        for place in range(len(prompt), len(tokens)):
            row = rows[place - 1]
            assert row[tokens[place]] >= row.max() - tolerance
