# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""Checks of the sizes in a model's `config.json` that vLLM needs."""

from collections.abc import Mapping
from typing import Any

REQUIRED = ("hidden_size", "num_hidden_layers", "num_attention_heads", "vocab_size")


def check_sizes(fields: Mapping[str, Any], where: str) -> None:
    """Refuse sizes that no model can have.

    Args:
        fields: Holds those of `REQUIRED`; others may be None or absent.
        where: Begins the message.

    Raises:
        ValueError: Names the fields and what they have to be.
    """
    counts = (*REQUIRED, "num_key_value_heads", "head_dim")
    given = {n: fields[n] for n in counts if fields.get(n) is not None}
    wrong = {n: value for n, value in given.items() if not _is_count(value)}
    if wrong:
        raise ValueError(f"{where}: {wrong} must be whole numbers of at least 1.")
    heads, hidden = given["num_attention_heads"], given["hidden_size"]
    if "head_dim" not in given and hidden % heads:
        raise ValueError(
            f"{where}: hidden_size {hidden} is not divisible by num_attention_heads "
            f"{heads}. Change one of them or give head_dim."
        )
    kv_heads = given.get("num_key_value_heads", heads)
    if heads % kv_heads:
        raise ValueError(
            f"{where}: num_attention_heads {heads} is not a multiple of "
            f"num_key_value_heads {kv_heads}."
        )


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 1
