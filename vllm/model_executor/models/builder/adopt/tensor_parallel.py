# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""How the layers of an adopted module are sharded over tensor-parallel ranks.

A plan maps paths of modules and parameters, in which `*` stands for one component, to
styles with transformers' names. transformers' models have a plan; for a few that have
none, or a plan without attention, it is in `PLANS`. Two styles are added:

- `qkv_colwise`: queries, keys and values in one layer, each of which is sharded.
- `per_rank`: of an attribute that is a number, such as `attn.num_heads`. A module's
  code reads it, so on each rank it is divided by the number of ranks.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import nn

from vllm.model_executor.layers.training import (
    ColumnParallelLinear,
    LatentKVLinear,
    MergedColumnParallelLinear,
    RowParallelLinear,
    TrainingLayer,
    TransposedColumnParallelLinear,
    TransposedRowParallelLinear,
)
from vllm.model_executor.models.builder.adopt.attention import AttentionSite
from vllm.model_executor.parallel_context import ParallelContext

# By `model_type`, what transformers' plans leave out; paths from the causal LM.
PLANS: dict[str, dict[str, str]] = {
    "deepseek_v3": {
        "model.layers.*.self_attn.q_proj": "colwise",
        "model.layers.*.self_attn.q_b_proj": "colwise",
        "model.layers.*.self_attn.kv_a_proj_with_mqa": "mla_kv_a_proj",
        "model.layers.*.self_attn.kv_b_proj": "colwise",
        "model.layers.*.self_attn.o_proj": "rowwise",
    },
    "gpt2": {
        "transformer.h.*.attn.c_attn": "qkv_colwise",
        "transformer.h.*.attn.split_size": "per_rank",
        "transformer.h.*.attn.c_proj": "rowwise",
        "transformer.h.*.mlp.c_fc": "colwise",
        "transformer.h.*.mlp.c_proj": "rowwise",
    },
    "gpt_oss": {
        "model.layers.*.self_attn.q_proj": "colwise",
        "model.layers.*.self_attn.k_proj": "colwise",
        "model.layers.*.self_attn.v_proj": "colwise",
        "model.layers.*.self_attn.o_proj": "rowwise",
        "model.layers.*.mlp.experts": "moe_tp_experts",
    },
}

# The output of a layer of these styles is this rank's part of the features.
SPLIT_OUTPUT = frozenset({"colwise", "packed_colwise", "qkv_colwise"})
_COLUMNS = frozenset({*SPLIT_OUTPUT, "colwise_gather_output"})
_ROWS = frozenset({"rowwise", "rowwise_split_input"})
LATENT = "mla_kv_a_proj"
# What is computed from outside is the same if the module is held whole.
WHOLE = frozenset({"colwise_gather_output", "rowwise_split_input", "embedding_rowwise"})
# transformers' experts, each of which is sharded by its intermediate features, and a
# parameter of theirs.
EXPERTS = "moe_tp_experts"
PACKED_ROWS = "packed_rowwise"
PER_RANK = "per_rank"
# A norm of each head, of which a rank has some.
NORM = "replicated_with_grad_allreduce"
# The token embedding is sharded by rows with or without a plan.
_OTHERS = frozenset({"embedding_rowwise", EXPERTS, PACKED_ROWS, PER_RANK})
STYLES = _COLUMNS | _ROWS | _OTHERS | {LATENT, NORM}


