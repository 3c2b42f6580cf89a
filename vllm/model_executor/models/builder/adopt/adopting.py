# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""Adopting a model that was not written with training layers."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from contextlib import nullcontext
from types import ModuleType
from typing import Any, NoReturn, TypeVar

from torch import nn
from torch.distributed.tensor import DTensor

from vllm.logger import init_logger
from vllm.model_executor import vllm_internals
from vllm.model_executor.checkpoint.specification import ParameterSharding, Part
from vllm.model_executor.checkpoint.wrappers import join
from vllm.model_executor.determinism.mode import is_batch_invariant
from vllm.model_executor.determinism.probes import BatchInvarianceError
from vllm.model_executor.layers.training import (
    ParallelLMHead,
    TrainingLayer,
    VocabParallelEmbedding,
)
from vllm.model_executor.models.builder.adopt import (
    converting,
    gated_mlp,
    pipeline_stage,
    tensor_parallel,
    torch_attention,
)
from vllm.model_executor.models.builder.adopt.attention import (
    AdoptedAttention,
    AttentionSite,
)
from vllm.model_executor.models.builder.adopt.gated_mlp import GatedMLP
from vllm.model_executor.models.builder.adopt.partial_gradients import (
    check_split_features,
)
from vllm.model_executor.models.builder.adopt.pipeline_stage import Stage
from vllm.model_executor.models.builder.adopt.probing import (
    Calls,
    Groups,
    Sites,
    find_calls,
    find_counting,
)
from vllm.model_executor.models.builder.adopt.report import Row, table
from vllm.model_executor.models.builder.adopt.wrapping import AdoptedModule, wrap
from vllm.model_executor.models.builder.convention import (
    COUNTING,
    CallingConvention,
)
from vllm.model_executor.models.builder.head import find_head
from vllm.model_executor.models.builder.merged_linears import (
    LinearGroup,
    declare,
    may_merge,
)
from vllm.model_executor.models.builder.spec import BuilderOptions
from vllm.model_executor.parallel_context import ParallelContext

logger = init_logger(__name__)

Model = TypeVar("Model", bound=nn.Module)


