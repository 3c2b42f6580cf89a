# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""What a trainer imports from vLLM: set-up, batch invariance, weights, parity."""

import importlib
from types import ModuleType

from vllm.model_executor.layers.training.batch_invariance import batch_invariant
from vllm.training.parallel import destroy_parallel, initialize_parallel

__all__ = ["batch_invariant", "destroy_parallel", "initialize_parallel", "parity"]


def __getattr__(name: str) -> ModuleType:
    """Import `parity` when it is first used; it needs the models' machinery."""
    if name == "parity":
        return importlib.import_module("vllm.training.parity")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
