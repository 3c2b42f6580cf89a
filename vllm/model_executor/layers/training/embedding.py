# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""Vocabulary-parallel embedding and language-model head.

With tp_size 1 the weights have exactly one row a token. With more ranks the rows are
laid out as in vLLM: the vocabulary is padded with zero rows to a multiple of 64 and
cut into equal shards, so a trainer's and an engine's shards of one tensor-parallel
size hold the same rows. Padding rows are never looked up, their logits are dropped
and their gradient is zero. Checkpoints hold the unpadded vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import nn

from vllm.model_executor import vllm_internals
from vllm.model_executor.checkpoint.specification import ParameterSharding, Part
from vllm.model_executor.layers.training.arguments import check_sizes
from vllm.model_executor.layers.training.base import TrainingLayer, resolve_dtype
from vllm.model_executor.layers.training.collectives import (
    gather_from_group,
    reduce_from_group,
    reduce_scatter_from_group,
)
from vllm.model_executor.layers.training.column_linear import (
    SEQUENCE_DIM,
    column_parallel_linear,
)
from vllm.model_executor.layers.training.engine_layers import (
    EngineEmbedding,
    scaled,
)
from vllm.model_executor.parallel_context import ParallelContext

if TYPE_CHECKING:
    from vllm.config import VllmConfig


class _VocabParallel(TrainingLayer):
    """The weight of one row a token, cut over the ranks by rows."""

    weight: nn.Parameter
    # Neither is a submodule: their parameters are their own.
    _embedding: VocabParallelEmbedding | None
    _heads: list[ParallelLMHead]

    def __init__(
        self,
        num_embeddings: int,
        embedding_dim: int,
        params_dtype: torch.dtype | None,
        sequence_parallel: bool,
        parallel_context: ParallelContext | None,
    ) -> None:
        super().__init__(parallel_context)
        check_sizes(
            type(self).__name__,
            num_embeddings=num_embeddings,
            embedding_dim=embedding_dim,
        )
        self.__dict__ |= {"_embedding": None, "_heads": []}
        self.sequence_parallel = sequence_parallel
        self.num_embeddings = num_embeddings
        self.embedding_dim = embedding_dim
        self.params_dtype = resolve_dtype(params_dtype)
        self.num_embeddings_padded = _padded_vocab_size(num_embeddings, self.tp_size)
        self.num_embeddings_per_partition = self.num_embeddings_padded // self.tp_size
        self.vocab_start_index = self.tp_rank * self.num_embeddings_per_partition
        self._add_parameter("weight", self.params_dtype)

    def _sharding(self, *trailing: int) -> ParameterSharding:
        return ParameterSharding(
            torch.Size((self.num_embeddings, *trailing)),
            0,
            (
                Part(
                    None,
                    None,
                    self.num_embeddings,
                    padded_size=self.num_embeddings_padded,
                ),
            ),
        )

    def parameter_sharding(self) -> dict[str, ParameterSharding]:
        return {"weight": self._sharding(self.embedding_dim)}

    def _apply(self, fn: Callable[..., Any], recurse: bool = True) -> _VocabParallel:
        with self._ties_kept():
            super()._apply(fn, recurse)
        return self

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        with self._ties_kept():
            super()._load_from_state_dict(*args, **kwargs)

    @contextmanager
    def _ties_kept(self) -> Iterator[None]:
        """Tie again what is tied now, and what torch gives parameters of its own.

        `to_empty()` and `load_state_dict(assign=True)` do, one module after the other.
        """
        embedding = self._embedding
        is_tied = embedding is not None and embedding.weight is self.weight
        heads = [head for head in self._heads if head.weight is self.weight]
        yield
        if embedding is not None and is_tied:
            self.weight = embedding.weight
        for head in heads:
            head.weight = self.weight

    def _engine_arguments(self, vllm_config: VllmConfig, prefix: str) -> dict[str, Any]:
        return {
            "params_dtype": self.params_dtype,
            "quant_config": vllm_config.quant_config,
            "prefix": prefix,
            "disable_tp": self._engine_disables_tp(),
        }

    def extra_repr(self) -> str:
        return (
            f"num_embeddings={self.num_embeddings}, "
            f"embedding_dim={self.embedding_dim}, tp_size={self.tp_size}"
        )


