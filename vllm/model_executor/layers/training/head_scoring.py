# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""How logprobs are computed with a head: by reading its parameters, or by calling it.

A `ParallelLMHead` or `torch.nn.Linear` that nothing changes is read: one op multiplies,
and keeps no more than it must. Any other head is called on blocks of tokens, and called
again in the backward where it has several.
"""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn
from torch.distributed.tensor import DTensor
from torch.utils.checkpoint import checkpoint

from vllm.model_executor.determinism.linear.op import linear
from vllm.model_executor.determinism.mode import (
    batch_invariant,
    is_batch_invariant,
)
from vllm.model_executor.layers.training.base import TrainingLayer, runs_own_forward
from vllm.model_executor.layers.training.collectives import (
    all_gather_to_group,
    copy_to_group,
    gather_from_group,
)
from vllm.model_executor.layers.training.column_linear import SEQUENCE_DIM
from vllm.model_executor.layers.training.embedding import (
    ParallelLMHead,
    VocabParallelEmbedding,
)
from vllm.model_executor.layers.training.ops.logprobs.blocks import blocks_for, ranges
from vllm.model_executor.layers.training.ops.logprobs.nll import weighted_nll_op
from vllm.model_executor.layers.training.ops.logprobs.of_logits import (
    logits_logprobs_op,
)
from vllm.model_executor.layers.training.ops.logprobs.op import token_logprobs_op
from vllm.model_executor.op_library import autocast_dtype, rows_of
from vllm.model_executor.parallel_context import ParallelContext


def scored_head(
    lm_head: nn.Module, hidden_states: torch.Tensor
) -> tuple[torch.Tensor, ReadHead | CalledHead]:
    """The hidden states as the head takes them, and what computes with it.

    Raises:
        TypeError: The head is no module, or an embedding.
        ValueError: Hidden states that do not fit; a weight that FSDP holds in shards.
    """
    if not isinstance(lm_head, nn.Module) or isinstance(
        lm_head, nn.Embedding | VocabParallelEmbedding
    ):
        raise TypeError(
            f"token_logprobs got a {type(lm_head).__name__} as lm_head; it takes a "
            "torch.nn.Module whose forward turns hidden states into logits. A head "
            "that shares an embedding's weight is a module of its own, such as "
            "ParallelLMHead(...).tie_weights(embedding)."
        )
    if hidden_states.ndim not in (2, 3):
        raise ValueError(
            f"hidden_states of shape {tuple(hidden_states.shape)} must be "
            "[num_tokens, hidden_size] or [batch, seq, hidden_size]."
        )
    if not _is_plain(lm_head):
        parts = list(lm_head.modules())
        # Hooks of FSDP or of a tensor-parallel style make such weights usable.
        if not any(part._forward_pre_hooks for part in parts):
            for part in parts:
                _refuse_sharded(*part._parameters.values())
        return hidden_states, CalledHead(lm_head)
    return ReadHead.of(lm_head).prepared(hidden_states)


def _is_plain(lm_head: nn.Module) -> bool:
    """Whether logits are weight and bias of the head, and nothing else."""
    return any(
        isinstance(lm_head, kind) and type(lm_head).forward is kind.forward
        for kind in (ParallelLMHead, nn.Linear)
    ) and not (
        runs_own_forward(lm_head)
        or lm_head._backward_hooks
        or lm_head._backward_pre_hooks
    )


def _refuse_sharded(*parameters: torch.Tensor | None) -> None:
    if any(isinstance(parameter, DTensor) for parameter in parameters):
        raise ValueError(
            "The weight of lm_head is a DTensor, sharded over ranks as "
            "fully_shard leaves it between uses, and the hooks that would gather it do "
            "not run. Do not pass the head itself to fully_shard but its parent, and "
            "call token_logprobs in or after the parent's forward "
            "(reshard_after_forward=False if it is not the root); or call "
            "lm_head.unshard() before."
        )


@dataclass(frozen=True, eq=False)
class ReadHead:
    """A head that is its parameters.

    Attributes:
        weight: shape = [rows on this rank, hidden_size]
        bias: shape = [rows on this rank] or None
        vocab_size: Tokens over all ranks, without padding.
        vocab_start: The first token of this rank.
        context: Names the tensor-parallel group.
        sequence_parallel: Each rank has its slice of the hidden states' tokens.
    """

    weight: torch.Tensor
    bias: torch.Tensor | None
    vocab_size: int
    vocab_start: int
    context: ParallelContext
    sequence_parallel: bool

    @classmethod
    def of(cls, lm_head: Any) -> ReadHead:
        """Of a plain `ParallelLMHead` or `torch.nn.Linear`."""
        # Each read of a parametrized weight computes it.
        weight, bias = lm_head.weight, lm_head.bias
        _refuse_sharded(weight, bias)
        if isinstance(lm_head, ParallelLMHead):
            return cls(
                weight,
                bias,
                lm_head.num_embeddings,
                lm_head.vocab_start_index,
                lm_head.parallel_context,
                lm_head.sequence_parallel,
            )
        return cls(weight, bias, len(weight), 0, ParallelContext.single(), False)

    def prepared(self, hidden_states: torch.Tensor) -> tuple[torch.Tensor, ReadHead]:
        """Checked, and in autocast's dtype where that is on."""
        head, dtype = self, autocast_dtype(hidden_states)
        if dtype is not None:
            bias = None if self.bias is None else self.bias.to(dtype)
            head = replace(self, weight=self.weight.to(dtype), bias=bias)
            hidden_states = hidden_states.to(dtype)
        weight, hidden_size = head.weight, head.weight.shape[1]
        if hidden_states.shape[-1] != hidden_size:
            raise ValueError(
                f"hidden_states of shape {tuple(hidden_states.shape)} must be "
                f"[num_tokens, {hidden_size}] or [batch, seq, {hidden_size}]."
            )
        if hidden_states.dtype != weight.dtype:
            raise ValueError(
                f"hidden_states are {hidden_states.dtype}, but the head's weight is "
                f"{weight.dtype}; cast one to the other's dtype."
            )
        if hidden_states.device != weight.device:
            raise ValueError(
                f"hidden_states are on {hidden_states.device}, the head's weight is on "
                f"{weight.device}; move them to one device."
            )
        return hidden_states, head

    @property
    def slices(self) -> int:
        """How many slices of the tokens the ranks hold."""
        return self.context.tp_size if self.sequence_parallel else 1

    def logits(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """shape = [..., hidden_size] -> [..., vocab_size], of all tokens."""
        logits = linear(self._all_tokens(hidden_states), self.weight, self.bias)
        return gather_from_group(logits, self.context)[..., : self.vocab_size]

    def token_logprobs(
        self,
        hidden_states: torch.Tensor,
        targets: torch.Tensor,
        temperature: torch.Tensor | None,
        with_entropy: bool,
    ) -> tuple[torch.Tensor, ...]:
        """Logprobs, and entropies if wanted, in the shape of targets."""
        hidden_states = self._all_tokens(hidden_states)
        logprobs, entropy, _, _ = token_logprobs_op(
            *self._arguments(hidden_states, targets, temperature),
            *self._vocabulary(),
            with_entropy,
            any(self._needs(hidden_states)),
        )
        numbers = (logprobs, entropy)[: 1 + with_entropy]
        return tuple(each.view(targets.shape) for each in numbers)

    def weighted_nll(
        self,
        hidden_states: torch.Tensor,
        targets: torch.Tensor,
        weights: torch.Tensor,
        temperature: torch.Tensor | None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The loss, and logprobs in the shape of targets, without a gradient."""
        hidden_states = self._all_tokens(hidden_states)
        loss, logprobs, *_ = weighted_nll_op(
            *self._arguments(hidden_states, targets, temperature),
            weights.flatten(),
            *self._vocabulary(),
            self._needs(hidden_states),
        )
        return loss, logprobs.view(targets.shape)

    def _arguments(
        self,
        hidden_states: torch.Tensor,
        targets: torch.Tensor,
        temperature: torch.Tensor | None,
    ) -> tuple[torch.Tensor | None, ...]:
        """What an op takes of the head and of each token."""
        return (
            hidden_states.flatten(0, -2),
            self.weight,
            self.bias,
            targets.flatten(),
            None if temperature is None else temperature.flatten(),
        )

    def _vocabulary(self) -> tuple[int, int, str]:
        """The vocabulary's size, this rank's first token and the group's name."""
        parallel = self.context.tp_size > 1
        group = self.context.group("tp").group_name if parallel else ""
        return self.vocab_size, self.vocab_start, group

    def _needs(self, hidden_states: torch.Tensor) -> list[bool]:
        """Which of hidden states, weight and bias get a gradient."""
        return [
            torch.is_grad_enabled() and leaf is not None and leaf.requires_grad
            for leaf in (hidden_states, self.weight, self.bias)
        ]

    def _all_tokens(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """On every rank, for its part of the vocabulary."""
        if self.sequence_parallel:
            return all_gather_to_group(hidden_states, self.context, SEQUENCE_DIM)
        return copy_to_group(hidden_states, self.context)


@dataclass(frozen=True, eq=False)
class CalledHead:
    """A head that is called, hooks and all.

    Attributes:
        module: shape = [..., hidden_size] -> [..., vocab_size], on every rank.
    """

    module: nn.Module

    @property
    def slices(self) -> int:
        """How many slices of the tokens the ranks hold; the head gathers them."""
        head = self.module
        if isinstance(head, TrainingLayer) and head.sequence_parallel:
            return head.tp_size
        return 1

    def logits(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """shape = [..., hidden_size] -> [..., vocab_size], of all tokens.

        Raises:
            TypeError, ValueError: The head's result is something else.
        """
        logits, name = self.module(hidden_states), type(self.module).__name__
        if not isinstance(logits, torch.Tensor) or isinstance(logits, DTensor):
            raise TypeError(
                f"The head, a {name}, returned a {type(logits).__name__}; its forward "
                "must return the logits as a plain torch.Tensor."
            )
        *leading, tokens = hidden_states.shape[:-1]
        expected = (*leading, tokens * self.slices)
        if logits.shape[:-1] != expected or not logits.is_floating_point():
            raise ValueError(
                f"The head, a {name}, returned {logits.dtype} of shape "
                f"{tuple(logits.shape)} for hidden states of shape "
                f"{tuple(hidden_states.shape)}; it must return floating-point logits, "
                f"shape = [{', '.join(map(str, expected))}, vocab_size]. A head that "
                "gathers the tokens of several ranks must be a ParallelLMHead with "
                "sequence_parallel, or a subclass."
            )
        return logits

    def token_logprobs(
        self,
        hidden_states: torch.Tensor,
        targets: torch.Tensor,
        temperature: torch.Tensor | None,
        with_entropy: bool,
    ) -> tuple[torch.Tensor, ...]:
        """Logprobs, and entropies if wanted, in the shape of targets.

        The first call is of few tokens: the number of its logits says how many tokens
        a block may have.
        """
        rows, blocks = hidden_states.flatten(0, -2), blocks_for(hidden_states)
        given = [rows, self._by_row(targets)]
        if temperature is not None:
            given.append(self._by_row(temperature))
        few = blocks.multiple
        logits = self.logits(rows[:few])
        numbers = [self._score(logits, with_entropy, *(x[:few] for x in given[1:]))]
        width, rest = logits.shape[-1] * self.slices, len(rows) - few
        at_once = max(blocks.tokens_in_forward(width) - few, few)
        invariant = is_batch_invariant() and not torch.compiler.is_compiling()

        def score(
            rows: torch.Tensor, *others: torch.Tensor
        ) -> tuple[torch.Tensor, ...]:
            # A backward outside of the mode computes the same again.
            with batch_invariant() if invariant else nullcontext():
                return self._score(self.logits(rows), with_entropy, *others)

        for block in ranges(rest, at_once):
            inputs = [each[few:][block] for each in given]
            if torch.is_grad_enabled() and rest > at_once:
                numbers.append(checkpoint(score, *inputs, use_reentrant=False))
            else:
                numbers.append(score(*inputs))
        return tuple(self._by_token(torch.cat(x), targets.shape) for x in zip(*numbers))

    def weighted_nll(
        self,
        hidden_states: torch.Tensor,
        targets: torch.Tensor,
        weights: torch.Tensor,
        temperature: torch.Tensor | None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The loss, and logprobs in the shape of targets, without a gradient."""
        (logprobs,) = self.token_logprobs(hidden_states, targets, temperature, False)
        return -(weights * logprobs).sum(), logprobs.detach()

    def _score(
        self,
        logits: torch.Tensor,
        with_entropy: bool,
        targets: torch.Tensor,
        temperature: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, ...]:
        """Logprobs, and entropies if wanted, shape = [rows, slices]."""
        in_order = targets.t()
        numbers = logits_logprobs_op(
            rows_of(logits),
            in_order.flatten(),
            None if temperature is None else temperature.t().flatten(),
            with_entropy,
            torch.is_grad_enabled() and logits.requires_grad,
        )
        return tuple(x.view(in_order.shape).t() for x in numbers[: 1 + with_entropy])

    def _by_row(self, of_tokens: torch.Tensor) -> torch.Tensor:
        """What the logits of a row of hidden states belong to.

        The head puts the ranks' rows one after another.

        Args:
            of_tokens: shape = [..., tokens of all ranks]

        Returns:
            shape = [rows, slices]
        """
        size = of_tokens.shape[-1] // self.slices
        by_rank = of_tokens.unflatten(-1, (self.slices, size))
        return by_rank.movedim(-2, -1).flatten(0, -2)

    def _by_token(self, of_rows: torch.Tensor, tokens: torch.Size) -> torch.Tensor:
        """The inverse of `_by_row`; tokens: the shape of the result."""
        size = tokens[-1] // self.slices
        by_rank = of_rows.view(*tokens[:-1], size, self.slices).movedim(-1, -2)
        return by_rank.reshape(tokens)