def adopt(
    model: Model,
    *,
    head: str | None = None,
    positions: str | None = None,
    tp_plan: Mapping[str, str] | None = None,
    parallel_context: ParallelContext | None = None,
    implementation: str | None = None,
    strict: bool = False,
) -> Model:
    """Make a model trainable and servable with the same bits, as it is.

    Modules that compute what a training layer computes become that layer, and calls of
    attention go to a `TrainableAttention`. The model stays the same object; names of
    parameters, state dicts and checkpoints stay the same, and weights are not copied.
    In an engine without quantization, linear layers of one input are one product.
    A table of what became of each module is logged. Calling it again changes nothing.

    Args:
        model: Any module whose only cross-token operation is causal self-attention,
            by transformers' attention interface, by torch's
            `scaled_dot_product_attention` or `flex_attention`, or written out; also on
            the meta device.
        head: Path of the module that gives logits; found if None.
        positions: Name of the parameter of `forward` for positions; found if None.
        tp_plan: Tensor-parallel styles by path, for `parallel_context`. None: the
            model's own, if it is one of transformers'.
        parallel_context: What layers are sharded by; `ParallelContext.current()` where
            vLLM's groups exist, else a single process. With more than one rank, a
            model with weights holds this rank's shards afterwards.
        implementation: Name of an implementation of attention outside the engine, see
            `TrainableAttention`; for an engine with another backend than the default.
        strict: Raise if a module is left that has a weight.

    Returns:
        The model itself.

    Raises:
        BatchInvarianceError: In batch-invariant mode, the model calls a function of
            torch that has no batch-invariant form.
        ValueError: Attention that cannot be trained and served, a plan that does not
            fit, or parameters that are sharded already; with `strict`, a module that
            is left.
    """
    if getattr(model, "adoption", None) is not None:
        return model
    if any(isinstance(parameter, DTensor) for parameter in model.parameters()):
        raise ValueError(
            f"{type(model).__name__} has parameters that are DTensors. Adopt the model "
            "first, then call fully_shard or parallelize_module."
        )
    if getattr(getattr(model, "config", None), "is_encoder_decoder", False):
        raise ValueError(
            f"{type(model).__name__} is an encoder-decoder: its decoder attends to the "
            "encoder's tokens, which the engine does not keep. Adopt a decoder-only "
            "model."
        )
    options = BuilderOptions(head=head, positions=positions)
    context = parallel_context or ParallelContext.current_or_single()
    transformers = _transformers_attention(model)
    if transformers is not None:
        _use_transformers_interfaces(model)
    convention, calls = _find_calls(model, options, transformers)
    if not calls.attention:
        raise ValueError(
            f"forward of {type(model).__name__} calls no attention that can be taken "
            "over. Call torch.nn.functional.scaled_dot_product_attention, or use one "
            "of transformers' attention interfaces."
        )
    unknown = _unknown(model, calls)
    head_path = _head_path(model, head)
    plan = _plan(model, head_path, tp_plan, calls.attention, context)
    stage = _stage(model, convention, transformers, head_path, context)
    plan.keep(stage.holds)
    mlps = gated_mlp.find(model)
    rows, layers = _conversions(model, head_path, plan, stage, context)
    experts = _sharded_experts(model, plan, context)
    attention = _attention_layers(
        model, calls.attention, plan, stage, context, implementation
    )
    _check_plan(model, plan, mlps, dict(layers), dict(attention), experts, context)
    if plan.styles and context.tp_size > 1:
        call = functools.partial(convention.call, model)
        # An engine trains nothing.
        in_trainer = vllm_internals.get_current_vllm_config_or_none() is None
        check_split_features(
            model, plan, call, transformers, context.tp_size, in_trainer
        )
    left = [row for row in rows if not row.after]
    if strict and left:
        raise ValueError(
            f"adopt(..., strict=True) leaves modules of {type(model).__name__} as "
            f"they are:\n{table(left)}"
        )
    # From here on nothing raises: a model that is refused keeps its modules.
    rows += _other_stages(model, stage)
    plan.divide_numbers(context.tp_size)
    for path, layer in [*layers, *attention]:
        model.set_submodule(path, layer)
    for path, layer in attention:
        rows.append(Row(path, "attention", "TrainableAttention"))
        _shard_sinks(model, path, layer)
    for sharded in experts.values():
        sharded.shard(context)
    rows += _take_over_mlps(model, mlps)
    rows = _merge_linears(model, calls.linears, mlps, rows)
    if transformers is not None:
        transformers.use_training_layers(model)
        if context.tp_size * context.pp_size > 1:
            vars(model)["save_pretrained"] = _refuse_to_save
    for module in list(model.modules()):
        if _runs_own_code(module):
            wrap(module)
    if convention.counting is not None:
        vars(model)[COUNTING] = convention.counting
        rows.append(Row("", "counts its tokens", "is given positions"))
    vars(model)["adoption"] = table(rows + unknown)
    logger.info("Adopted %s:\n%s", type(model).__name__, vars(model)["adoption"])
    return model


def _find_calls(
    model: nn.Module, options: BuilderOptions, transformers: ModuleType | None
) -> tuple[CallingConvention, Calls]:
    """How a model is called, and what its forward calls.

    A parameter for positions may be one for decoding with a KV cache of the model's
    own. Then a call without it counts the tokens.

    Raises:
        ValueError: Attention is called in a way that cannot be trained and served.
    """
    convention = CallingConvention.of(model, options, "adopt")
    without = convention.without_positions()
    refusal = None
    if convention.positions is not None:
        call = functools.partial(convention.call, model)
        try:
            return convention, find_calls(model, call, transformers)
        except ValueError as error:
            if options.positions is not None:
                raise
            refusal = error
    call = functools.partial(without.call, model)
    try:
        calls = find_calls(model, call, transformers)
        counting = find_counting(model, call)
    except ValueError as error:
        raise refusal or error from None
    if refusal is not None and counting is None:
        raise refusal
    return without._replace(counting=counting), calls


