# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""Finding the module from which on trainer and engine differ.

Both run the same modules under the same paths. Each side records a fingerprint of
every row that a module puts out, which is little enough to be sent.
"""

from __future__ import annotations

from typing import Any

from vllm.model_executor.models.builder.recorder import Key


def first_differing_module(
    engine: list[dict[str, Any]], trainer: list[dict[str, Any]]
) -> str | None:
    """Path of the first module, in the trainer's order, whose rows differ.

    Modules that one side alone has are left out. None: all that both have agree.

    Raises:
        ValueError: no module was recorded on both sides.
    """
    of_engine = {_key(entry): entry["rows"] for entry in engine}
    common = [entry for entry in trainer if _key(entry) in of_engine]
    if not common:
        raise ValueError(
            "Engine and trainer have no module path in common, so the layer from "
            "which on they differ cannot be found. Serve the builder's own module."
        )
    for entry in common:
        if entry["rows"] != of_engine[_key(entry)]:
            return entry["path"]
    return None


def _key(entry: dict[str, Any]) -> Key:
    return entry["path"], entry["call"], entry["index"]