class VocabParallelEmbedding(_VocabParallel):
    """Token embedding with the vocabulary sharded across ranks.

    Args:
        num_embeddings: Size of the vocabulary.
        embedding_dim: Size of an embedding.
        scale: Factor on the embeddings, rounded to their dtype; Gemma has
            sqrt(embedding_dim).
        padding_idx: A token whose row gets no gradient; None: there is none.
        params_dtype: Dtype of the weight; torch's default dtype if None.
        sequence_parallel: Return this rank's slice of the tokens, the last dim of the
            ids. In the engine all tokens are returned.
        parallel_context: The context to shard by.

    Attributes:
        weight: shape = [num_embeddings_per_partition, embedding_dim]
    """

    def __init__(
        self,
        num_embeddings: int,
        embedding_dim: int,
        *,
        scale: float = 1.0,
        padding_idx: int | None = None,
        params_dtype: torch.dtype | None = None,
        sequence_parallel: bool = False,
        parallel_context: ParallelContext | None = None,
    ) -> None:
        super().__init__(
            num_embeddings,
            embedding_dim,
            params_dtype,
            sequence_parallel,
            parallel_context,
        )
        self.scale = float(scale)
        self.padding_idx = padding_idx
        self._initialise()

    def reset_parameters(self) -> None:
        """Standard normal, as torch.nn.Embedding."""
        self.draw("weight", nn.init.normal_)

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        """Look up tokens.

        Args:
            input_ids: Integer token ids from 0 to num_embeddings - 1, any shape.

        Returns:
            shape = [*input_ids.shape, embedding_dim]; with sequence_parallel this
            rank's slice of dim -2.

        Raises:
            TypeError: The ids are not integers.
            ValueError: With sequence_parallel, the number of tokens is not a multiple
                of tp_size.
            IndexError: On CPU, an id is outside the vocabulary.
        """
        if not isinstance(input_ids, torch.Tensor) or input_ids.dtype not in (
            torch.int64,
            torch.int32,
        ):
            given = getattr(input_ids, "dtype", type(input_ids).__name__)
            raise TypeError(
                f"VocabParallelEmbedding got ids of {given}; they must be a tensor of "
                "torch.int64 or torch.int32."
            )
        return scaled(self._embed(input_ids.long()), self.scale)

    def _embed(self, input_ids: torch.Tensor) -> torch.Tensor:
        if self.tp_size == 1:
            return self._look_up(input_ids, input_ids)
        local_ids = input_ids - self.vocab_start_index
        elsewhere = (local_ids < 0) | (local_ids >= self.num_embeddings_per_partition)
        local_ids = local_ids.masked_fill(elsewhere, 0)
        # An id of no rank fails in the lookup, as it does on one rank alone.
        unknown = (input_ids < 0) | (input_ids >= self.num_embeddings)
        local_ids = local_ids.masked_fill(unknown, -1)
        output = self._look_up(local_ids, input_ids)
        output = output.masked_fill(elsewhere.unsqueeze(-1), 0)
        if self.sequence_parallel:
            return reduce_scatter_from_group(
                output, self.parallel_context, SEQUENCE_DIM
            )
        return reduce_from_group(output, self.parallel_context)

    def _look_up(self, rows: torch.Tensor, input_ids: torch.Tensor) -> torch.Tensor:
        padding_row = None
        if self.padding_idx is not None:
            row = self.padding_idx - self.vocab_start_index
            padding_row = row if 0 <= row < len(self.weight) else None
        try:
            return F.embedding(rows, self.weight, padding_row)
        except IndexError:
            last = self.num_embeddings - 1
            unknown = input_ids[(input_ids < 0) | (input_ids > last)]
            if not unknown.numel():
                raise
            raise IndexError(
                f"VocabParallelEmbedding got token id {unknown[0].item()}; ids are 0 "
                f"to {last}. Check the tokenizer's vocabulary against num_embeddings, "
                "and leave padding such as -100 out."
            ) from None

    def bind_engine(self, vllm_config: VllmConfig, prefix: str) -> nn.Module:
        sizes = (self.num_embeddings, self.embedding_dim)
        options = self._engine_arguments(vllm_config, prefix)
        if self.scale == 1:
            return vllm_internals.VocabParallelEmbedding(*sizes, **options)
        return EngineEmbedding(*sizes, scale=self.scale, **options)

    def extra_repr(self) -> str:
        scale = f", scale={self.scale}" if self.scale != 1 else ""
        return super().extra_repr() + scale