def _unknown(model: nn.Module, calls: Calls) -> list[Row]:
    """What has no batch-invariant form.

    Raises:
        BatchInvarianceError: There is such a function, in batch-invariant mode.
    """
    kinds = {path: type(module).__name__ for path, module in model.named_modules()}
    rows = [
        Row(path, kinds[path], "", f"calls {function}, which is not batch-invariant")
        for path, function in calls.unknown
    ]
    if rows and is_batch_invariant():
        raise BatchInvarianceError(
            f"{type(model).__name__} calls functions of torch for which "
            "batch-invariant mode has no kernel, so its results would depend on the "
            f"other requests of a batch:\n{table(rows)}\nCompute them from other "
            "functions, or leave the mode off."
        )
    return rows


def _transformers_attention(model: nn.Module) -> ModuleType | None:
    """`transformers_attention` for a model of transformers, else None."""
    if not hasattr(model, "set_attn_implementation"):
        return None
    from vllm.model_executor.models.builder.adopt import transformers_attention

    return transformers_attention


def _use_transformers_interfaces(model: Any) -> None:
    from vllm.model_executor.models.builder.adopt import (
        transformers_checkpoint,
        transformers_experts,
    )

    transformers_checkpoint.keep_in_fp32(model)
    transformers_experts.use_in_order_experts(model)
    conversion = transformers_checkpoint.CheckpointConversion(model)
    vars(model)["convert_checkpoint"] = conversion


def _head_path(model: nn.Module, option: str | None) -> str | None:
    try:
        return find_head(model, option, "adopt")
    except ValueError:
        if option is not None:
            raise
        return None


def _plan(
    model: nn.Module,
    head: str | None,
    given: Mapping[str, str] | None,
    sites: Sites,
    context: ParallelContext,
) -> tensor_parallel.Plan:
    styles = tensor_parallel.plan_of(model) if given is None else given
    if context.tp_size == 1 and context.tp_reduction_shards == 1:
        return tensor_parallel.Plan(model, {}, sites)
    plan = tensor_parallel.Plan(model, styles, sites)
    if not plan.styles.keys() - {head}:
        logger.warning(
            "%s has no tensor-parallel plan, so each of %d ranks holds and computes "
            "all of its layers but embedding and head. Give one: "
            "adopt(..., tp_plan={path: style}).",
            type(model).__name__,
            context.tp_size,
        )
    if given is not None and plan.unmatched:
        raise ValueError(
            f"tp_plan names {', '.join(map(repr, plan.unmatched))}, and "
            f"{type(model).__name__} has no such module. Give paths from the model, "
            "in which * stands for one component, such as 'model.layers.*.mlp.up_proj'."
        )
    return plan


def _stage(
    model: nn.Module,
    convention: CallingConvention,
    transformers: ModuleType | None,
    head: str | None,
    context: ParallelContext,
) -> Stage:
    """What of a model is on this rank's pipeline stage."""
    if context.pp_size == 1:
        return pipeline_stage.WHOLE
    recorded = nullcontext if transformers is None else transformers.recorded
    return pipeline_stage.find_stage(model, convention.call, recorded, head, context)


def _other_stages(model: nn.Module, stage: Stage) -> list[Row]:
    """Leave out what other pipeline stages have."""
    if stage is pipeline_stage.WHOLE:
        return []
    kinds = {path: type(model.get_submodule(path)).__name__ for path in stage.skipped}
    stage.apply(model)
    note = "another pipeline stage has it"
    return [Row(path, kind, "SkippedLayer", note) for path, kind in kinds.items()]


def _sharded_experts(
    model: nn.Module, plan: tensor_parallel.Plan, context: ParallelContext
) -> dict[str, Any]:
    """transformers' experts that are sharded, by path."""
    if tensor_parallel.EXPERTS not in plan.styles.values():
        return {}
    from vllm.model_executor.models.builder.adopt import transformers_experts

    return transformers_experts.find_sharded(model, plan, context)


