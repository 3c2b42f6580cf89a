# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""Existing models, trained and served as they are."""

from vllm.model_executor.models.builder.adopt.adopting import adopt

__all__ = ["adopt"]