class ParallelLMHead(_VocabParallel):
    """Projection from hidden states to logits, with a vocabulary sharded across ranks.

    Args:
        num_embeddings: Size of the vocabulary.
        embedding_dim: Size of a hidden state.
        bias: Add a bias.
        params_dtype: Dtype of the parameters; torch's default dtype if None.
        sequence_parallel: The hidden states are this rank's slice of the tokens,
            dim -2; logits and log-probabilities are of all tokens. In the engine the
            hidden states are too.
        parallel_context: The context to shard by.

    Attributes:
        weight: shape = [num_embeddings_per_partition, embedding_dim]
        bias: shape = [num_embeddings_per_partition] or None
    """

    bias: nn.Parameter | None

    def __init__(
        self,
        num_embeddings: int,
        embedding_dim: int,
        bias: bool = False,
        *,
        params_dtype: torch.dtype | None = None,
        sequence_parallel: bool = False,
        parallel_context: ParallelContext | None = None,
    ) -> None:
        self.has_bias = bias
        super().__init__(
            num_embeddings,
            embedding_dim,
            params_dtype,
            sequence_parallel,
            parallel_context,
        )
        if bias:
            self._add_parameter("bias", self.params_dtype)
        else:
            self.register_parameter("bias", None)
        self._initialise()

    def parameter_sharding(self) -> dict[str, ParameterSharding]:
        shardings = super().parameter_sharding()
        if self.has_bias:
            shardings["bias"] = self._sharding()
        return shardings

    def reset_parameters(self) -> None:
        """Uniform in ±1/sqrt(embedding_dim), as torch.nn.Linear."""
        bound = 1 / math.sqrt(self.embedding_dim) if self.embedding_dim else 0.0
        self.draw("weight", lambda t: nn.init.uniform_(t, -bound, bound))
        if self.has_bias:
            self.draw("bias", lambda t: nn.init.uniform_(t, -bound, bound))

    def tie_weights(self, embedding: VocabParallelEmbedding) -> ParallelLMHead:
        """Share the embedding's weight from now on, also after `to_empty()`,
        `copy.deepcopy` and `load_state_dict(assign=True)` of a module that holds both.

        Args:
            embedding: An embedding of the same sizes, dtype and context.

        Returns:
            The head itself.

        Raises:
            ValueError: The weights do not have the same shape and dtype.
        """
        given, own = embedding.weight, self.weight
        if given.shape != own.shape or given.dtype != own.dtype:
            raise ValueError(
                f"The embedding's weight of shape {tuple(given.shape)} and "
                f"{given.dtype} cannot be tied to a head that needs "
                f"{tuple(own.shape)} and {own.dtype}; build both with the same "
                "sizes, params_dtype and parallel_context."
            )
        self.weight = embedding.weight
        self.__dict__["_embedding"] = embedding
        embedding._heads.append(self)
        return self

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """Compute the logits over the whole vocabulary, on every rank.

        Args:
            hidden_states: shape = [..., embedding_dim], equal on all ranks; with
                sequence_parallel each rank's own slice of dim -2.

        Returns:
            shape = [..., num_embeddings], of all tokens.
        """
        if hidden_states.shape[-1] != self.embedding_dim:
            raise ValueError(
                f"ParallelLMHead got hidden states of shape "
                f"{tuple(hidden_states.shape)}; their last dim must be "
                f"{self.embedding_dim}."
            )
        logits = column_parallel_linear(
            hidden_states,
            self.weight,
            self.bias,
            self.parallel_context,
            self.sequence_parallel,
        )
        logits = gather_from_group(logits, self.parallel_context)
        return logits[..., : self.num_embeddings]

    def bind_engine(self, vllm_config: VllmConfig, prefix: str) -> nn.Module:
        """vLLM's own head. The caller ties it again if this one is tied."""
        return vllm_internals.ParallelLMHead(
            self.num_embeddings,
            self.embedding_dim,
            bias=self.has_bias,
            **self._engine_arguments(vllm_config, prefix),
        )


def _padded_vocab_size(vocab_size: int, tp_size: int) -> int:
    """Rows over all ranks, padding included."""
    if tp_size == 1:
        return vocab_size
    padded = vllm_internals.pad_vocab_size(vocab_size)
    if padded % tp_size:
        raise ValueError(
            f"num_embeddings={vocab_size} is padded to {padded}, a multiple of "
            f"{vllm_internals.DEFAULT_VOCAB_PADDING_SIZE}, which tp_size={tp_size} "
            "does not divide; choose a tensor-parallel size that does."
        )
    return padded
