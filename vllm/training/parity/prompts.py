# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""Prompts, checked before an engine gets any of them.

An engine finds some mistakes only while it computes, and is of no use after.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

if TYPE_CHECKING:
    from vllm import LLM

Prompt = str | Sequence[int] | torch.Tensor | np.ndarray
Prompts = Iterable[Prompt]


def engine_prompts(llm: LLM, prompts: Prompts) -> list[Any]:
    """Prompts as `LLM.generate` takes them.

    Args:
        llm: the engine.
        prompts: token ids, each a sequence of ints or a tensor or array of integers,
            shape = [num_tokens]; or texts if the engine has a tokenizer.

    Raises:
        TypeError: another kind of prompt, or of token id.
        ValueError: no prompts, or one that the engine cannot take.
    """
    if isinstance(prompts, str) or not isinstance(prompts, Iterable):
        raise TypeError(
            f"prompts is {prompts!r}; give a list of prompts, each a list of token ids "
            "or a text."
        )
    prompts = list(prompts)
    if not prompts:
        raise ValueError("prompts is empty; give at least one to compare tokens of.")
    model = llm.llm_engine.vllm_config.model_config
    result: list[Any] = []
    for number, prompt in enumerate(prompts):
        name = f"prompts[{number}]"
        if isinstance(prompt, str):
            if model.skip_tokenizer_init:
                raise ValueError(
                    f"{name} is a text, and the engine has no tokenizer: give token "
                    "ids, or start it without skip_tokenizer_init."
                )
            ids = llm.get_tokenizer().encode(prompt)
        else:
            ids = _token_ids(name, prompt)
        _check_ids(name, ids, model.get_vocab_size(), model.max_model_len)
        result.append(prompt if isinstance(prompt, str) else {"prompt_token_ids": ids})
    return result


def _token_ids(name: str, prompt: Any) -> list[int]:
    if isinstance(prompt, torch.Tensor | np.ndarray):
        values: Any = prompt.tolist()
    elif isinstance(prompt, Sequence):
        values = list(prompt)
    else:
        values = None
    kinds = (int, np.integer)
    if not isinstance(values, list) or not all(
        isinstance(each, kinds) and not isinstance(each, bool) for each in values
    ):
        raise TypeError(
            f"{name} is {_shortened(prompt)}; give a text, or token ids as a list of "
            "ints or a tensor or array of integers, shape = [num_tokens]."
        )
    return [int(each) for each in values]


def _check_ids(name: str, ids: list[int], vocab_size: int, longest: int) -> None:
    if not ids:
        raise ValueError(f"{name} is empty; give at least one token.")
    if len(ids) >= longest:
        raise ValueError(
            f"{name} has {len(ids)} tokens; with one to sample the engine takes "
            f"prompts of at most {longest - 1}: shorten it, or start the engine with a "
            "larger max_model_len."
        )
    unknown = [i for i in ids if not 0 <= i < vocab_size]
    if unknown:
        raise ValueError(
            f"{name} holds the token {unknown[0]}; the model's token ids are 0 to "
            f"{vocab_size - 1}."
        )


def _shortened(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:60]}..."
