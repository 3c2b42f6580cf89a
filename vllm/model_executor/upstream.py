# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""Every unstable vLLM internal that this project uses, imported in one place.

Modules of the project write `from vllm.model_executor import upstream` and
`upstream.NAME`, so that a rebase onto another vLLM touches this file alone.
`vllm.model_executor.parallel_context` imports it inside functions only, because
modules below may import that one.

    Attention: what TrainableAttention runs inside the engine.
    flash_attention, flash_attention_backward, triton_attention, cpu_attention: the
        engine's attention kernels, which the trainer calls too. Imported when they are
        first used.
    batch_invariant_kernels: vLLM's batch-invariant kernels for CUDA. Imported when they
        are first used.
    gpu_sampler: the CUDA engine's kernels from logits to logprobs. Imported when they
        are first used.
    onednn: the CPU engine's matrix products. Imported when they are first used. Its
        `_C::onednn_mm` is called by `csrc/training/cpu/linear.cpp`.
    has_alibi: whether an Attention's backend reads its ALiBi slopes.
    ColumnParallelLinear, MergedColumnParallelLinear, QKVParallelLinear,
        RowParallelLinear: what our linears become inside the engine.
    UnquantizedEmbeddingMethod: of an embedding or head that is not quantised.
    UnquantizedLinearMethod: how they create and multiply their weights.
    GeluAndMul, SiluAndMul: what our gated activations become outside batch-invariant
        mode.
    ir_ops: the ops, with `rms_norm` and `fused_add_rms_norm`, that vLLM's compiler
        passes fuse with others.
    tensor_model_parallel_all_gather: of the engine's tensor-parallel group.
    is_forward_context_available: whether the engine runs a step of a model now.
    set_forward_context: makes the code inside such a step.
    ParallelLMHead, VocabParallelEmbedding: what our embedding and head become.
    DEFAULT_VOCAB_PADDING_SIZE, pad_vocab_size: rows of a tensor-parallel vocabulary.
    VllmConfig, set_current_vllm_config, get_current_vllm_config_or_none: vLLM's group
        set-up reads the current config.
    current_platform: device type and collective backend of this machine.
    init_distributed_environment, initialize_model_parallel,
        model_parallel_is_initialized, get_world_group, get_tp_group, get_pp_group,
        get_dp_group, destroy_model_parallel, destroy_distributed_environment:
        vLLM's process groups, shared by trainer and engine.
    get_pp_indices: which layers a pipeline stage has.
    IntermediateTensors: what a pipeline stage sends to the next.
    LogitsProcessor: gathers the head's tensor-parallel logits in the engine.
    BaseRegisteredModel, ModelInfo: an entry of the model registry.
    finalize_layerwise_reload: ends vLLM's reloading of weights.
    expect_no_weights: tells it that a module gets none.
    reads_model_files: whether an iterator of weights is vLLM's over a model's files.
    MODEL_ARCH_BY_HASH: the cache of classes that architectures were resolved to.
    checkpoint_dtype: the dtype that a model's config or its safetensors say.
    auto_dtype: what `dtype="auto"` makes of it.
    HFConfigParser, CONFIG_PARSERS, CONFIG_REGISTRY: how a model's config.json is
        read, and which model types vLLM knows.
"""

import functools
from collections.abc import Callable
from types import ModuleType, SimpleNamespace
from typing import Any

import torch

import vllm.kernels  # noqa: F401, gives ir_ops their kernels
from vllm import envs
from vllm.config import (
    VllmConfig,
    get_current_vllm_config_or_none,
    set_current_vllm_config,
)
from vllm.config.model import _resolve_auto_dtype as auto_dtype
from vllm.distributed.communication_op import tensor_model_parallel_all_gather
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
from vllm.distributed.utils import get_pp_indices
from vllm.forward_context import is_forward_context_available, set_forward_context
from vllm.ir import ops as ir_ops
from vllm.model_executor.layers.activation import GeluAndMul, SiluAndMul
from vllm.model_executor.layers.attention import Attention
from vllm.model_executor.layers.linear import (
    ColumnParallelLinear,
    MergedColumnParallelLinear,
    QKVParallelLinear,
    RowParallelLinear,
    UnquantizedLinearMethod,
)
from vllm.model_executor.layers.logits_processor import LogitsProcessor
from vllm.model_executor.layers.vocab_parallel_embedding import (
    DEFAULT_VOCAB_PADDING_SIZE,
    ParallelLMHead,
    UnquantizedEmbeddingMethod,
    VocabParallelEmbedding,
    pad_vocab_size,
)
from vllm.model_executor.model_loader.default_loader import DefaultModelLoader
from vllm.model_executor.model_loader.reload import finalize_layerwise_reload
from vllm.model_executor.model_loader.reload.layerwise import get_layerwise_info
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
from vllm.sequence import IntermediateTensors
from vllm.transformers_utils.config import (
    _CONFIG_FORMAT_TO_CONFIG_PARSER as CONFIG_PARSERS,
)
from vllm.transformers_utils.config import (
    _CONFIG_REGISTRY as CONFIG_REGISTRY,
)
from vllm.transformers_utils.config import (
    HFConfigParser,
)
from vllm.transformers_utils.model_arch_config_convertor import (
    ModelArchConfigConvertorBase,
)


@functools.cache
def flash_attention() -> ModuleType:
    """FlashAttention of several versions, with `flash_attn_varlen_func`; CUDA only."""
    from vllm import vllm_flash_attn

    return vllm_flash_attn


@functools.cache
def flash_attention_backward() -> Callable[..., Any]:
    """FlashAttention 4's backward; needs nvidia-cutlass-dsl and quack-kernels."""
    from vllm.vllm_flash_attn.cute.interface import _flash_attn_bwd

    return _flash_attn_bwd


