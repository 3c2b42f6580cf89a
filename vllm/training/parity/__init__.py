# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""Compare the logprobs of trainer and engine, bit for bit.

report = parity.check(llm, model, prompts)
report.raise_if_different()
"""

from vllm.model_executor.layers.training.self_check import (
    AttentionShape,
    BatchInvarianceError,
    LinearShape,
    self_check,
    self_check_shapes,
)
from vllm.training.parity.check import check
from vllm.training.parity.compare import compare
from vllm.training.parity.report import Difference, ParityError, ParityReport

__all__ = [
    "AttentionShape",
    "BatchInvarianceError",
    "Difference",
    "LinearShape",
    "ParityError",
    "ParityReport",
    "check",
    "compare",
    "self_check",
    "self_check_shapes",
]
