# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""A decoder-only transformer that is written once, trained, and served.

The layout is Llama's (grouped-query attention, rotary positions, RMSNorm, SwiGLU),
and so are the names of the checkpoint's tensors.
"""

import os
from collections.abc import Iterable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from transformers import PreTrainedConfig

from vllm.model_executor import vllm_internals
from vllm.model_executor.checkpoint.files import whole_file
from vllm.model_executor.checkpoint.layout import CheckpointLayout
from vllm.model_executor.checkpoint.load import load_checkpoint
from vllm.model_executor.checkpoint.ranks import on_rank_0
from vllm.model_executor.checkpoint.save import save_checkpoint
from vllm.model_executor.layers.training import (
    MergedColumnParallelLinear,
    ParallelLMHead,
    RMSNorm,
    RotaryEmbedding,
    RowParallelLinear,
    SiluAndMul,
    VLLMFlashAttention,
    VocabParallelEmbedding,
)
from vllm.model_executor.layers.training.base import (
    TrainingLayer,
    init_skipped,
    skip_init,
)
from vllm.model_executor.models.builder import PipelineLayers, model_builder
from vllm.model_executor.models.builder.agreement import compare_ranks
from vllm.model_executor.models.builder.binding import bind_engine_layers
from vllm.model_executor.models.builder.config import tie_as_configured
from vllm.model_executor.models.builder.loader import EngineLoader
from vllm.model_executor.models.generic_transformer_config import (
    GenericTransformerConfig,
)
from vllm.model_executor.parallel_context import ParallelContext

if TYPE_CHECKING:
    from vllm.config import VllmConfig


class GenericTransformerMLP(nn.Module):
    """SwiGLU: `down(silu(gate(x)) * up(x))`."""

    def __init__(self, config: GenericTransformerConfig, **sharding: Any) -> None:
        super().__init__()
        hidden, inner = config.hidden_size, config.intermediate_size
        assert inner is not None, "set by the config itself"
        self.gate_up_proj = MergedColumnParallelLinear(
            hidden,
            [inner, inner],
            bias=False,
            part_names=("gate_proj", "up_proj"),
            **sharding,
        )
        self.act_fn = SiluAndMul()
        self.down_proj = RowParallelLinear(inner, hidden, bias=False, **sharding)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return self.down_proj(self.act_fn(self.gate_up_proj(hidden_states)))


class GenericTransformerBlock(nn.Module):
    """Attention and MLP, each on a normed copy of the residual stream.

    The stream is passed as two tensors whose sum it is, the second of them None before
    the first block: the next norm adds them, with the bits of a sum of its own.
    """

    def __init__(
        self, config: GenericTransformerConfig, rotary: RotaryEmbedding, **sharding: Any
    ) -> None:
        super().__init__()
        hidden, eps = config.hidden_size, config.rms_norm_eps
        self.input_layernorm = RMSNorm(hidden, eps, **sharding)
        self.self_attn = VLLMFlashAttention(
            hidden,
            config.num_attention_heads,
            config.num_key_value_heads,
            head_dim=config.head_dim,
            rotary=rotary,
            **sharding,
        )
        self.post_attention_layernorm = RMSNorm(hidden, eps, **sharding)
        self.mlp = GenericTransformerMLP(config, **sharding)

    def forward(
        self,
        hidden_states: torch.Tensor,
        residual: torch.Tensor | None,
        positions: torch.Tensor,
        cu_seqlens: torch.Tensor | None = None,
        max_seqlen: int | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        if residual is None:
            normed, residual = self.input_layernorm(hidden_states), hidden_states
        else:
            normed, residual = self.input_layernorm(hidden_states, residual)
        hidden_states = self.self_attn(normed, positions, cu_seqlens, max_seqlen)
        hidden_states, residual = self.post_attention_layernorm(hidden_states, residual)
        return self.mlp(hidden_states), residual


class GenericTransformer(nn.Module):
    """The model without its head; with pipeline stages, one stage of it.

    The first stage has the embedding, the last the norm. What a stage lacks is None.
    """

    def __init__(
        self,
        config: GenericTransformerConfig,
        context: ParallelContext,
        sequence_parallel: bool = False,
    ) -> None:
        super().__init__()
        sharding: dict[str, Any] = {
            "parallel_context": context,
            "sequence_parallel": sequence_parallel,
        }
        self.embed_tokens = None
        head_needs_it = config.tie_word_embeddings and context.is_last_stage
        if context.is_first_stage or head_needs_it:
            self.embed_tokens = VocabParallelEmbedding(
                config.vocab_size, config.hidden_size, **sharding
            )
        assert config.head_dim is not None, "set by the config itself"
        rotary = RotaryEmbedding(
            config.head_dim,
            max_position_embeddings=config.max_position_embeddings,
            base=config.rope_theta,
            rope_scaling=config.rope_parameters,
        )
        self.layers = PipelineLayers(
            config.num_hidden_layers,
            lambda _: GenericTransformerBlock(config, rotary, **sharding),
            context,
        )
        self.norm = None
        if context.is_last_stage:
            self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps, **sharding)

    def forward(
        self,
        input_ids: torch.Tensor | None,
        positions: torch.Tensor | None = None,
        cu_seqlens: torch.Tensor | None = None,
        max_seqlen: int | None = None,
        hidden_states: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Hidden states, shape = [..., hidden_size]; sequence-parallel this rank's.

        Arguments as in `GenericTransformerForCausalLM.forward`; `hidden_states`,
        shaped like the result, takes the place of the embedded `input_ids`.
        """
        if positions is None:
            assert input_ids is not None, "without them positions has to be given"
            positions = default_positions(input_ids, cu_seqlens)
        if hidden_states is None:
            assert self.embed_tokens is not None, "later stages get hidden_states"
            hidden_states = self.embed_tokens(input_ids)
        residual = None
        for layer in self.layers:
            hidden_states, residual = layer(
                hidden_states, residual, positions, cu_seqlens, max_seqlen
            )
        assert residual is not None, "every stage has layers"
        if self.norm is None:
            return hidden_states + residual
        hidden_states, _ = self.norm(hidden_states, residual)
        return hidden_states


