# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""Training layers in the place of modules that compute the same.

A module is recognised by what it computes: a converter reads its parameters, and the
training layer's result is compared with the module's on random numbers, with random
parameters. Names are not looked at. The layers take over the module's own parameters,
so names, values and memory stay as they are.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from vllm.model_executor.checkpoint.specification import (
    ParameterSharding,
    local_from_full,
    local_shape,
)
from vllm.model_executor.layers.training import (
    LayerNorm,
    ParallelLMHead,
    RMSNorm,
    TrainingLayer,
    VocabParallelEmbedding,
    skip_init,
)
from vllm.model_executor.layers.training.base import runs_own_forward
from vllm.model_executor.layers.training.engine_layers import scaled
from vllm.model_executor.models.builder.adopt.tensor_parallel import (
    Style,
    linear_layer,
)
from vllm.model_executor.models.builder.binding import copy_attributes
from vllm.model_executor.op_library import SUPPORTED_DTYPES
from vllm.model_executor.parallel_context import ParallelContext

_ROWS = 5
# Hooks besides those of the forward.
_HOOKS = (
    "_backward_hooks",
    "_backward_pre_hooks",
    "_state_dict_hooks",
    "_state_dict_pre_hooks",
    "_load_state_dict_pre_hooks",
    "_load_state_dict_post_hooks",
)


def why_not(module: nn.Module) -> str | None:
    """Why a module must stay as it is; None if it may be converted."""
    if runs_own_forward(module) or any(getattr(module, name) for name in _HOOKS):
        return "it has hooks or a forward of its own"
    if any(buffer.is_meta for buffer in module.buffers(recurse=False)):
        return "its buffers are on the meta device, without values"
    dtypes = {parameter.dtype for parameter in module.parameters(recurse=False)}
    if unsupported := dtypes.difference(SUPPORTED_DTYPES):
        return f"its parameters are {', '.join(map(str, unsupported))}"
    if len(dtypes) > 1:
        return "its parameters have several dtypes"
    return None


def converted(
    module: nn.Module,
    context: ParallelContext,
    style: Style | None = None,
    is_head: bool = False,
) -> TrainingLayer | None:
    """The training layer that computes what a module computes; None: there is none.

    Args:
        module: Without submodules.
        context: What embeddings, heads and layers with a style are sharded by.
        style: How the layer is sharded over tensor-parallel ranks; None: every rank
            holds it whole.
        is_head: The module gives logits.
    """
    names = frozenset(n for n, p in module._parameters.items() if p is not None)
    if any(True for _ in module.children()):
        return None
    with skip_init(), torch.device("meta"):
        if names in ({"weight"}, {"weight", "bias"}):
            weight = module._parameters["weight"]
            assert weight is not None
            if weight.ndim == 1:
                layer = _norm(module, weight, context, style)
            elif weight.ndim == 2 and isinstance(module, nn.Embedding):
                layer = _embedding(module, weight, context)
            elif weight.ndim == 2:
                layer = _linear(module, weight, context, style, is_head)
                if layer is None and not is_head:
                    layer = _transposed_linear(module, weight, context, style)
            else:
                layer = None
        else:
            layer = None
    if layer is None:
        return None
    shardings = layer.parameter_sharding()
    for name in names:
        parameter = module._parameters[name]
        assert parameter is not None
        sharded = shard_of(parameter, shardings[name], layer.parallel_context)
        setattr(layer, name, sharded)
    # The model's code may read them, such as in_features.
    copy_attributes(module, layer)
    return layer.train(module.training)


def shard_of(
    parameter: nn.Parameter, sharding: ParameterSharding, context: ParallelContext
) -> nn.Parameter:
    """This rank's part of a parameter: the parameter itself where that is all of it."""
    rank, size = context.tp_rank, context.tp_size
    if size == 1 or sharding.dim is None:
        return parameter
    if parameter.is_meta:
        shape = local_shape(sharding, size)
        shard = torch.empty(shape, dtype=parameter.dtype, device="meta")
    else:
        with torch.device(parameter.device):
            shard = local_from_full(parameter.data, sharding, rank, size).clone()
    return nn.Parameter(shard, parameter.requires_grad)