class Style(NamedTuple):
    """How a module is sharded.

    Attributes:
        name: One of `STYLES`.
        sizes: Features of the parts that a layer consists of, where its style is for
            such a layer and does not say them.
    """

    name: str
    sizes: tuple[int, ...] = ()

    def parts(self, output_size: int) -> Sequence[int]:
        """Output features of each part of a column-parallel layer.

        Raises:
            ValueError: The layer does not consist of such parts.
        """
        parts: tuple[int, ...] = (output_size,)
        if self.name == "packed_colwise":
            parts = (output_size // 2,) * 2
        elif self.name == "qkv_colwise":
            parts = self.sizes
        if sum(parts) != output_size:
            what = "two layers of one size"
            if self.sizes:
                sizes = " + ".join(map(str, parts))
                what = f"queries, keys and values of {sizes} features, as attention has"
            raise ValueError(
                f"The tensor-parallel style {self.name!r} is for {what} in one layer, "
                f"and this one has {output_size} output features."
            )
        return parts


def linear_layer(
    style: Style | None,
    input_size: int,
    output_size: int,
    bias: bool,
    *,
    is_transposed: bool,
    params_dtype: torch.dtype,
    context: ParallelContext,
) -> TrainingLayer:
    """A linear layer of a style.

    Args:
        style: None: every rank holds it whole.
        input_size: Input features, over all ranks.
        output_size: Output features, over all ranks.
        bias: Add a bias.
        is_transposed: The weight is stored as [in_features, out_features].
        params_dtype: Dtype of the parameters.
        context: What it is sharded by.

    Raises:
        ValueError: The style is none of a linear layer, or its sizes do not fit.
    """
    if style is None:
        style, context = Style("colwise"), ParallelContext.single()
    sharing: dict[str, Any] = {
        "params_dtype": params_dtype,
        "parallel_context": context,
    }
    if style.name in _ROWS:
        row = TransposedRowParallelLinear if is_transposed else RowParallelLinear
        return row(input_size, output_size, bias, style.name == "rowwise", **sharing)
    if style.name in SPLIT_OUTPUT and is_transposed:
        parts = style.parts(output_size)
        return TransposedColumnParallelLinear(input_size, parts, bias, **sharing)
    if style.name in ("packed_colwise", "qkv_colwise"):
        parts = style.parts(output_size)
        return MergedColumnParallelLinear(input_size, parts, bias, **sharing)
    if style.name in _COLUMNS and not is_transposed:
        gathers = style.name == "colwise_gather_output"
        return ColumnParallelLinear(input_size, output_size, bias, gathers, **sharing)
    if style.name == LATENT and not is_transposed:
        (rotary,) = style.sizes
        return LatentKVLinear(input_size, output_size, rotary, bias, **sharing)
    kind = "linear layer with a transposed weight" if is_transposed else "linear layer"
    raise ValueError(f"A {kind} has no tensor-parallel style {style.name!r}.")


class Plan:
    """The style of each module and parameter of a model.

    Args:
        model: The model.
        styles: By path, in which `*` stands for one component.
        sites: What modules ask of attention.

    Attributes:
        styles: Names by path, of modules and parameters.
        numbers: Paths of numbers that are divided by the number of ranks.
        unmatched: What nothing has the path of. transformers' plans name modules
            that some configs leave out.

    Raises:
        ValueError: A style is not known.
    """

    def __init__(
        self,
        model: nn.Module,
        styles: Mapping[str, str],
        sites: Mapping[nn.Module, Sequence[AttentionSite]],
    ) -> None:
        self.model = model
        paths = [path for path, _ in model.named_modules()]
        self._sites = {p: sites[m][0] for p, m in model.named_modules() if m in sites}
        self._parameters = dict(model.named_parameters())
        self.styles: dict[str, str] = {}
        self.numbers: list[str] = []
        self.unmatched: list[str] = []
        for pattern, style in styles.items():
            if style == PER_RANK:
                matches = self._numbers(pattern)
                self.numbers += matches
            else:
                matches = _matches(pattern, [*paths, *self._parameters])
                self.styles |= dict.fromkeys(matches, style)
            if not matches:
                self.unmatched.append(pattern)
            elif style not in STYLES:
                raise ValueError(
                    f"The tensor-parallel style {style!r} of {pattern!r} is not "
                    f"supported; accepted are {', '.join(sorted(STYLES))}. Give a "
                    "plan of your own, adopt(..., tp_plan={...}), or start with "
                    "tensor_parallel_size=1."
                )

    def _numbers(self, pattern: str) -> list[str]:
        """Paths of the integers that a pattern names."""
        owners, _, name = pattern.rpartition(".")
        modules = dict(self.model.named_modules())
        found = [
            path
            for path in _matches(owners, [*modules])
            if isinstance(vars(modules[path]).get(name), int)
        ]
        return [f"{path}.{name}" for path in found]

    def style(self, path: str) -> Style | None:
        """The style of the module at a path; None: every rank holds it whole.

        Raises:
            ValueError: The model does not say the sizes that the style needs.
        """
        name = self.styles.get(path)
        if name == "qkv_colwise":
            return Style(name, self._attention_sizes(path))
        if name == LATENT:
            return Style(name, (self._rotary_size(),))
        return None if name is None else Style(name)

    def _attention_sizes(self, path: str) -> tuple[int, int, int]:
        """Features of queries, keys and values of the module that a layer is in."""
        owner = path
        while owner:
            owner = owner.rpartition(".")[0]
            site = self._sites.get(owner)
            if site is not None:
                return (
                    site.num_heads * site.head_size,
                    site.num_kv_heads * site.head_size,
                    site.num_kv_heads * site.value_size,
                )
        raise ValueError(
            "The tensor-parallel style 'qkv_colwise' is for a layer of a module that "
            "calls attention."
        )

    def _rotary_size(self) -> int:
        config: Any = getattr(self.model, "config", None)
        text = config.get_text_config() if hasattr(config, "get_text_config") else None
        size = getattr(text, "qk_rope_head_dim", None)
        if size is None:
            raise ValueError(
                f"The tensor-parallel style {LATENT!r} needs qk_rope_head_dim in the "
                "model's config: the features of the rotary key that heads share."
            )
        return int(size)

    def keep(self, holds: Callable[[str], bool]) -> None:
        """Forget what is not on this pipeline stage."""
        self.styles = {p: style for p, style in self.styles.items() if holds(p)}
        self.numbers = [path for path in self.numbers if holds(path)]

    def divide_numbers(self, tp_size: int) -> None:
        """Give the model's code the numbers of one rank."""
        for path in self.numbers:
            owner, _, name = path.rpartition(".")
            module = self.model.get_submodule(owner)
            setattr(module, name, getattr(module, name) // tp_size)

    def splits_heads(self, path: str) -> bool:
        """Whether a module below a path gives this rank's part of its features."""
        return any(
            style in SPLIT_OUTPUT and name.startswith(f"{path}.")
            for name, style in self.styles.items()
            if name not in self._parameters
        )


def _matches(pattern: str, paths: Sequence[str]) -> list[str]:
    parts = pattern.split(".")
    expression = r"\.".join(
        r"[^.]+" if part == "*" else re.escape(part) for part in parts
    )
    return [path for path in paths if re.fullmatch(expression, path)]


def plan_of(model: nn.Module) -> dict[str, str]:
    """The plan that a transformers model has, with paths from the model; {}: none."""
    kind = getattr(getattr(model, "config", None), "model_type", None)
    plan = dict(PLANS.get(kind, {})) if isinstance(kind, str) else {}
    return plan | dict(getattr(model, "_tp_plan", None) or {})
