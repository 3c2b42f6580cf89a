# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""Why a trainer and an engine cannot have the same logprobs, before any is computed."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.distributed.tensor import DTensor

from vllm.model_executor.layers.training.attention import TrainableAttention
from vllm.model_executor.layers.training.base import TrainingLayer
from vllm.model_executor.layers.training.linear import RowParallelLinear
from vllm.model_executor.layers.training.ops.attention.table import (
    IMPLEMENTATIONS,
    Request,
    default_for,
    used_features,
)
from vllm.training.fingerprint import differing, fingerprint
from vllm.training.weights import checkpoint_tensors

if TYPE_CHECKING:
    from vllm import LLM

# The engine's attention backend: the trainer's forward that has its bits.
KERNELS = {
    "CPU_ATTN": "vllm_cpu",
    "FLASH_ATTN version 3": "fa3",
    "TRITON_ATTN": "vllm_triton",
}


def refuse_incomparable(
    llm: LLM, model: nn.Module, full_vocab: bool, localise: bool
) -> str:
    """Refuse what cannot be equal.

    Returns:
        Why the weights of both are not known to be the same; empty if they are.

    Raises:
        ValueError: every reason, each with the setting to change.
    """
    reasons = list(_engine_settings(llm, full_vocab, localise))
    workers = llm.collective_rpc("call_training", args=("describe",))
    reasons += _engine_state(workers[0])
    if localise and workers[0]["tp_size"] > 1:
        reasons.append(
            "localise=True compares modules' outputs, of which each worker of a "
            f"tensor-parallel engine has a part (tp_size={workers[0]['tp_size']}): "
            "start it with tensor_parallel_size=1 and "
            f'additional_config={{"tp_reduction_shards": {workers[0]["tp_size"]}}}.'
        )
    if not reasons:
        # Only an engine that could be equal is compared with the trainer.
        reasons += _trainer(model, workers[0])
    note = ""
    if not reasons:
        differences, note = _weights(model, workers)
        reasons += differences
    if reasons:
        listing = "".join(f"\n- {reason}" for reason in reasons)
        raise ValueError(f"Trainer and engine cannot be compared bit for bit:{listing}")
    return note


def _engine_settings(llm: LLM, full_vocab: bool, localise: bool) -> Iterator[str]:
    config = llm.llm_engine.vllm_config
    model = config.model_config
    if model.quantization is not None:
        yield (
            f"The engine is quantised ({model.quantization}), the trainer is not: "
            "start it with quantization=None and an unquantised checkpoint."
        )
    cache_dtype = config.cache_config.cache_dtype
    if cache_dtype not in ("auto", str(model.dtype).removeprefix("torch.")):
        yield (
            f"The engine's KV cache is {cache_dtype}, which rounds keys and values: "
            'start it with kv_cache_dtype="auto".'
        )
    if config.speculative_config is not None:
        yield (
            "The engine decodes speculatively, several tokens at a time: start it "
            "without speculative_config."
        )
    if config.lora_config is not None:
        yield (
            "The engine serves LoRA adapters, which the trainer's weights do not hold: "
            "merge the adapter into them and start it with enable_lora=False."
        )
    if model.logprobs_mode not in ("raw_logprobs", "processed_logprobs"):
        yield (
            f"The engine's sampler gives {model.logprobs_mode}: start it with "
            'logprobs_mode="raw_logprobs".'
        )
    elif model.logprobs_mode == "processed_logprobs" and model.logits_processors:
        yield (
            "The engine's sampler gives logprobs after its logits_processors: start "
            'it with logprobs_mode="raw_logprobs", or without logits_processors.'
        )
    limit, vocab_size = model.max_logprobs, model.get_vocab_size()
    if full_vocab and limit != -1 and limit < vocab_size:
        yield (
            f"full_vocab=True needs {vocab_size} logprobs a token and the engine gives "
            f"at most max_logprobs={limit}: start it with max_logprobs=-1."
        )
    if localise and not model.enforce_eager:
        yield (
            "localise=True watches the engine's modules, which a compiled engine does "
            "not call one by one: start it with enforce_eager=True."
        )


def _engine_state(worker: dict[str, Any]) -> Iterator[str]:
    if not worker["batch_invariant"]:
        yield (
            "The engine is not in batch-invariant mode: set VLLM_BATCH_INVARIANT=1 in "
            "the environment before it starts."
        )
    for backend in worker["attention"]:
        if backend not in KERNELS:
            yield (
                f"The engine's attention backend {backend} has no counterpart in the "
                f"trainer; those that have are {', '.join(KERNELS)}: start it with "
                "attention_backend set to one of them."
            )


