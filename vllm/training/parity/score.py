# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""The trainer's logprobs of given sequences, computed as the engine computes them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import nn

from vllm.model_executor.determinism.mode import batch_invariant
from vllm.model_executor.layers.training import full_logprobs, token_logprobs
from vllm.model_executor.models.builder.body import Body
from vllm.model_executor.models.builder.spec import INFERRED, BuilderOptions

# Tokens of one packed forward. More would be no faster.
PACK = 16384
# Rows of the vocabulary's logprobs that exist at a time.
FULL_ROWS = 256


class Scorer:
    """Scores tokens with a training model, without gradients, in the mode.

    A model whose `forward` has a parameter `cu_seqlens` gets sequences packed, any
    other gets one sequence at a time, shape = [1, seq].

    Args:
        model: its forward gives logits for token ids and positions.
        options: what was said of it.

    Attributes:
        head: gives its logits for hidden states, once they were computed.
    """

    def __init__(self, model: nn.Module, options: BuilderOptions = INFERRED) -> None:
        self.model = model
        self.body = Body(model, options, "the trainer")
        parameter = next(model.parameters(), None)
        if parameter is None:
            raise ValueError(f"{type(model).__name__} has no parameters to compare.")
        self.device = parameter.device
        self.body.set_head(self.body.find_head("parity"))
        self.head = self.body.head

    def hidden_states(
        self,
        sequences: Sequence[Sequence[int]],
        positions: Sequence[Sequence[int]],
    ) -> torch.Tensor:
        """What the head receives at some positions of each sequence, one by one.

        Returns:
            shape = [number of positions, hidden_size].

        Raises:
            TypeError: the model changes the output of its head by more than a function
                of each logit.
        """
        chosen = iter(positions)
        found = []
        with _scoring(self.model):
            for pack in self._packs(sequences):
                output, tail = self.body.traced(*self._tokens(pack))
                self.head = self.body.head_with(tail)
                rows = output.reshape(-1, output.shape[-1])
                for states in rows.split([len(sequence) for sequence in pack]):
                    found.append(states[torch.tensor(list(next(chosen)))])
        return torch.cat(found)

    def token_logprobs(
        self, hidden_states: torch.Tensor, targets: torch.Tensor, temperature: float
    ) -> torch.Tensor:
        """fp32, shape = [num_tokens], on CPU."""
        with _scoring(self.model):
            return token_logprobs(
                hidden_states, self.head, targets, temperature=temperature
            ).cpu()

    def full_logprobs(
        self, hidden_states: torch.Tensor, temperature: float
    ) -> Iterator[torch.Tensor]:
        """fp32 rows, shape = [at most FULL_ROWS, vocab_size], on CPU."""
        for rows in hidden_states.split(FULL_ROWS):
            with _scoring(self.model):
                logprobs = full_logprobs(rows, self.head, temperature=temperature)
            yield logprobs.cpu()

    def _packs(self, sequences: Sequence[Sequence[int]]) -> Iterator[list[list[int]]]:
        pack: list[list[int]] = []
        for sequence in sequences:
            total = sum(map(len, pack)) + len(sequence)
            if pack and (not self.body.convention.packed or total > PACK):
                yield pack
                pack = []
            pack.append(list(sequence))
        if pack:
            yield pack

    def _tokens(self, pack: list[list[int]]) -> tuple[torch.Tensor | None, ...]:
        """Arguments of the model's call."""
        lengths = [len(sequence) for sequence in pack]
        ids = torch.tensor([i for each in pack for i in each], device=self.device)
        positions = torch.cat([torch.arange(n, device=self.device) for n in lengths])
        if not self.body.convention.packed:
            return ids, positions
        bounds = torch.tensor([0, *lengths], device=self.device)
        return ids, positions, None, bounds.cumsum(0, dtype=torch.int32)


@contextmanager
def _scoring(model: nn.Module) -> Iterator[None]:
    """Without gradients, in batch-invariant and in evaluation mode."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        with torch.no_grad(), batch_invariant():
            yield
    finally:
        for module in training:
            module.training = True
