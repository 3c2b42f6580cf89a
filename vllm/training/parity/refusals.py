# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""Why a trainer and an engine cannot have the same logprobs, before any is computed."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import nn
from torch.distributed.tensor import DTensor

from vllm.model_executor.checkpoint.fingerprint import (
    buffer_fingerprints,
    fingerprint,
)
from vllm.model_executor.checkpoint.save import checkpoint_tensors
from vllm.model_executor.layers.training.attention import TrainableAttention
from vllm.model_executor.layers.training.base import TrainingLayer
from vllm.model_executor.layers.training.linear import RowParallelLinear
from vllm.model_executor.layers.training.self_check import AttentionShape
from vllm.model_executor.models.builder.spec import BuilderOptions

if TYPE_CHECKING:
    from vllm import LLM

# The engine's attention backend: the trainer's forward that has its bits.
KERNELS = {
    "CPU_ATTN": "vllm_cpu",
    "FLASH_ATTN version 3": "fa3",
    "TRITON_ATTN": "vllm_triton",
}
# Proposers of tokens with which an engine on CPU has the bits of one without.
SPECULATION_ON_CPU = ("ngram", "draft_model")
# Names of weights that a message lists.
LISTED = 5


class Comparable(NamedTuple):
    """What is known of a trainer and an engine that could be equal.

    Attributes:
        weights_note: why the weights of both are not known to be the same; empty if
            they are.
        next_step: what to look at if their tokens differ all the same.
        options: what the engine's builder says; the path of the head is that of the
            engine, None if it does not know it.
    """

    weights_note: str
    next_step: str
    options: BuilderOptions


def refuse_incomparable(
    llm: LLM, model: nn.Module, full_vocab: bool, localise: bool
) -> Comparable:
    """Refuse what cannot be equal.

    Raises:
        TypeError: another kind of engine than `vllm.LLM`, or no module.
        ValueError: every reason, each with the setting to change; or the model has no
            parameters.
    """
    _check_kinds(llm, model)
    reasons = list(_engine_settings(llm, full_vocab, localise))
    workers = llm.collective_rpc("call_training", args=("describe",))
    engine = _as_a_whole(workers)
    reasons += _engine_state(engine)
    if localise and engine["tp_size"] > 1:
        reasons.append(
            "localise=True compares modules' outputs, of which each worker of a "
            f"tensor-parallel engine has a part (tp_size={engine['tp_size']}): start "
            "it with tensor_parallel_size=1 and "
            f'additional_config={{"tp_reduction_shards": '
            f"{engine['tp_reduction_shards']}}}."
        )
    if not reasons:
        # Only an engine that could be equal is compared with the trainer.
        reasons += _trainer(model, engine)
    note = ""
    if not reasons:
        differences, note = _weights(model, workers)
        reasons += differences
    if reasons:
        listing = "".join(f"\n- {reason}" for reason in reasons)
        raise ValueError(f"Trainer and engine cannot be compared bit for bit:{listing}")
    step = _next_step(model, engine, localise)
    said = {name: engine[name] for name in ("head", "batched", "positions")}
    return Comparable(note, step, BuilderOptions(**said))


def _check_kinds(llm: Any, model: Any) -> None:
    """Raise TypeError for what is no `LLM` or no module."""
    if not callable(getattr(llm, "collective_rpc", None)) or not hasattr(
        llm, "llm_engine"
    ):
        raise TypeError(
            f"parity.check got {_kind(llm)} as llm; it must be a vllm.LLM. With "
            "another engine or a server, generate with SamplingParams(logprobs=0) and "
            "pass the outputs to parity.compare(model, outputs)."
        )
    if not isinstance(model, nn.Module):
        raise TypeError(
            f"parity.check got {_kind(model)} as model; give the training model, a "
            "torch.nn.Module with its weights in this process."
        )
    if next(model.parameters(), None) is None:
        raise ValueError(f"{type(model).__name__} has no parameters to compare.")


