# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""The trainer's logprobs, and a trainer of two tensor-parallel ranks."""

import socket
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from tests.parity.processes import Process
from vllm import training
from vllm.model_executor.determinism.mode import batch_invariant
from vllm.model_executor.layers.training import token_logprobs
from vllm.model_executor.parallel_context import ParallelContext

# Tokens of one packed forward.
PACK = 16384


def packed(model: nn.Module, sequences: Sequence[Sequence[int]]) -> list[torch.Tensor]:
    """Hidden states of each sequence, computed without padding."""
    device = next(model.parameters()).device
    states: list[torch.Tensor] = []
    for pack in _packs(sequences):
        ids = torch.tensor([i for sequence in pack for i in sequence], device=device)
        lengths = [len(sequence) for sequence in pack]
        bounds = torch.tensor([0, *lengths], device=device)
        hidden = model.model(ids, cu_seqlens=bounds.cumsum(0, dtype=torch.int32))
        states += hidden.split(lengths)
    return states


def padded(model: nn.Module, sequences: Sequence[Sequence[int]]) -> list[torch.Tensor]:
    """Hidden states of each sequence, computed as [batch, seq]."""
    device = next(model.parameters()).device
    longest = max(map(len, sequences))
    ids = [list(each) + [0] * (longest - len(each)) for each in sequences]
    hidden = model.model(torch.tensor(ids, device=device))
    return [row[: len(sequence)] for row, sequence in zip(hidden, sequences)]


def singly(model: nn.Module, sequences: Sequence[Sequence[int]]) -> list[torch.Tensor]:
    """Hidden states of each sequence, computed alone."""
    device = next(model.parameters()).device
    return [model.model(torch.tensor(each, device=device)) for each in sequences]


def logprobs(
    model: nn.Module, sequences: Sequence[Sequence[int]], layout: Any = packed
) -> list[torch.Tensor]:
    """Logprobs of all tokens but the first of each sequence, fp32, with gradients."""
    with batch_invariant():
        states = layout(model, sequences)
        rows = torch.cat([hidden[:-1] for hidden in states])
        targets = [token for sequence in sequences for token in sequence[1:]]
        values = token_logprobs(
            rows, model.lm_head, torch.tensor(targets, device=rows.device)
        )
    return list(values.split([len(sequence) - 1 for sequence in sequences]))


def score(
    model: nn.Module, sequences: Sequence[Sequence[int]], layout: Any = packed
) -> list[torch.Tensor]:
    """`logprobs` without gradients, on CPU."""
    with torch.no_grad():
        return [values.cpu() for values in logprobs(model, sequences, layout)]


def _packs(sequences: Sequence[Sequence[int]]) -> Iterator[list[Sequence[int]]]:
    pack: list[Sequence[int]] = []
    for sequence in sequences:
        if pack and sum(map(len, pack)) + len(sequence) > PACK:
            yield pack
            pack = []
        pack.append(sequence)
    yield pack


class TwoRanks:
    """A trainer of two tensor-parallel ranks, each a process that begins to start."""

    def __init__(self) -> None:
        with socket.create_server(("127.0.0.1", 0)) as server:
            port = server.getsockname()[1]
        world = {
            "WORLD_SIZE": "2",
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": f"{port}",
        }
        self.ranks = [
            Process(world | {"RANK": f"{rank}", "LOCAL_RANK": f"{rank}"})
            for rank in range(2)
        ]
        for rank in self.ranks:
            rank.submit(_context)

    def score(
        self, directory: Path, subject: tuple, sequences: Sequence[Sequence[int]]
    ) -> list[torch.Tensor]:
        """As `score`; both ranks have to say the same.

        Args:
            directory: the model's.
            subject: name, dtype and attention implementation of the model.
            sequences: token ids.
        """
        waiting = [
            rank.submit(_score_sharded, directory, *subject, sequences)
            for rank in self.ranks
        ]
        first, second = (
            [torch.from_numpy(values) for values in rank.result(future)]
            for rank, future in zip(self.ranks, waiting)
        )
        assert all(map(torch.equal, first, second)), "the ranks differ"
        return first

    def end(self) -> None:
        for rank in self.ranks:
            rank.end()


def _context() -> ParallelContext:
    return training.initialize_parallel(tensor_parallel_size=2)


def _score_sharded(
    directory: Path,
    name: str,
    dtype: str,
    implementation: str | None,
    sequences: list[list[int]],
) -> list[Any]:
    from tests.parity.models import load

    context = _context()
    model = load(directory, name, dtype, context, str(context.device), implementation)
    return [values.numpy() for values in score(model, sequences)]
