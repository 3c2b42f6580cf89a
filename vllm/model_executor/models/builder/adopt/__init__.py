# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""Existing models, trained and served as they are."""

from typing import Any

from torch import nn

from vllm.model_executor.models.builder.adopt.adopting import adopt
from vllm.model_executor.models.builder.spec import model_builder

__all__ = ["adopt", "causal_lm"]


@model_builder(supports_pp=True)
def causal_lm(config: Any) -> nn.Module:
    """Build and adopt the transformers model of a config.

    A builder for models of which no code is written:
    `--model-class-overrides '{"Qwen3ForCausalLM":
    "vllm.model_executor.models.builder.adopt:causal_lm"}'`.

    Args:
        config: One of transformers' configs of a causal language model.
    """
    from transformers import AutoModelForCausalLM

    return adopt(AutoModelForCausalLM.from_config(config))
