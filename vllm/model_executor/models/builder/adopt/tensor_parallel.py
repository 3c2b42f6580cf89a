# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""How the layers of an adopted module are sharded over tensor-parallel ranks.

A plan maps paths of modules and parameters, in which `*` stands for one component, to
styles with transformers' names. transformers' models have a plan.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Mapping
from typing import Any

from torch import nn

from vllm.model_executor.layers.training import (
    ColumnParallelLinear,
    MergedColumnParallelLinear,
    RowParallelLinear,
    TrainingLayer,
)


def _two_columns(input_size: int, output_size: int, *args: Any, **options: Any) -> Any:
    """Two layers of one size in one, such as gate and up, each sharded on its own."""
    if output_size % 2:
        raise ValueError(
            f"The tensor-parallel style 'packed_colwise' is for two layers of one size "
            f"in one, and this one has {output_size} output features."
        )
    sizes = [output_size // 2] * 2
    return MergedColumnParallelLinear(input_size, sizes, *args, **options)


# The output of a layer of these styles is this rank's part of the features.
SPLIT_OUTPUT = frozenset({"colwise", "packed_colwise"})
_LINEARS: dict[str | None, Callable[..., TrainingLayer]] = {
    None: ColumnParallelLinear,
    "colwise": ColumnParallelLinear,
    "colwise_gather_output": functools.partial(
        ColumnParallelLinear, gather_output=True
    ),
    "packed_colwise": _two_columns,
    "rowwise": RowParallelLinear,
    "rowwise_split_input": functools.partial(
        RowParallelLinear, input_is_parallel=False
    ),
}
# What is computed from outside is the same if the module is held whole.
WHOLE = frozenset({"colwise_gather_output", "rowwise_split_input", "embedding_rowwise"})
# transformers' experts, each of which is sharded by its intermediate features, and a
# parameter of theirs.
EXPERTS = "moe_tp_experts"
PACKED_ROWS = "packed_rowwise"
# A norm of each head, of which a rank has some, and the token embedding, which is
# sharded by rows with or without a plan.
_OTHERS = (EXPERTS, PACKED_ROWS, "replicated_with_grad_allreduce", "embedding_rowwise")
STYLES = frozenset({*filter(None, _LINEARS), *_OTHERS})


def linear_class(style: str | None) -> Callable[..., Any]:
    """What makes a linear layer of a style.

    Raises:
        ValueError: The style is none of a linear layer.
    """
    if style not in _LINEARS:
        raise ValueError(f"A linear layer has no tensor-parallel style {style!r}.")
    return _LINEARS[style]


class Plan:
    """The style of each module and parameter of a model.

    Args:
        model: The model.
        styles: By path, in which `*` stands for one component.

    Attributes:
        styles: By path, of modules and parameters.
        unmatched: What nothing has the path of. transformers' plans name modules
            that some configs leave out.

    Raises:
        ValueError: A style is not known.
    """

    def __init__(self, model: nn.Module, styles: Mapping[str, str]) -> None:
        paths = [path for path, _ in model.named_modules()]
        paths += [path for path, _ in model.named_parameters()]
        self.styles: dict[str, str] = {}
        self.unmatched: list[str] = []
        for pattern, style in styles.items():
            parts = pattern.split(".")
            expression = r"\.".join(
                r"[^.]+" if part == "*" else re.escape(part) for part in parts
            )
            matches = [path for path in paths if re.fullmatch(expression, path)]
            if not matches:
                self.unmatched.append(pattern)
            elif style not in STYLES:
                raise ValueError(
                    f"The tensor-parallel style {style!r} of {pattern!r} is not "
                    f"supported; accepted are {', '.join(sorted(STYLES))}. Give a "
                    "plan of your own, adopt(..., tp_plan={...}), or start with "
                    "tensor_parallel_size=1."
                )
            self.styles |= dict.fromkeys(matches, style)

    def style(self, path: str) -> str | None:
        """The style of the module at a path; None: every rank holds it whole."""
        return self.styles.get(path)

    def keep(self, holds: Callable[[str], bool]) -> None:
        """Forget what is not on this pipeline stage."""
        self.styles = {p: style for p, style in self.styles.items() if holds(p)}

    def splits_heads(self, path: str) -> bool:
        """Whether a module below a path gives this rank's part of its features."""
        return any(
            style in SPLIT_OUTPUT and name.startswith(f"{path}.")
            for name, style in self.styles.items()
        )


def plan_of(model: nn.Module) -> dict[str, str]:
    """The plan that a transformers model has, with paths from the model; {}: none."""
    plan: dict[str, str] = dict(getattr(model, "_tp_plan", None) or {})
    return plan
