# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""What a trainer imports from vLLM: set-up, sharding, checkpoints, parity."""

import importlib
from types import ModuleType

from vllm.model_executor.layers.training.batch_invariance import batch_invariant
from vllm.training.gradients import clip_grad_norm_
from vllm.training.parallel import destroy_parallel, initialize_parallel
from vllm.training.state import load_state, save_state
from vllm.training.weights import load_checkpoint, save_checkpoint, sharding

__all__ = [
    "batch_invariant",
    "clip_grad_norm_",
    "destroy_parallel",
    "initialize_parallel",
    "load_checkpoint",
    "load_state",
    "parity",
    "save_checkpoint",
    "save_state",
    "sharding",
]


def __getattr__(name: str) -> ModuleType:
    """Import `parity` when it is first used; it needs the models' machinery."""
    if name == "parity":
        return importlib.import_module("vllm.training.parity")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
