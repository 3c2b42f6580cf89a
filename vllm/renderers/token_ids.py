# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""Refusing token ids that a model of a builder does not have."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

from vllm.exceptions import VLLMValidationError

if TYPE_CHECKING:
    from vllm.config import ModelConfig


def check_token_ids(
    model_config: "ModelConfig", token_ids: Sequence[int], parameter: str | None
) -> None:
    """Refuse ids outside the vocabulary of a registered model.

    vLLM checks them by its tokenizer, which such an engine need not have. Its embedding
    is padded, so some ids that are too large would be served as zeros.

    Args:
        model_config: The engine's.
        token_ids: A prompt's.
        parameter: The name of the request's field, for vLLM's error.

    Raises:
        VLLMValidationError: Names the first such id.
    """
    if not model_config.registered_models:
        return
    vocab_size = model_config.get_vocab_size()
    for place, token in enumerate(token_ids):
        if not 0 <= token < vocab_size:
            raise VLLMValidationError(
                f"Token id {token} at place {place} of the prompt is outside of the "
                f"model's vocabulary: ids from 0 to {vocab_size - 1} are accepted "
                "(vocab_size in config.json).",
                parameter=parameter,
            )
