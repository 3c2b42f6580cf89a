# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""Megatron-Core's whole `GPTModel`, with vLLM's attention as its core attention.

Megatron gets the context's process groups by argument. Its own global state
(`megatron.core.parallel_state`) stays uninitialised and nothing of it is patched.

    pip install megatron-core==0.16.1
    python examples/external_layers_megatron.py
"""

import argparse
import importlib.util
import sys
from pathlib import Path

import torch
from generic_model_parallelism import megatron_sharding
from torch import nn
from trainer_and_engine import TrainerRanks, positions_of, train_and_serve

from vllm.model_executor.layers.training import TrainableAttention
from vllm.model_executor.layers.training.collectives import gather_from_group


class CoreAttention(nn.Module):
    """`TrainableAttention` where Megatron expects its own core attention.

    Megatron builds it with its config and process groups, for the heads of this rank.
    """

    def __init__(
        self,
        config,
        layer_number,
        attn_mask_type,
        attention_type,
        attention_dropout=None,
        softmax_scale=None,
        cp_comm_type=None,
        pg_collection=None,
    ):
        super().__init__()
        ranks = pg_collection.tp.size()
        self.attn = TrainableAttention(
            config.num_attention_heads // ranks,
            config.kv_channels,
            softmax_scale,
            config.num_query_groups // ranks,
        )

    def forward(self, query, key, value, attention_mask, **_):
        """[seq, batch, heads, head_size] -> [seq, batch, heads * head_size]."""
        query, key, value = (x.transpose(0, 1).flatten(2) for x in (query, key, value))
        return self.attn(query, key, value).transpose(0, 1)


class Head(nn.Module):
    """Megatron's output layer, [..., hidden_size] -> [..., vocab_size]."""

    def __init__(self, output_layer, parallel_context):
        super().__init__()
        self.output_layer = output_layer
        self.parallel_context = parallel_context

    def forward(self, hidden_states):
        logits, _ = self.output_layer(hidden_states)
        return gather_from_group(logits, self.parallel_context)


class MegatronGPT(nn.Module):
    """Gives a `GPTModel` the interface that vLLM serves."""

    def __init__(self, gpt, parallel_context):
        super().__init__()
        self.parallel_context = parallel_context
        self.gpt = gpt
        self.lm_head = Head(gpt.output_layer, parallel_context)
        gpt.post_process = False  # its forward ends with the last norm: hidden states

    def forward(self, input_ids, positions):
        """[batch, seq] -> logits [batch, seq, vocab_size]."""
        hidden_states = self.gpt(input_ids, positions, attention_mask=None)
        return self.lm_head(hidden_states.transpose(0, 1))

    def token_logprobs(self, ids):
        """Logprob of each token after the first, shape = [batch, seq - 1]."""
        logits = self(ids[:, :-1], positions_of(ids[:, :-1]))
        logprobs = logits.log_softmax(-1, dtype=torch.float32)
        return logprobs.gather(-1, ids[:, 1:, None])[..., 0]

    def parameter_sharding(self):
        """What vLLM asks of layers that are not its own, to load and save them."""
        return megatron_sharding(self, self.parallel_context.tp_size)


def build(config, parallel_context):
    """A GPT with grouped-query attention, RMSNorm and SwiGLU, all of it Megatron's."""
    from megatron.core.models.gpt import GPTModel
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
    from megatron.core.process_groups_config import ProcessGroupCollection
    from megatron.core.transformer.transformer_config import TransformerConfig

    spec = get_gpt_layer_local_spec(normalization="RMSNorm")
    spec.submodules.self_attention.submodules.core_attention = CoreAttention
    tp_group = parallel_context.device_mesh()["tp"].get_group()
    gpt = GPTModel(
        TransformerConfig(
            num_layers=config.num_hidden_layers,
            hidden_size=config.hidden_size,
            num_attention_heads=config.num_attention_heads,
            num_query_groups=config.num_key_value_heads,
            ffn_hidden_size=4 * config.hidden_size,
            gated_linear_unit=True,
            activation_func=nn.functional.silu,
            normalization="RMSNorm",
            add_bias_linear=False,
            hidden_dropout=0.0,
            attention_dropout=0.0,
            tensor_model_parallel_size=parallel_context.tp_size,
            params_dtype=torch.get_default_dtype(),
            use_cpu_initialization=True,  # on torch's default device
        ),
        spec,
        vocab_size=config.vocab_size,
        max_sequence_length=config.max_position_embeddings,
        # Megatron's rope counts positions from 0 itself; these are given them.
        position_embedding_type="learned_absolute",
        pg_collection=ProcessGroupCollection(
            tp=tp_group, pp=parallel_context.pp_group, cp=None, embd=None
        ),
    )
    return MegatronGPT(gpt, parallel_context)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--out", type=Path, default=Path("build/megatron"))
    args = parser.parse_args(arguments)
    if importlib.util.find_spec("megatron") is None:
        sys.exit("This needs Megatron-Core: pip install megatron-core==0.16.1")
    with TrainerRanks() as ranks:
        print("Megatron-Core's GPTModel", flush=True)
        train_and_serve(ranks, build, args.out)
    print("all checks passed")


if __name__ == "__main__":
    main()