def default_positions(
    input_ids: torch.Tensor, cu_seqlens: torch.Tensor | None
) -> torch.Tensor:
    """Each token's index in its sequence, shaped like `input_ids`."""
    positions = torch.arange(input_ids.shape[-1], device=input_ids.device)
    if cu_seqlens is not None:
        # With the size given, nothing is read from the device.
        starts = (
            cu_seqlens[:-1]
            .long()
            .repeat_interleave(cu_seqlens.diff().long(), output_size=len(positions))
        )
        positions = positions - starts
    return positions.expand(input_ids.shape)


class GenericTransformerForCausalLM(nn.Module):
    """The trainable model: token ids to logits.

    Args:
        config: The sizes; another class of config goes through
            `GenericTransformerConfig.of`.
        parallel_context: The shard to build. Default: this process's, or the
            whole model.
        sequence_parallel: Outside attention and MLP each tensor-parallel rank has its
            slice of the tokens, whose number the ranks have to divide. In an engine
            every rank has all.

    To serve it, register its builder:
    `ModelRegistry.register_model(arch, GenericTransformerForCausalLM.build)`.
    """

    def __init__(
        self,
        config: PreTrainedConfig,
        parallel_context: ParallelContext | None = None,
        *,
        sequence_parallel: bool = False,
    ) -> None:
        super().__init__()
        config = GenericTransformerConfig.of(config)
        context = parallel_context or ParallelContext.current_or_single()
        self.config = config
        self.model = GenericTransformer(config, context, sequence_parallel)
        self.lm_head = None
        if context.is_last_stage:
            self.lm_head = ParallelLMHead(
                config.vocab_size,
                config.hidden_size,
                parallel_context=context,
                sequence_parallel=sequence_parallel,
            )
        self.reset_parameters()
        if config.tie_word_embeddings and self.lm_head is not None:
            assert self.model.embed_tokens is not None, "built on this stage too"
            self.lm_head.tie_weights(self.model.embed_tokens)

    @classmethod
    @model_builder(supports_pp=True)
    def build(
        cls, config: PreTrainedConfig, parallel_context: ParallelContext
    ) -> "GenericTransformerForCausalLM":
        """The builder that vLLM calls."""
        return cls(config, parallel_context)

    def reset_parameters(self) -> None:
        """Normal weights of `initializer_range`; norms keep their ones.

        Ranks with the same seed hold shards of the weights that one rank would draw.
        """
        if init_skipped():
            return
        fill = partial(nn.init.normal_, std=self.config.initializer_range)
        for layer in self.modules():
            if not isinstance(layer, TrainingLayer):
                continue
            for name, parameter in layer.named_parameters(recurse=False):
                if parameter.dim() > 1:
                    layer.draw(name, fill)

    def forward(
        self,
        input_ids: torch.Tensor,
        positions: torch.Tensor | None = None,
        cu_seqlens: torch.Tensor | None = None,
        max_seqlen: int | None = None,
        hidden_states: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Logits of the next token; before the last pipeline stage, hidden states.

        Args:
            input_ids: Token ids, packed shape = [num_tokens], or
                shape = [batch, seq].
            positions: Each token's position in its sequence, shaped like
                `input_ids`. Default: counted from 0 in each sequence.
            cu_seqlens: Packed only: where sequences begin and end, int32,
                shape = [num_seqs + 1]. Default: one sequence.
            max_seqlen: Length of the longest sequence, in tokens.
            hidden_states: What the pipeline stage before this one returned; None on
                the first. With it `positions` is needed, `input_ids` is not.

        Returns:
            shape = [..., vocab_size]; before the last stage [..., hidden_size].
        """
        output = self.model(input_ids, positions, cu_seqlens, max_seqlen, hidden_states)
        return output if self.lm_head is None else self.lm_head(output)

    def save_pretrained(self, directory: str | os.PathLike) -> None:
        """Write `config.json` and safetensors, which can be served as they are.

        Where there are several processes all of them call it: see `save_checkpoint`.

        Raises:
            ValueError: The config ties head and embedding, and the model does not.
        """
        embedding, head = self.model.embed_tokens, self.lm_head
        if (
            self.config.tie_word_embeddings
            and embedding is not None
            and head is not None
            and head.weight is not embedding.weight
        ):
            raise ValueError(
                "config.tie_word_embeddings is True, but lm_head.weight and "
                "model.embed_tokens.weight are two parameters. Tie them by "
                "lm_head.tie_weights(model.embed_tokens), or set it to False."
            )
        save_checkpoint(self, directory)
        self.config.dtype = next(self.parameters()).dtype
        on_rank_0(partial(self._write_config, Path(directory) / "config.json"))

    def _write_config(self, target: Path) -> None:
        with whole_file(target) as path:
            self.config.to_json_file(path)

    @classmethod
    def from_pretrained(
        cls,
        directory: str | os.PathLike,
        parallel_context: ParallelContext | None = None,
        *,
        sequence_parallel: bool = False,
    ) -> "GenericTransformerForCausalLM":
        """Read what `save_pretrained` wrote, in the dtype it was written in.

        Raises:
            FileNotFoundError: A file is missing.
            ValueError: The checkpoint does not fit the config; all tensors that
                are missing, extra or wrongly shaped are named.
        """
        if not (Path(directory) / "config.json").is_file():
            raise FileNotFoundError(f"{directory} holds no config.json.")
        config = GenericTransformerConfig.from_pretrained(directory)
        with skip_init():
            model = cls(config, parallel_context, sequence_parallel=sequence_parallel)
        if config.dtype is not None:
            model = model.to(config.dtype)
        load_checkpoint(model, directory)
        return model


class GenericTransformerForCausalLMVLLM(nn.Module):
    """The same model with vLLM's interface written out: the least a class needs.

    Args:
        vllm_config: The engine's config; or a `GenericTransformerConfig`, which
            gives the training model behind the same interface, outside an engine.
        prefix: Prepended to module paths in layer names.
    """

    supports_pp = True

    def __init__(
        self, vllm_config: "VllmConfig | GenericTransformerConfig", prefix: str = ""
    ) -> None:
        super().__init__()
        if isinstance(vllm_config, PreTrainedConfig):
            built = GenericTransformerForCausalLM(vllm_config)
        else:
            tie_as_configured(vllm_config.model_config)
            with skip_init():
                config = vllm_config.model_config.hf_config
                built = GenericTransformerForCausalLM(config)
        self.model, self.lm_head = built.model, built.lm_head
        self.hidden_size = built.config.hidden_size
        layout = CheckpointLayout.of(self)
        model_config = None
        if not isinstance(vllm_config, PreTrainedConfig):
            model_config = vllm_config.model_config
            layout = compare_ranks(self, layout, type(self).__name__)
            bind_engine_layers(self, vllm_config, prefix, head="lm_head")
            self.logits_processor = vllm_internals.LogitsProcessor(
                built.config.vocab_size
            )
        self.loader = EngineLoader(self, layout, model_config)

    def embed_input_ids(self, input_ids: torch.Tensor) -> torch.Tensor:
        """Embeddings, shape = [num_tokens, hidden_size]; on the first stage only."""
        assert self.model.embed_tokens is not None, "only the first stage embeds"
        return self.model.embed_tokens(input_ids)

    def forward(
        self,
        input_ids: torch.Tensor,
        positions: torch.Tensor,
        intermediate_tensors: Any | None = None,
        inputs_embeds: torch.Tensor | None = None,
    ) -> Any:
        """Hidden states, shape = [num_tokens, hidden_size].

        Args:
            input_ids: shape = [num_tokens].
            positions: shape = [num_tokens].
            intermediate_tensors: What the pipeline stage before this one returned;
                None on the first.
            inputs_embeds: Used instead of `input_ids` if given,
                shape = [num_tokens, hidden_size].

        Returns:
            On all pipeline stages but the last, `IntermediateTensors` of them.
        """
        if intermediate_tensors is not None:
            inputs_embeds = intermediate_tensors["hidden_states"]
        hidden_states = self.model(input_ids, positions, hidden_states=inputs_embeds)
        if self.lm_head is None:
            return vllm_internals.IntermediateTensors({"hidden_states": hidden_states})
        return hidden_states

    def make_empty_intermediate_tensors(
        self, batch_size: int, dtype: torch.dtype, device: torch.device
    ) -> Any:
        """What the pipeline stage before this one sends, as zeros."""
        zeros = torch.zeros(batch_size, self.hidden_size, dtype=dtype, device=device)
        return vllm_internals.IntermediateTensors({"hidden_states": zeros})

    def compute_logits(self, hidden_states: torch.Tensor) -> torch.Tensor | None:
        """Logits, shape = [num_tokens, vocab_size]."""
        assert self.lm_head is not None, "only the last stage samples"
        if isinstance(self.lm_head, vllm_internals.ParallelLMHead):
            return self.logits_processor(self.lm_head, hidden_states)
        return self.lm_head(hidden_states)

    def load_weights(self, weights: Iterable[tuple[str, torch.Tensor]]) -> set[str]:
        """Load checkpoint tensors, each rank its shard; the names that were loaded."""
        return self.loader.load(weights)