def shard_parameters(
    module: nn.Module,
    shardings: Mapping[str, ParameterSharding],
    context: ParallelContext,
) -> None:
    """Keep this rank's part of a module's own parameters, and declare it.

    Args:
        module: Stays in its place.
        shardings: Of its parameters, by name.
        context: Of this rank.
    """
    for name, sharding in shardings.items():
        setattr(module, name, shard_of(module.get_parameter(name), sharding, context))
    vars(module)["parallel_context"] = context
    # What `checkpoint.declared_sharding` calls.
    vars(module)["parameter_sharding"] = functools.partial(
        dict[str, ParameterSharding], shardings
    )


def _linear(
    module: nn.Module,
    weight: torch.Tensor,
    context: ParallelContext,
    style: Style | None,
    is_head: bool,
) -> TrainingLayer | None:
    out_features, in_features = weight.shape
    bias = module._parameters.get("bias")
    if bias is not None and bias.shape != (out_features,):
        return None

    def linear(x: torch.Tensor, parameters: dict[str, torch.Tensor]) -> torch.Tensor:
        return F.linear(x, parameters["weight"], parameters.get("bias"))

    if type(module) is not nn.Linear and not computes(
        module, linear, random_inputs(in_features)
    ):
        return None
    if is_head:
        return ParallelLMHead(
            out_features,
            in_features,
            bias is not None,
            params_dtype=weight.dtype,
            parallel_context=context,
        )
    return linear_layer(
        style,
        in_features,
        out_features,
        bias is not None,
        is_transposed=False,
        params_dtype=weight.dtype,
        context=context,
    )


def _transposed_linear(
    module: nn.Module,
    weight: torch.Tensor,
    context: ParallelContext,
    style: Style | None,
) -> TrainingLayer | None:
    in_features, out_features = weight.shape
    bias = module._parameters.get("bias")
    if bias is not None and bias.shape != (out_features,):
        return None

    def linear(x: torch.Tensor, parameters: dict[str, torch.Tensor]) -> torch.Tensor:
        return F.linear(x, parameters["weight"].t(), parameters.get("bias"))

    if not computes(module, linear, random_inputs(in_features)):
        return None
    return linear_layer(
        style,
        in_features,
        out_features,
        bias is not None,
        is_transposed=True,
        params_dtype=weight.dtype,
        context=context,
    )


def _embedding(
    module: nn.Embedding, weight: torch.Tensor, context: ParallelContext
) -> TrainingLayer | None:
    if module.max_norm is not None or module.sparse or module.scale_grad_by_freq:
        return None
    scale = 1.0
    if type(module) is not nn.Embedding:
        found = _embedding_scale(module, weight.dtype)
        if found is None:
            return None
        scale = found
    return VocabParallelEmbedding(
        *weight.shape,
        scale=scale,
        padding_idx=module.padding_idx,
        params_dtype=weight.dtype,
        parallel_context=context,
    )


def _embedding_scale(module: nn.Embedding, dtype: torch.dtype) -> float | None:
    """The factor that an embedding of a class of its own multiplies by."""
    ids = torch.arange(_ROWS, device="cpu")
    ones = {"weight": torch.ones(_ROWS, module.embedding_dim, device="cpu")}
    output = _call(module, ones, ids)
    if output is None or output.dtype != torch.float32:
        return None
    scale = float(output.flatten()[0])

    def formula(x: torch.Tensor, parameters: dict[str, torch.Tensor]) -> torch.Tensor:
        return scaled(F.embedding(x, parameters["weight"]), scale)

    shapes = {"weight": (_ROWS, module.embedding_dim)}
    for each in {torch.float32, dtype}:
        if not computes(module, formula, ids, each, shapes):
            return None
    return scale


def _norm(
    module: nn.Module,
    weight: torch.Tensor,
    context: ParallelContext,
    style: Style | None,
) -> TrainingLayer | None:
    (size,) = weight.shape
    # Of a norm over each head, every rank has other heads.
    sharing: dict[str, Any] = {
        "sequence_parallel": style is not None,
        "parallel_context": context,
    }
    has_bias = module._parameters.get("bias") is not None
    if type(module) is nn.LayerNorm:
        if module.normalized_shape != (size,):
            return None
        return LayerNorm(
            size, module.eps, bias=has_bias, params_dtype=weight.dtype, **sharing
        )
    if has_bias:
        return None
    for eps in _epsilons(module, weight.dtype):
        for offset in (0.0, 1.0):
            norm = _RMSFormula(eps, offset, weight_in_fp32=True)
            if not computes(module, norm, random_inputs(size)):
                continue
            is_late = _rounds_late(module, norm, random_inputs(size))
            if is_late is None:
                return None
            return RMSNorm(
                size,
                eps,
                weight_offset=offset,
                weight_in_fp32=is_late,
                params_dtype=weight.dtype,
                **sharing,
            )
    return None