def _kind(value: object) -> str:
    if isinstance(value, type):
        return f"the class {value.__name__}"
    return repr(value) if isinstance(value, str) else f"a {type(value).__name__}"


def _as_a_whole(workers: list[dict[str, Any]]) -> dict[str, Any]:
    """What all workers say together; the weights are left out."""
    attention = set().union(*(worker["attention"] for worker in workers))
    return workers[0] | {
        "batch_invariant": all(worker["batch_invariant"] for worker in workers),
        "attention": sorted(attention),
        "weights": None,
        "buffers": {k: v for w in workers for k, v in w["buffers"].items()},
        "head": next((w["head"] for w in workers if w["head"] is not None), None),
    }


def _next_step(model: nn.Module, engine: dict[str, Any], localise: bool) -> str:
    """The likeliest cause of a difference that no setting explains."""
    layers = "the layers of vllm.model_executor.layers.training"
    for path, layer in model.named_modules():
        if type(layer) is nn.Linear:
            return (
                f"{path} is a torch.nn.Linear, whose rows may depend on the batch: use "
                f"{layers}, such as ColumnParallelLinear."
            )
    shards = engine["tp_reduction_shards"]
    if shards > 1 and not any(
        isinstance(x, RowParallelLinear) for x in model.modules()
    ):
        return (
            f"The engine has {shards} tensor-parallel ranks and the trainer no "
            "RowParallelLinear. What other libraries' layers add up over ranks has an "
            f"order of its own: use {layers}, or start the engine with "
            "tensor_parallel_size=1."
        )
    own = buffer_fingerprints(model)
    for name in sorted(own.keys() & engine["buffers"].keys()):
        if own[name] != engine["buffers"][name]:
            return (
                f"The buffer {name}, which no checkpoint has, differs: engine "
                f"{engine['buffers'][name]}, trainer {own[name]} (dtype, shape and a "
                "sum of the bits). model.to(dtype) also rounds such buffers: build the "
                "trainer in its dtype instead, as from_pretrained(..., dtype=...) does."
            )
    step = (
        "All known settings agree. Code between the layers has to be batch-invariant "
        "and to do the same in trainer and engine, which F.gelu, for one, does not"
    )
    if not localise:
        step += "; parity.check(..., localise=True) names the first module that differs"
    return f"{step}."


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
    yield from _speculation(config)
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