def _check_plan(
    model: nn.Module,
    plan: tensor_parallel.Plan,
    mlps: Mapping[nn.Module, GatedMLP],
    layers: Mapping[str, nn.Module],
    attention: Mapping[str, AdoptedAttention],
    experts: Mapping[str, Any],
    context: ParallelContext,
) -> None:
    """Refuse a plan with what is not sharded, or what would be sharded wrongly."""
    modules = dict(model.named_modules())
    # The style that a parameter has if its module is sharded.
    parameters: dict[str, str | None] = {
        join(path, name): sharded.style(name)
        for path, sharded in experts.items()
        for name, _ in sharded.module.named_parameters()
    }
    for path, layer in attention.items():
        if layer.site.sinks is not None and layer.tp_size > 1:
            parameters[join(path.rpartition(".")[0], layer.site.sinks)] = "colwise"
    for path, style in plan.styles.items():
        module = modules.get(path)
        if module is None:
            accepted = parameters.get(path)
            if style != accepted:
                raise ValueError(
                    f"tp_plan gives the parameter {path} the style {style!r}. "
                    + (
                        f"The style that it can have there is {accepted!r}."
                        if accepted
                        else "Styles are given to modules, and to parameters of "
                        f"modules with the style {tensor_parallel.EXPERTS!r}."
                    )
                )
        elif path in experts or path in layers or style in tensor_parallel.WHOLE:
            continue
        elif any(True for _ in module.parameters()):
            raise ValueError(
                f"{path} ({type(module).__name__}) has the tensor-parallel style "
                f"{style!r}, and there is no training layer that can take its place. "
                "Leave it out of tp_plan, so that every rank holds it whole."
            )
    for path in plan.numbers:
        owner, _, name = path.rpartition(".")
        number = getattr(modules[owner], name)
        if number % context.tp_size:
            raise ValueError(
                f"{path} is {number}, which {context.tp_size} ranks do not divide. "
                "Choose a tensor-parallel size that does."
            )
    for path, module in modules.items():
        inputs = mlps[module].inputs if module in mlps else ()
        if len(inputs) == 1 and plan.styles.get(join(path, inputs[0])) == "colwise":
            raise ValueError(
                f"{join(path, inputs[0])} is gate and up in one layer, so 'colwise' "
                "would give a rank the wrong features. Use 'packed_colwise'."
            )


def _shard_sinks(model: nn.Module, path: str, layer: AdoptedAttention) -> None:
    """Keep the sinks of this rank's heads, which the calling module has."""
    name = layer.site.sinks
    if name is not None and layer.tp_size > 1:
        owner = model.get_submodule(path.rpartition(".")[0])
        sinks = owner.get_parameter(name)
        sharding = ParameterSharding(sinks.shape, 0, (Part(None, None, len(sinks)),))
        converting.shard_parameters(owner, {name: sharding}, layer.parallel_context)


def _conversions(
    model: nn.Module,
    head: str | None,
    plan: tensor_parallel.Plan,
    stage: Stage,
    context: ParallelContext,
) -> tuple[list[Row], list[tuple[str, nn.Module]]]:
    """The training layers that compute what modules compute, with their paths.

    Raises:
        ValueError: A layer cannot be sharded as the plan says.
    """
    layers: list[tuple[str, nn.Module]] = []
    vocabulary = None if head is None else _rows(model.get_submodule(head))
    rows: list[Row] = []
    replacements: dict[int, TrainingLayer | None] = {}
    embeddings: dict[int, VocabParallelEmbedding] = {}
    heads: list[tuple[nn.Parameter, ParallelLMHead]] = []
    for path, module in list(model.named_modules(remove_duplicate=False)):
        if not module._parameters or isinstance(module, TrainingLayer) or not path:
            continue
        if not stage.holds(path):
            continue
        if id(module) not in replacements:
            reason = converting.why_not(module)
            layer = None
            if isinstance(module, nn.Embedding) and _rows(module) != vocabulary:
                reason = "it has no row for each token"
            if reason is None:
                try:
                    layer = converting.converted(
                        module, context, plan.style(path), path == head
                    )
                except ValueError as error:
                    raise ValueError(f"{path}: {error}") from error
            replacements[id(module)] = layer
            before = type(module).__name__
            if layer is None:
                rows.append(Row(path, before, "", reason or "no such training layer"))
            else:
                rows.append(Row(path, before, type(layer).__name__))
            if isinstance(layer, VocabParallelEmbedding):
                embeddings[id(module.weight)] = layer
            if isinstance(layer, ParallelLMHead):
                heads.append((module.weight, layer))
        layer = replacements[id(module)]
        if layer is not None:
            layers.append((path, layer))
    for weight, layer in heads:
        if id(weight) in embeddings:
            layer.tie_weights(embeddings[id(weight)])
    return rows, layers