@functools.cache
def triton_attention() -> Callable[..., None]:
    """The kernel of the TRITON_ATTN backend, on a paged KV cache; CUDA only."""
    from vllm.v1.attention.ops.triton_unified_attention import unified_attention

    return unified_attention


@functools.cache
def cpu_attention() -> SimpleNamespace:
    """The CPU engine's attention.

    Attributes:
        ops: the module with its ops.
        is_built: whether vLLM's build has them: a build for CUDA has not.
        isa: names its kernel for (dtype, page size, head size).
        head_sizes: those it has.
        split_kv: says whether the engine lets threads share a sequence's keys.
    """
    from vllm import _custom_ops
    from vllm.v1.attention.backends import cpu_attn

    current_platform.import_kernels()
    return SimpleNamespace(
        ops=_custom_ops,
        is_built=hasattr(torch.ops._C, "cpu_attention_with_kv_cache"),
        isa=cpu_attn._get_attn_isa,
        head_sizes=cpu_attn.CPUAttentionBackend.get_supported_head_sizes(),
        split_kv=lambda: envs.VLLM_CPU_ATTN_SPLIT_KV,
    )


@functools.cache
def batch_invariant_kernels() -> ModuleType:
    """vLLM's batch-invariant kernels, with `matmul_persistent`; CUDA only."""
    from vllm.model_executor.determinism import batch_invariant

    return batch_invariant


@functools.cache
def gpu_sampler() -> SimpleNamespace:
    """Kernels of the sampler on CUDA: of model runner V2, which is vLLM's default.

    Attributes:
        apply_temperature: called with (fp32 logits to divide in place, the request of
            each row, the requests' temperatures).
        compute_token_logprobs: called with (logits, token ids of each row).
    """
    from vllm.v1.worker.gpu.sample import gumbel, logprob

    return SimpleNamespace(
        apply_temperature=gumbel.apply_temperature,
        compute_token_logprobs=logprob.compute_token_logprobs,
    )


@functools.cache
def onednn() -> SimpleNamespace:
    """Matrix products of vLLM's build for CPU.

    Attributes:
        is_built: whether this build has them.
        pack: makes a handler of a transposed weight, shape = [K, N].
    """
    from vllm import _custom_ops

    current_platform.import_kernels()
    return SimpleNamespace(
        is_built=hasattr(torch.ops._C, "create_onednn_mm_handler"),
        pack=_custom_ops.create_onednn_mm,
    )


def expect_no_weights(module: torch.nn.Module) -> None:
    """Let a module that vLLM reloads get its tensors back, without a warning."""
    info = get_layerwise_info(module)
    if info.can_load():
        info.load_numel, info.load_numel_total = 0, 0
        info.loaded_weights = []


def checkpoint_dtype(model_config: Any) -> torch.dtype:
    """The dtype in a model's config or, where it has none, of its safetensors."""
    return ModelArchConfigConvertorBase.get_torch_dtype(
        model_config.hf_config,
        model_config.model,
        revision=model_config.revision,
        config_format=model_config.config_format,
    )


def reads_model_files(weights: Any) -> bool:
    """Whether `weights` are what vLLM reads from the directory `ModelConfig.model`."""
    code = getattr(weights, "gi_code", None)
    return code is DefaultModelLoader.get_all_weights.__code__


def has_alibi(attention: Attention) -> bool:
    """Whether the backend of vLLM's attention reads ALiBi slopes.

    Others take them and leave them out, or fail at the first step: of FlashAttention's
    versions only 2 has them, which not every build of vLLM has.
    """
    name = attention.attn_backend.get_name()
    if name == "FLASH_ATTN":
        version = getattr(attention.impl, "vllm_flash_attn_version")  # noqa: B009
        return version == 2 and flash_attention().is_fa_version_supported(2)
    return name in ("CPU_ATTN", "TRITON_ATTN")


__all__ = [
    "Attention",
    "BaseRegisteredModel",
    "CONFIG_PARSERS",
    "CONFIG_REGISTRY",
    "ColumnParallelLinear",
    "DEFAULT_VOCAB_PADDING_SIZE",
    "GeluAndMul",
    "HFConfigParser",
    "IntermediateTensors",
    "LogitsProcessor",
    "MODEL_ARCH_BY_HASH",
    "MergedColumnParallelLinear",
    "ModelInfo",
    "ParallelLMHead",
    "QKVParallelLinear",
    "RowParallelLinear",
    "SiluAndMul",
    "UnquantizedEmbeddingMethod",
    "UnquantizedLinearMethod",
    "VllmConfig",
    "VocabParallelEmbedding",
    "auto_dtype",
    "batch_invariant_kernels",
    "checkpoint_dtype",
    "cpu_attention",
    "current_platform",
    "destroy_distributed_environment",
    "destroy_model_parallel",
    "expect_no_weights",
    "finalize_layerwise_reload",
    "flash_attention",
    "flash_attention_backward",
    "get_current_vllm_config_or_none",
    "get_dp_group",
    "get_pp_group",
    "get_pp_indices",
    "get_tp_group",
    "get_world_group",
    "gpu_sampler",
    "has_alibi",
    "init_distributed_environment",
    "initialize_model_parallel",
    "ir_ops",
    "is_forward_context_available",
    "model_parallel_is_initialized",
    "onednn",
    "pad_vocab_size",
    "reads_model_files",
    "set_current_vllm_config",
    "set_forward_context",
    "tensor_model_parallel_all_gather",
    "triton_attention",
]