def _speculation(config: Any) -> Iterator[str]:
    speculation = config.speculative_config
    if speculation is None:
        return
    allowed = " and ".join(map(repr, SPECULATION_ON_CPU))
    if (
        config.device_config.device_type != "cpu"
        or speculation.method not in SPECULATION_ON_CPU
    ):
        yield (
            f"The engine decodes speculatively by {speculation.method!r} on "
            f"{config.device_config.device_type}. Only {allowed} on CPU were shown to "
            "keep its bits: start it without speculative_config."
        )
    elif config.model_config.logprobs_mode != "raw_logprobs":
        yield (
            "vLLM's sampler for speculative decoding does not return the processed "
            "logprobs of the distribution that it samples from: start the engine with "
            'logprobs_mode="raw_logprobs", or without speculative_config.'
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
    if device.type != "meta" and torch.is_autocast_enabled(device.type):
        yield (
            "torch.autocast is on, with which the trainer computes in other dtypes "
            "than the engine: call parity.check outside of it."
        )
    dtypes = {str(p.dtype).removeprefix("torch.") for p in parameters}
    if worker["dtype"] not in dtypes:
        given = ", ".join(sorted(dtypes))
        yield (
            f"The trainer's parameters are {given}, the engine computes in "
            f"{worker['dtype']}: start the engine with dtype={given!r}, or score with "
            f"a copy of the trainer in {worker['dtype']}."
        )
    yield from _reduction_shards(model, worker)
    if here == there:
        yield from _attention(model, worker["attention"])


def _reduction_shards(model: nn.Module, worker: dict[str, Any]) -> Iterator[str]:
    """The first row-parallel layer that adds up otherwise than the engine's."""
    shards, ranks = worker["tp_reduction_shards"], worker["tp_size"]
    for path, layer in model.named_modules():
        if not isinstance(layer, RowParallelLinear):
            continue
        own = layer.parallel_context.tp_reduction_shards
        if own == shards:
            continue
        advice = (
            "build the trainer with a parallel context of "
            f"tp_reduction_shards={shards}, such as "
            f"ParallelContext(tp_reduction_shards={shards})"
        )
        if own % ranks == 0:
            setting = f'additional_config={{"tp_reduction_shards": {own}}}'
            advice += f", or start the engine with {setting}"
        yield (
            f"The engine adds up {shards} partial products in its row-parallel layers, "
            f"the trainer's {path} adds up {own}: {advice}."
        )
        return


def _attention(model: nn.Module, backends: list[str]) -> Iterator[str]:
    """Reasons from the kernels that the trainer's attention runs on."""
    wanted = {KERNELS[backend]: backend for backend in backends}
    parameter = next(model.parameters())
    for path, layer in model.named_modules():
        if not isinstance(layer, TrainableAttention) or not wanted:
            continue
        shape = AttentionShape.of(layer, parameter.dtype)
        kernel = shape.forward_on(parameter.device) or "none"
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


def _weights(model: nn.Module, workers: list[dict[str, Any]]) -> tuple[list[str], str]:
    """Reasons to refuse, and why the weights could not be compared.

    A worker has the weights of its pipeline stage, so those of all stages of each
    tensor-parallel rank are compared with the trainer's.
    """
    if any(worker["weights"] is None for worker in workers):
        return [], "the engine's model has a load_weights of its own"
    missing = {name for worker in workers for name in worker["weights_missing"]}
    if missing:
        return [], f"the engine never loaded {_listed(missing)}"
    own = {name: fingerprint(tensor) for name, tensor in checkpoint_tensors(model)}
    other: dict[str, str] = {}
    held: dict[int, set[str]] = {}
    for worker in workers:
        held.setdefault(worker["tp_rank"], set()).update(worker["weights"])
        for name, print_ in worker["weights"].items():
            if name in own and print_ != own[name]:
                place = ""
                if len(workers) > 1:
                    place = (
                        f" on pipeline stage {worker['pp_rank']}, tensor-parallel "
                        f"rank {worker['tp_rank']}"
                    )
                other.setdefault(name, print_ + place)
    reasons = []
    if other:
        sendable = {
            name: print_.startswith(own[name].partition(":")[0])
            for name, print_ in other.items()
        }
        # One that cannot be sent says more.
        name = min(other, key=lambda name: (sendable[name], name))
        reason = (
            f"{len(other)} of {len(own)} weights differ, first {name}: engine "
            f"{other[name]}, trainer {own[name]} (dtype, shape and a sum of the bits). "
        )
        if sendable[name]:
            reason += (
                "Send the engine the trainer's: save_checkpoint(model, directory), "
                "llm.collective_rpc('reload_weights', kwargs={'weights_path': "
                "directory}), llm.reset_prefix_cache()."
            )
        else:
            reason += (
                "Build both with one builder, one config and one dtype; a trainer of "
                "several dtypes is cast to the engine's and cannot be equal."
            )
        reasons.append(reason)
    for lacking, names in (
        ("engine", own.keys() - set.intersection(*held.values())),
        ("trainer", set.union(*held.values()) - own.keys()),
    ):
        if names:
            reasons.append(
                f"The {lacking} lacks {len(names)} weights that the other has: "
                f"{_listed(names)}. Build both with one builder and one config."
            )
    return reasons, ""


def _listed(names: set[str]) -> str:
    """The first of some names, and how many more there are."""
    first, more = sorted(names)[:LISTED], len(names) - LISTED
    return ", ".join(first) + (f" and {more} more" if more > 0 else "")
