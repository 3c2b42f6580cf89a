# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""What a trainer imports from vLLM: set-up, sharding, checkpoints, logprobs, parity."""

import importlib
from typing import Any

from vllm.model_executor.checkpoint.layout import sharding
from vllm.model_executor.checkpoint.load import load_checkpoint
from vllm.model_executor.checkpoint.save import checkpoint_tensors, save_checkpoint
from vllm.model_executor.determinism.mode import batch_invariant
from vllm.training.gradients import clip_grad_norm_
from vllm.training.parallel import destroy_parallel, initialize_parallel
from vllm.training.state import load_state, save_state

__all__ = [
    "adopt",
    "batch_invariant",
    "check_servable",
    "checkpoint_tensors",
    "clip_grad_norm_",
    "destroy_parallel",
    "initialize_parallel",
    "load_checkpoint",
    "load_state",
    "parity",
    "save_checkpoint",
    "save_state",
    "sharding",
    "token_logprobs",
    "weighted_nll",
]


def __getattr__(name: str) -> Any:
    """Import what needs the models' machinery when it is first used."""
    if name == "parity":
        return importlib.import_module("vllm.training.parity")
    if name == "adopt":
        from vllm.model_executor.models.builder.adopt import adopt

        return adopt
    if name == "check_servable":
        from vllm.model_executor.models.builder.servable import check_servable

        return check_servable
    if name in ("token_logprobs", "weighted_nll"):
        return getattr(importlib.import_module("vllm.training.logprobs"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
