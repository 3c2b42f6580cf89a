# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""Attention by torch's flash kernel for CPU, forward and backward.

Tiled: memory is proportional to the tokens, no score matrix is stored. The kernel is
called by its own name because `scaled_dot_product_attention` may choose another one.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from vllm.model_executor.layers.training.ops.attention.packing import each_sequence
from vllm.model_executor.layers.training.ops.attention.spec import AttentionSpec

NAME = "torch's CPU flash kernel"
DEVICE_TYPES = frozenset({"cpu"})
FEATURES: frozenset[str] = frozenset()


def attention_sdpa(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    seqlens: Sequence[int],
    spec: AttentionSpec,
) -> torch.Tensor:
    """Attention within each sequence; arguments as in `attention_reference`."""
    return each_sequence(_one_sequence, query, key, value, seqlens, spec)


def _one_sequence(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, spec: AttentionSpec
) -> torch.Tensor:
    # The kernel wants [batch, num_heads, seq, head_size] and groups the heads itself.
    q, k, v = (tensor.transpose(0, 1).unsqueeze(0) for tensor in (q, k, v))
    output, _ = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
        q, k, v, 0.0, spec.causal, scale=spec.scale
    )
    return output.squeeze(0).transpose(0, 1)