def _rows(module: nn.Module) -> int | None:
    weight = module._parameters.get("weight")
    return None if weight is None else weight.shape[0]


def _attention_layers(
    model: nn.Module,
    sites: Sites,
    plan: tensor_parallel.Plan,
    stage: Stage,
    context: ParallelContext,
    implementation: str | None,
) -> list[tuple[str, AdoptedAttention]]:
    """A layer for each call of attention, with its path."""
    layers: list[tuple[str, AdoptedAttention]] = []
    paths = {module: path for path, module in model.named_modules()}
    for module, calls in sites.items():
        path = paths[module]
        if not stage.holds(path):
            continue
        splits = context.tp_size > 1 and plan.splits_heads(path)
        for index, site in enumerate(calls):
            if splits:
                site = _local(site, path, context)
            own = context if splits else ParallelContext.single()
            name = torch_attention.site_name(index)
            if name in vars(module) or name in module._modules:
                raise ValueError(f"{path} has an attribute {name} of its own.")
            layer = AdoptedAttention(site, module, own, implementation)
            layers.append((join(path, name), layer))
    return layers


def _take_over_mlps(model: nn.Module, mlps: Mapping[nn.Module, GatedMLP]) -> list[Row]:
    """Give gated MLPs their activation."""
    rows = []
    for path, module in model.named_modules():
        mlp = mlps.get(module)
        if mlp is not None:
            gated_mlp.use(module, mlp)
            layer = module.get_submodule(gated_mlp.ACTIVATION)
            name = f"{path}.{gated_mlp.ACTIVATION}"
            rows.append(Row(name, "gated activation", type(layer).__name__))
    return rows


def _merge_linears(
    model: nn.Module,
    groups: Groups,
    mlps: Mapping[nn.Module, GatedMLP],
    rows: list[Row],
) -> list[Row]:
    """Declare what the engine may merge; returns the rows with notes of it."""
    notes: dict[str, str] = {}
    for path, module in model.named_modules():
        found = groups.get(module, [])
        if module in mlps:
            # The activation takes a merged gate and up in this order.
            inputs = mlps[module].inputs
            is_called = any({*inputs} <= {*group.names} for group in found)
            found = [LinearGroup(inputs)] if is_called else []
        found = [group for group in found if may_merge(module, group.names)]
        if not found:
            continue
        declare(module, found)
        for group in found:
            note = f"the engine multiplies by {', '.join(group.names)} at once"
            notes |= {join(path, name): note for name in group.names}
    return [row._replace(note=row.note or notes.get(row.path, "")) for row in rows]


def _local(site: AttentionSite, path: str, context: ParallelContext) -> AttentionSite:
    """The call that each rank makes once the heads are sharded."""
    heads = site.num_heads, site.num_kv_heads
    if any(count % context.tp_size for count in heads):
        raise ValueError(
            f"{path}: {heads[0]} query heads and {heads[1]} key/value heads cannot be "
            f"sharded across {context.tp_size} ranks. Choose a tensor-parallel size "
            "that divides both."
        )
    return site._replace(
        num_heads=heads[0] // context.tp_size,
        num_kv_heads=heads[1] // context.tp_size,
    )


def _refuse_to_save(*args: Any, **kwargs: Any) -> NoReturn:
    raise ValueError(
        "save_pretrained would write this rank's part of the model as if it were all. "
        "Call training.save_checkpoint(model, directory) on every rank, and "
        "model.config.save_pretrained(directory) on one."
    )


def _runs_own_code(module: nn.Module) -> bool:
    """Whether a module has a forward that is neither ours nor torch's."""
    kind = type(module)
    return not (
        isinstance(module, TrainingLayer | AdoptedModule)
        or kind.__module__.startswith("torch.nn.")
        or kind.forward is nn.Module.forward
    )
