# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""Comparing what a builder has built on the ranks of one engine."""

from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from vllm.model_executor import vllm_internals
from vllm.model_executor.checkpoint.layout import CheckpointLayout, tensors_of
from vllm.model_executor.layers.training.attention import TrainableAttention

Description = Mapping[str, str]


def compare_ranks(
    module: nn.Module, layout: CheckpointLayout, builder: str
) -> CheckpointLayout:
    """Check that the ranks hold parts of one model, and put the parts together.

    Every rank of the engine calls it, after building and before loading.

    Args:
        module: What the builder returned, its layers not yet bound to the engine.
        layout: Its checkpoint layout.
        builder: The builder's name, for messages.

    Returns:
        The layout of the whole checkpoint, over all pipeline stages; `parameters`
        has this rank's only.

    Raises:
        ValueError: Tensor-parallel ranks built parameters or attention layers that
            differ in name, full shape or dtype, or pipeline stages do; or an attention
            layer stands on two stages.
    """
    parameters, attention = _describe(module, layout)
    for rank, (theirs, their_attention) in others("tp", (parameters, attention)):
        differences = [
            *_differences(parameters, theirs, rank),
            *_differences(attention, their_attention, rank),
        ]
        _report(differences, builder, "tensor-parallel rank")

    whole = replace(
        layout,
        tensors=dict(layout.tensors),
        fused=dict(layout.fused),
        aliases=dict(layout.aliases),
    )
    mine = (parameters, attention, replace(layout, parameters={}))
    for stage, theirs in others("pp", mine):
        their_parameters, their_attention, their_layout = theirs
        common = parameters.keys() & their_parameters.keys()
        differences = list(
            _differences(
                {name: parameters[name] for name in common},
                {name: their_parameters[name] for name in common},
                stage,
            )
        )
        _report(differences, builder, "pipeline stage")
        twice = sorted(attention.keys() & their_attention.keys())
        if twice:
            raise ValueError(
                f"{builder} built the attention layers {', '.join(twice)} on this "
                f"pipeline stage and on stage {stage}. A builder with "
                "supports_pp=True builds each layer on one stage: use PipelineLayers."
            )
        whole.tensors |= their_layout.tensors
        whole.fused |= their_layout.fused
        whole.aliases |= their_layout.aliases
    # Tied on one stage and alone on another: it is loaded under the first of its names.
    whole.tensors = {
        name: tensor
        for name, tensor in whole.tensors.items()
        if whole.aliases.get(tensor.parameter, tensor.parameter) == tensor.parameter
    }
    whole.fused = {n: t for n, t in whole.fused.items() if n not in whole.aliases}
    return whole


def _describe(
    module: nn.Module, layout: CheckpointLayout
) -> tuple[Description, Description]:
    """What has to be equal, in words: of each parameter, and of each attention layer.

    Shapes are full ones: what a rank holds of them follows from its rank.
    """
    tensors = tensors_of(module)
    parameters = {}
    for name in layout.parameters:
        dtype = str(tensors[name].dtype).removeprefix("torch.")
        whole = layout.fused.get(name) or layout.tensors[name]
        parameters[name] = f"{list(whole.shape)} {dtype}"
        if whole.dim is not None:
            sizes = " + ".join(str(part.size) for part in whole.parts)
            parameters[name] += f", dim {whole.dim} = {sizes} sharded"
    attention = {
        name: f"attention with {layer.num_heads} query and {layer.num_kv_heads} "
        f"key heads of size {layer.head_size}"
        for name, layer in module.named_modules()
        if isinstance(layer, TrainableAttention)
    }
    return parameters, attention


def others(axis: str, mine: Any) -> Iterable[tuple[int, Any]]:
    """What the other ranks of a group give, with their rank in it.

    Every rank of the group calls it.

    Args:
        axis: "tp" or "pp".
        mine: What this rank gives; it is pickled.
    """
    group = (
        vllm_internals.get_tp_group() if axis == "tp" else vllm_internals.get_pp_group()
    )
    if group.world_size == 1:
        return []
    given: list[Any] = [None] * group.world_size
    torch.distributed.all_gather_object(given, mine, group=group.cpu_group)
    del given[group.rank_in_group]
    ranks = [r for r in range(group.world_size) if r != group.rank_in_group]
    return list(zip(ranks, given, strict=True))


def _differences(mine: Description, theirs: Description, rank: int) -> Iterable[str]:
    for name in sorted(mine.keys() | theirs.keys()):
        here, there = (side.get(name, "absent") for side in (mine, theirs))
        if here != there:
            yield f"{name} is {here} on this rank and {there} on {{axis}} {rank}"


def _report(differences: list[str], builder: str, axis: str) -> None:
    if differences:
        shown = "; ".join(differences[:10]).format(axis=axis)
        raise ValueError(
            f"{builder} built different models on the ranks of one engine "
            f"({len(differences)} differences): {shown}. Every rank has to build the "
            "same model from the config and the parallel_context."
        )