class _RMSFormula:
    """The norm that a module may compute."""

    def __init__(self, eps: float, offset: float, weight_in_fp32: bool) -> None:
        self.eps, self.offset, self.weight_in_fp32 = eps, offset, weight_in_fp32

    def __call__(
        self, x: torch.Tensor, parameters: dict[str, torch.Tensor]
    ) -> torch.Tensor:
        weight = parameters["weight"]
        layer = RMSNorm(
            weight.shape[0],
            self.eps,
            weight_offset=self.offset,
            weight_in_fp32=self.weight_in_fp32,
            params_dtype=weight.dtype,
        )
        layer.weight = nn.Parameter(weight, requires_grad=False)
        return layer(x)


def _epsilons(module: nn.Module, dtype: torch.dtype) -> list[float]:
    """What may be a norm's epsilon: the small numbers among a module's attributes."""
    given = [v for v in vars(module).values() if isinstance(v, float) and 0 < v < 1e-2]
    return [*dict.fromkeys(given), torch.finfo(dtype).eps, torch.finfo().eps]


def _rounds_late(module: nn.Module, norm: _RMSFormula, x: torch.Tensor) -> bool | None:
    """Whether the weight is multiplied before the norm is rounded to bf16.

    Returns:
        None if neither order gives the module's results.
    """
    for late in (True, False):
        norm.weight_in_fp32 = late
        if computes(module, norm, x, torch.bfloat16):
            return late
    return None


def random_inputs(features: int) -> torch.Tensor:
    """Random rows, of sizes from 1e-3, where a norm's epsilon counts, to 10."""
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(_ROWS, features, generator=generator, device="cpu")
    return x * torch.logspace(-3, 1, _ROWS, device="cpu")[:, None]


def computes(
    module: nn.Module,
    formula: Callable[[torch.Tensor, dict[str, torch.Tensor]], torch.Tensor],
    x: torch.Tensor,
    dtype: torch.dtype = torch.float32,
    shapes: Mapping[str, tuple[int, ...]] | None = None,
) -> bool:
    """Whether a module computes a formula, for random parameters, also in training.

    In fp32, sums in another order differ by less than the tolerance; another epsilon, a
    scale or a missing bias by more. In a narrower dtype such a sum seldom changes what
    a result is rounded to, and another order of roundings does so in every third
    element.

    Args:
        module: The module.
        formula: A function of the input and the parameters.
        x: The input; its rows are compared one by one.
        dtype: Computed in.
        shapes: The parameters', if not the module's own.
    """
    if shapes is None:
        shapes = {n: tuple(p.shape) for n, p in module.named_parameters()}
    generator = torch.Generator().manual_seed(0)
    parameters = {
        name: torch.randn(shape, generator=generator, device="cpu").to(dtype)
        for name, shape in shapes.items()
    }
    x = x.to(dtype) if x.is_floating_point() else x
    with torch.no_grad(), torch.device("cpu"):
        expected = formula(x, parameters)
    for training in (False, True):
        output = _call(module, parameters, x, training)
        if output is None or output.shape != expected.shape:
            return False
        if output.dtype != expected.dtype:
            return False
        if dtype != torch.float32:
            if not bool((output == expected).float().mean() > 0.95):
                return False
            continue
        scale = expected.abs().amax(-1, keepdim=True)
        if not bool(((output - expected).abs() <= 1e-5 * scale + 1e-12).all()):
            return False
    return True


def _call(
    module: nn.Module,
    parameters: dict[str, torch.Tensor],
    x: torch.Tensor,
    training: bool = False,
) -> torch.Tensor | None:
    """A module's output with other parameters; None if it is no tensor or it fails."""
    before = {part: part.training for part in module.modules()}
    for part in before:
        part.training = training
    try:
        with torch.no_grad(), torch.device("cpu"):
            buffers = {name: b.cpu() for name, b in module.named_buffers()}
            tensors = {**buffers, **parameters}
            output = torch.func.functional_call(module, tensors, (x,))
    except Exception:
        return None
    finally:
        for part, mode in before.items():
            part.training = mode
    return output if isinstance(output, torch.Tensor) else None
