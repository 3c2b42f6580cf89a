# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""Every unstable vLLM internal that this project uses, imported in one place.

Modules of the project write `from vllm.model_executor import vllm_internals` and
`vllm_internals.NAME`, so that a rebase onto another vLLM touches this file alone.
`determinism` and `parallel_context`, which vLLM's own modules import, do so inside
functions. `csrc/training/cpu/linear.cpp` calls vLLM's op `_C::onednn_mm`.
"""

import functools
from collections.abc import Callable
from types import ModuleType, SimpleNamespace
from typing import Any

import torch

from vllm import envs

# Attention, as TrainableAttention runs it inside the engine.
from vllm.model_executor.layers.attention import Attention

# What our linears become inside the engine, and how unquantised ones make and multiply
# their weights.
from vllm.model_executor.layers.linear import (
    ColumnParallelLinear,
    MergedColumnParallelLinear,
    QKVParallelLinear,
    RowParallelLinear,
    UnquantizedLinearMethod,
)

# What our embedding and head become, the method of an unquantised one, and the rows of
# a tensor-parallel vocabulary.
from vllm.model_executor.layers.vocab_parallel_embedding import (
    DEFAULT_VOCAB_PADDING_SIZE,
    ParallelLMHead,
    UnquantizedEmbeddingMethod,
    VocabParallelEmbedding,
    pad_vocab_size,
)

# What gathers the head's tensor-parallel logits.
from vllm.model_executor.layers.logits_processor import LogitsProcessor

# What our gated activations become outside batch-invariant mode.
from vllm.model_executor.layers.activation import GeluAndMul, SiluAndMul

# The ops, with `rms_norm` and `fused_add_rms_norm`, that vLLM's compiler passes fuse
# with others; `vllm.kernels` gives them their kernels.
import vllm.kernels
from vllm.ir import ops as ir_ops

# Whether the engine runs a step of a model now, and what makes such a step.
from vllm.forward_context import is_forward_context_available, set_forward_context

# vLLM's process groups, which trainer and engine share, and the config that their
# set-up reads.
from vllm.config import (
    VllmConfig,
    get_current_vllm_config_or_none,
    set_current_vllm_config,
)
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

# Device type and collective backend of this machine.
from vllm.platforms import current_platform

# Which layers a pipeline stage has, and what it sends to the next.
from vllm.distributed.utils import get_pp_indices
from vllm.sequence import IntermediateTensors

# An entry of the model registry, and the cache of classes that architectures were
# resolved to.
from vllm.model_executor.models.registry import (
    _BaseRegisteredModel as BaseRegisteredModel,
)
from vllm.model_executor.models.registry import _ModelInfo as ModelInfo
from vllm.model_executor.model_loader.utils import (
    _MODEL_ARCH_BY_HASH as MODEL_ARCH_BY_HASH,
)

# How a model's config.json is read, and which model types vLLM knows.
from vllm.transformers_utils.config import (
    _CONFIG_FORMAT_TO_CONFIG_PARSER as CONFIG_PARSERS,
)
from vllm.transformers_utils.config import _CONFIG_REGISTRY as CONFIG_REGISTRY
from vllm.transformers_utils.config import HFConfigParser

# The dtype that a checkpoint has, and what `dtype="auto"` makes of it.
from vllm.config.model import _resolve_auto_dtype as auto_dtype
from vllm.transformers_utils.model_arch_config_convertor import (
    ModelArchConfigConvertorBase,
)

# vLLM's reading of weight files, and its reloading of weights.
from vllm.model_executor.model_loader.default_loader import DefaultModelLoader
from vllm.model_executor.model_loader.reload import finalize_layerwise_reload
from vllm.model_executor.model_loader.reload.layerwise import get_layerwise_info


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
