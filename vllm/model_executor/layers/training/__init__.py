# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""Layers that are trained under plain autograd and served by vLLM's engine."""

from vllm.model_executor.layers.training.activation import (
    Gelu,
    GeluAndMul,
    SiluAndMul,
)
from vllm.model_executor.layers.training.attention import TrainableAttention
from vllm.model_executor.layers.training.base import TrainingLayer, skip_init
from vllm.model_executor.layers.training.embedding import (
    ParallelLMHead,
    VocabParallelEmbedding,
)
from vllm.model_executor.layers.training.flash_attention import VLLMFlashAttention
from vllm.model_executor.layers.training.latent_linear import LatentKVLinear
from vllm.model_executor.layers.training.linear import (
    ColumnParallelLinear,
    MergedColumnParallelLinear,
    QKVParallelLinear,
    RowParallelLinear,
)
from vllm.model_executor.layers.training.logprobs import (
    full_logprobs,
    token_logprobs,
    weighted_nll,
)
from vllm.model_executor.layers.training.norm import LayerNorm, RMSNorm
from vllm.model_executor.layers.training.rotary import RotaryEmbedding
from vllm.model_executor.layers.training.sequence_parallel import (
    GatherSequence,
    SplitSequence,
)
from vllm.model_executor.layers.training.transposed_linear import (
    TransposedColumnParallelLinear,
    TransposedRowParallelLinear,
)

__all__ = [
    "ColumnParallelLinear",
    "GatherSequence",
    "Gelu",
    "GeluAndMul",
    "LatentKVLinear",
    "LayerNorm",
    "MergedColumnParallelLinear",
    "ParallelLMHead",
    "QKVParallelLinear",
    "RMSNorm",
    "RotaryEmbedding",
    "RowParallelLinear",
    "SiluAndMul",
    "SplitSequence",
    "TrainableAttention",
    "TrainingLayer",
    "TransposedColumnParallelLinear",
    "TransposedRowParallelLinear",
    "VLLMFlashAttention",
    "VocabParallelEmbedding",
    "full_logprobs",
    "skip_init",
    "token_logprobs",
    "weighted_nll",
]