def _trainer(model: nn.Module, worker: dict[str, Any]) -> Iterator[str]:
    parameters = list(model.parameters())
    layers = (m for m in model.modules() if isinstance(m, TrainingLayer))
    if any(layer.tp_size > 1 for layer in layers) or any(
        isinstance(parameter, DTensor) for parameter in parameters
    ):
        yield (
            "The trainer is sharded over processes, which all have to score together: "
            "generate on one of them, send the outputs to all, and call "
            "parity.compare(model, outputs) on each."
        )
        return
    device = parameters[0].device
    capability = ""
    if device.type == "cuda":
        capability = ".".join(map(str, torch.cuda.get_device_capability(device)))
    here = f"{device.type} {capability}".strip()
    there = f"{worker['device']} {worker['capability']}".strip()
    if here != there:
        yield (
            f"The trainer is on {here}, the engine on {there}: move the trainer to "
            "such a device, their kernels add up in different orders."
        )
    dtypes = {str(p.dtype).removeprefix("torch.") for p in parameters}
    if worker["dtype"] not in dtypes:
        given = ", ".join(sorted(dtypes))
        yield (
            f"The trainer's parameters are {given}, the engine computes in "
            f"{worker['dtype']}: start the engine with dtype={given!r}, or score with "
            f"a copy of the trainer in {worker['dtype']}."
        )
    shards = worker["tp_reduction_shards"]
    for path, layer in model.named_modules():
        if not isinstance(layer, RowParallelLinear):
            continue
        own = layer.parallel_context.tp_reduction_shards
        if own != shards:
            yield (
                f"The engine adds up {shards} partial products in its row-parallel "
                f"layers, the trainer's {path} {own}: build the trainer with "
                f"ParallelContext(tp_reduction_shards={shards}), or start the engine "
                f'with additional_config={{"tp_reduction_shards": {own}}}.'
            )
            break
    if here == there:
        yield from _attention(model, worker["attention"])


def _attention(model: nn.Module, backends: list[str]) -> Iterator[str]:
    """Reasons from the kernels that the trainer's attention runs on."""
    wanted = {KERNELS[backend]: backend for backend in backends}
    for path, layer in model.named_modules():
        if not isinstance(layer, TrainableAttention) or not wanted:
            continue
        name = _implementation(model, layer)
        kernel = IMPLEMENTATIONS[name][0] if name else "none"
        if kernel not in wanted:
            (expected, backend), *_ = wanted.items()
            backends_here = {v: k for k, v in KERNELS.items()}
            advice = f"build its attention with implementation={expected!r}"
            if kernel in backends_here:
                other = backends_here[kernel].partition(" ")[0]
                advice += f", or start the engine with attention_backend={other!r}"
            yield (
                f"The trainer's {path} computes with {kernel!r}, the engine's backend "
                f"{backend} has the bits of {expected!r}: {advice}."
            )
            return


def _implementation(model: nn.Module, layer: TrainableAttention) -> str | None:
    """Name of what computes a layer's attention in the mode; None if nothing can."""
    if layer.implementation is not None:
        return layer.implementation
    parameter = next(model.parameters())
    request = Request.on(
        parameter.device,
        parameter.dtype,
        layer.num_heads,
        layer.head_size,
        used_features(
            causal=layer.spec.causal,
            window=layer.spec.window,
            soft_cap=layer.spec.soft_cap,
            sinks=layer.sinks is not None,
            alibi_slopes=layer.alibi_slopes is not None,
        ),
        layer.deterministic,
        True,
    )
    return default_for(request)


def _weights(model: nn.Module, workers: list[dict[str, Any]]) -> tuple[list[str], str]:
    """Reasons to refuse, and why the weights could not be compared."""
    if any(worker["weights"] is None for worker in workers):
        return [], "the engine's model has a load_weights of its own"
    missing = workers[0]["weights_missing"]
    if missing:
        return [], f"the engine never loaded {', '.join(missing)}"
    own = {name: fingerprint(tensor) for name, tensor in checkpoint_tensors(model)}
    for worker in workers:
        names = differing(own, worker["weights"])
        if names:
            name = names[0]
            reason = (
                f"{len(names)} of {len(own)} weights differ, first {name}: engine "
                f"{worker['weights'].get(name)}, trainer {own.get(name)} (dtype, "
                "shape and a sum of the bits). Send the engine the trainer's: "
                "save_checkpoint(model, directory), llm.collective_rpc("
                "'reload_weights', kwargs={'weights_path': directory}), "
                "llm.reset_prefix_cache(); a trainer of several dtypes is cast to the "
                "engine's and cannot be equal."
            )
            return [reason], ""
    return [], ""
