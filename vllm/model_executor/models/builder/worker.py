# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""What runs in the engine's workers, called by name from the front end.

`llm.collective_rpc("call_training", args=("describe",))` gives one answer a worker.
Arguments and results are plain values, which reach every executor's workers.
"""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

import torch

from vllm.model_executor import vllm_internals
from vllm.model_executor.checkpoint.fingerprint import buffer_fingerprints
from vllm.model_executor.determinism.mode import is_batch_invariant
from vllm.model_executor.models.builder.loader import EngineLoader
from vllm.model_executor.models.builder.recorder import ModuleRecorder
from vllm.model_executor.parallel_context import ParallelContext

__all__ = ["describe", "sharding", "start_recording", "stop_recording"]

_RECORDER = "_training_recorder"


def call(worker: Any, function: str, *args: Any) -> Any:
    """Run one of this module's functions.

    Args:
        worker: the engine's worker.
        function: its name, one of `__all__`.
        args: its other arguments.

    Raises:
        ValueError: there is no such function.
    """
    if function not in __all__:
        raise ValueError(
            f"call_training has no function {function!r}; it has {', '.join(__all__)}."
        )
    return globals()[function](worker, *args)


def describe(worker: Any) -> dict[str, Any]:
    """What a worker computes with.

    Returns:
        batch_invariant: whether the mode is on.
        device: torch's device type; capability: CUDA's, as text, else empty.
        dtype: of the model, such as "bfloat16".
        attention: names of the attention backends in use, with FlashAttention's
            version.
        tp_rank, tp_size, pp_rank, pp_size, tp_reduction_shards: see `ParallelContext`.
            A trainer has the engine's bits if it is built with its number of
            `tp_reduction_shards`.
        weights: fingerprints of the checkpoint's tensors that this worker's pipeline
            stage holds, by name; None where the model has its own `load_weights`.
        weights_missing: names of this stage's tensors that were never loaded.
        buffers: fingerprints of this stage's buffers that no checkpoint has, by name.
        head: path of the head, on the last pipeline stage; None of a model that says
            itself what its logits are.
        batched, positions: what the builder says of them; see `BuilderOptions`.
    """
    device = worker.device
    is_cuda = device.type == "cuda"
    capability = torch.cuda.get_device_capability(device) if is_cuda else ()
    context = ParallelContext.current()
    extra = worker.vllm_config.additional_config
    shards = extra.get("tp_reduction_shards") if isinstance(extra, dict) else None
    model = worker.get_model()
    loader = getattr(model, "loader", None)
    spec = getattr(model, "spec", None)
    recorded = loader if isinstance(loader, EngineLoader) else None
    return {
        "batch_invariant": is_batch_invariant(),
        "device": device.type,
        "capability": ".".join(map(str, capability)),
        "dtype": str(worker.model_config.dtype).removeprefix("torch."),
        "attention": _attention_backends(worker),
        "tp_rank": context.tp_rank,
        "tp_size": context.tp_size,
        "pp_rank": context.pp_rank,
        "pp_size": context.pp_size,
        "tp_reduction_shards": shards or context.tp_size,
        "weights": dict(recorded.fingerprints) if recorded else None,
        "weights_missing": recorded.never_loaded() if recorded else [],
        "buffers": buffer_fingerprints(model),
        "head": getattr(model, "head_path", None),
        "batched": spec.options.batched if spec else None,
        "positions": spec.options.positions if spec else None,
    }


def sharding(worker: Any) -> dict[str, dict[str, Any]]:
    """What a worker holds of each parameter: `LocalParameter` as plain values.

    Raises:
        ValueError: the model has its own `load_weights`, so nothing is known of it.
    """
    model = worker.get_model()
    loader = getattr(model, "loader", None)
    if not isinstance(loader, EngineLoader):
        raise ValueError(
            f"{type(model).__name__} loads its weights itself, so how they are sharded "
            "is not known. Register a builder of a training-only module, or give the "
            "model a `loader` (vllm.model_executor.models.builder.loader.EngineLoader)."
        )
    parameters = loader.layout.parameters
    return {name: asdict(parameter) for name, parameter in parameters.items()}


def _attention_backends(worker: Any) -> list[str]:
    names = set()
    for layer in worker.compilation_config.static_forward_context.values():
        if isinstance(layer, vllm_internals.Attention):
            name = layer.attn_backend.get_name()
            if name == "FLASH_ATTN":
                impl: Any = layer.impl
                name += f" version {impl.vllm_flash_attn_version}"
            names.add(name)
    return sorted(names)


def start_recording(worker: Any) -> None:
    """Record what every module computes from now on."""
    model = worker.get_model()
    body = getattr(model, "body", None)
    recorder = ModuleRecorder(model if body is None else body.module)
    setattr(worker, _RECORDER, recorder)


def stop_recording(worker: Any) -> list[dict[str, Any]]:
    """End `start_recording`; see `ModuleRecorder.finish`."""
    recorder = getattr(worker, _RECORDER)
    delattr(worker, _RECORDER)
    return recorder.finish()
