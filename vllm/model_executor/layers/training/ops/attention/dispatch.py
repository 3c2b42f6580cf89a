# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""The public attention function and the table that chooses its implementation."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from vllm.logger import init_logger
from vllm.model_executor.layers.training.ops.attention import masked, sdpa
from vllm.model_executor.layers.training.ops.attention.spec import AttentionSpec

logger = init_logger(__name__)

AttentionFunction = Callable[
    [torch.Tensor, torch.Tensor, torch.Tensor, Sequence[int], AttentionSpec],
    torch.Tensor,
]

SUPPORTED_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


@dataclass(frozen=True)
class Implementation:
    """One row of the table.

    Attributes:
        name: what the log calls it.
        function: the implementation.
        device_types: torch device types it runs on; None for all.
        features: features of an AttentionSpec that it has.
    """

    name: str
    function: AttentionFunction
    device_types: frozenset[str] | None
    features: frozenset[str]

    def runs(self, device_type: str, features: frozenset[str]) -> bool:
        """Whether it has the features on the device."""
        on_device = self.device_types is None or device_type in self.device_types
        return on_device and features <= self.features


# The first row that runs is taken. The kernel row has causal, grouped heads and any
# head size; the last row has every feature on every device.
IMPLEMENTATIONS = (
    Implementation(sdpa.NAME, sdpa.attention_sdpa, sdpa.DEVICE_TYPES, sdpa.FEATURES),
    Implementation(masked.NAME, masked.attention_masked, None, masked.FEATURES),
)


def choose_implementation(device_type: str, spec: AttentionSpec) -> Implementation:
    """The implementation for a device and a set of features.

    Raises:
        ValueError: no row of the table runs.
    """
    features = spec.features()
    for implementation in IMPLEMENTATIONS:
        if implementation.runs(device_type, features):
            _log_choice(
                implementation.name, device_type, ", ".join(sorted(features)) or "none"
            )
            return implementation
    raise ValueError(
        f"No attention for training has the features {sorted(features)} on "
        f"{device_type}; the table in {__name__} lists those there are."
    )


@torch.compiler.assume_constant_result
def _log_choice(name: str, device_type: str, features: str) -> None:
    """Log once; torch.compile calls it while tracing and leaves it out after."""
    logger.info_once(
        "Attention for training runs on %s (device: %s; extra features: %s).",
        name,
        device_type,
        features,
    )


def attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    seqlens: Sequence[int],
    spec: AttentionSpec,
) -> torch.Tensor:
    """Attention within each of several packed sequences, with a backward.

    Args:
        query: shape = [num_tokens, num_heads, head_size]
        key: shape = [num_tokens, num_kv_heads, head_size]
        value: shape = [num_tokens, num_kv_heads, head_size]
        seqlens: length of each sequence, in order; they add up to num_tokens.
        spec: the features.

    Returns:
        shape = [num_tokens, num_heads, head_size]

    Raises:
        ValueError: a dtype that is not supported, or mixed dtypes or devices.
    """
    if query.dtype not in SUPPORTED_DTYPES:
        raise ValueError(
            f"Attention got {query.dtype}; it runs in torch.float32, torch.bfloat16 "
            "or torch.float16 (torch.float64 for checks on CPU). Cast the inputs."
        )
    for name, tensor in (("key", key), ("value", value)):
        if (tensor.dtype, tensor.device) != (query.dtype, query.device):
            raise ValueError(
                f"The query is {query.dtype} on {query.device}, but the {name} is "
                f"{tensor.dtype} on {tensor.device}; all three must agree."
            )
    implementation = choose_implementation(query.device.type, spec)
    return implementation.function(query, key, value, seqlens, spec)
