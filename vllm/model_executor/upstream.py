# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""Every unstable vLLM internal that this project uses, imported in one place.

Modules of the project write `from vllm.model_executor import upstream` and
`upstream.NAME`, so that a rebase onto another vLLM touches this file alone.
`vllm.model_executor.parallel_context` imports it inside functions only, because
modules below may import that one.

    Attention: what TrainableAttention runs inside the engine.
    ColumnParallelLinear, MergedColumnParallelLinear, QKVParallelLinear,
        RowParallelLinear: what our linears become inside the engine.
    ParallelLMHead, VocabParallelEmbedding: what our embedding and head become.
    DEFAULT_VOCAB_PADDING_SIZE, pad_vocab_size: rows of a tensor-parallel vocabulary.
    VllmConfig, set_current_vllm_config: vLLM's group set-up reads the current config.
    current_platform: device type and collective backend of this machine.
    init_distributed_environment, initialize_model_parallel,
        model_parallel_is_initialized, get_world_group, get_tp_group, get_pp_group,
        get_dp_group, destroy_model_parallel, destroy_distributed_environment:
        vLLM's process groups, shared by trainer and engine.
    LogitsProcessor: gathers the head's tensor-parallel logits in the engine.
    BaseRegisteredModel, ModelInfo: an entry of the model registry.
    finalize_layerwise_reload: ends vLLM's reloading of weights.
    MODEL_ARCH_BY_HASH: the cache of classes that architectures were resolved to.
    HFConfigParser, CONFIG_PARSERS, CONFIG_REGISTRY: how a model's config.json is
        read, and which model types vLLM knows.
"""

from vllm.config import VllmConfig, set_current_vllm_config
from vllm.distributed.parallel_state import (
    destroy_distributed_environment,
    destroy_model_parallel,
    get_dp_group,
    get_pp_group,
    get_tp_group,
    get_world_group,
    init_distributed_environment,
    initialize_model_parallel,
    model_parallel_is_initialized,
)
from vllm.model_executor.layers.attention import Attention
from vllm.model_executor.layers.linear import (
    ColumnParallelLinear,
    MergedColumnParallelLinear,
    QKVParallelLinear,
    RowParallelLinear,
)
from vllm.model_executor.layers.logits_processor import LogitsProcessor
from vllm.model_executor.layers.vocab_parallel_embedding import (
    DEFAULT_VOCAB_PADDING_SIZE,
    ParallelLMHead,
    VocabParallelEmbedding,
    pad_vocab_size,
)
from vllm.model_executor.model_loader.reload import finalize_layerwise_reload
from vllm.model_executor.model_loader.utils import (
    _MODEL_ARCH_BY_HASH as MODEL_ARCH_BY_HASH,
)
from vllm.model_executor.models.registry import (
    _BaseRegisteredModel as BaseRegisteredModel,
)
from vllm.model_executor.models.registry import (
    _ModelInfo as ModelInfo,
)
from vllm.platforms import current_platform
from vllm.transformers_utils.config import (
    _CONFIG_FORMAT_TO_CONFIG_PARSER as CONFIG_PARSERS,
)
from vllm.transformers_utils.config import (
    _CONFIG_REGISTRY as CONFIG_REGISTRY,
)
from vllm.transformers_utils.config import (
    HFConfigParser,
)

__all__ = [
    "Attention",
    "BaseRegisteredModel",
    "CONFIG_PARSERS",
    "CONFIG_REGISTRY",
    "ColumnParallelLinear",
    "DEFAULT_VOCAB_PADDING_SIZE",
    "HFConfigParser",
    "LogitsProcessor",
    "MODEL_ARCH_BY_HASH",
    "MergedColumnParallelLinear",
    "ModelInfo",
    "ParallelLMHead",
    "QKVParallelLinear",
    "RowParallelLinear",
    "VllmConfig",
    "VocabParallelEmbedding",
    "current_platform",
    "destroy_distributed_environment",
    "destroy_model_parallel",
    "finalize_layerwise_reload",
    "get_dp_group",
    "get_pp_group",
    "get_tp_group",
    "get_world_group",
    "init_distributed_environment",
    "initialize_model_parallel",
    "model_parallel_is_initialized",
    "pad_vocab_size",
    "set_current_vllm_config",
]
