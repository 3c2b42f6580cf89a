# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""What every layer of this package has in common, in the trainer and in the engine."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import nn

from vllm.model_executor.checkpoint.specification import (
    ParameterSharding,
    local_from_full,
    local_shape,
)
from vllm.model_executor.op_library import SUPPORTED_DTYPES
from vllm.model_executor.parallel_context import ParallelContext

if TYPE_CHECKING:
    from vllm.config import VllmConfig

_skip_init: ContextVar[bool] = ContextVar("skip_init", default=False)


@contextmanager
def skip_init() -> Iterator[None]:
    """Layers built inside leave their parameters uninitialised.

    For a caller that loads every parameter anyway, such as the engine.
    """
    token = _skip_init.set(True)
    try:
        yield
    finally:
        _skip_init.reset(token)


def init_skipped() -> bool:
    """Whether the caller is inside `skip_init`."""
    return _skip_init.get()


def resolve_dtype(params_dtype: torch.dtype | None) -> torch.dtype:
    """The dtype of a layer's parameters.

    Args:
        params_dtype: A supported dtype; None means torch's default dtype.

    Raises:
        ValueError: A dtype that the layers do not support.
    """
    dtype = torch.get_default_dtype() if params_dtype is None else params_dtype
    if dtype not in SUPPORTED_DTYPES:
        raise ValueError(
            f"params_dtype={dtype} is not supported; use torch.float32, "
            "torch.bfloat16 or torch.float16 (torch.float64 for checks on CPU)."
        )
    return dtype


def runs_own_forward(module: nn.Module) -> bool:
    """Whether a call of `module` does anything but the forward of its class.

    True if its forward was replaced on the instance, as adapters do, if it has forward
    hooks or pre-hooks, or if its class defines `__call__`. Hooks of FSDP2, which gather
    and shard the parameters, do not count.
    """
    hooks = (*module._forward_hooks.values(), *module._forward_pre_hooks.values())
    return (
        "forward" in vars(module)
        or any(not _is_of_fsdp2(hook) for hook in hooks)
        or type(module).__call__ is not nn.Module.__call__
    )


def _is_of_fsdp2(hook: Callable[..., object]) -> bool:
    return getattr(hook, "__module__", "").startswith("torch.distributed.fsdp.")


class TrainingLayer(nn.Module):
    """Base class of the layers that are trained and served.

    Outside the engine a layer is a plain module under autograd. The engine's model
    wrapper visits every layer of exactly one of this package's types and puts what
    `bind_engine` returns in its place. A subclass with its own forward is left as
    it is, so forward has to run under inference mode as well, collectives included.

    A layer with state computes a token's row from earlier tokens too, as attention does
    from its KV cache. If its attribute `engine` is set, it calls that in place of its
    own kernels. The check at the start of an engine sets it to `row_wise`.

    Attributes:
        has_state: Whether the layer has state.
        parallel_context: The context the layer was built by.
        sequence_parallel: The layer begins, ends or is inside a region where each rank
            holds a slice of the tokens. The engine, whose ranks hold all of them, sets
            it to False.
    """

    has_state: ClassVar[bool] = False
    parallel_context: ParallelContext
    sequence_parallel: bool = False

    def __init__(self, parallel_context: ParallelContext | None = None) -> None:
        super().__init__()
        if parallel_context is None:
            parallel_context = ParallelContext.current_or_single()
        self.parallel_context = parallel_context
        self.tp_rank = parallel_context.tp_rank
        self.tp_size = parallel_context.tp_size

    def bind_engine(self, vllm_config: VllmConfig, prefix: str) -> nn.Module:
        """Prepare the layer for vLLM's engine.

        Called once, after the model is built and before weights are loaded, with
        the current vLLM config, default dtype and device set as for vLLM's models.

        Args:
            vllm_config: The engine's config.
            prefix: The layer's module path in the model.

        Returns:
            The module that takes this one's place: the layer itself, or vLLM's own
            with the same parameter names.
        """
        return self

    def row_wise(self, *inputs: torch.Tensor) -> torch.Tensor:
        """Of a layer with state: any function of each token's own row.

        It depends on all of the inputs, so that what enters the layer shows in what
        leaves it.

        Args:
            inputs: What the layer calls `engine` with.
        """
        raise NotImplementedError(f"{type(self).__name__} has no row_wise.")

    def parameter_sharding(self) -> dict[str, ParameterSharding]:
        """How each of the layer's own parameters is sharded, by parameter name."""
        return {}

    def reset_parameters(self) -> None:
        """Initialise the layer's own parameters, in the way of torch.nn.

        With tensor parallelism each rank draws the full parameter and keeps its
        shard: ranks with the same seed hold shards of the same matrix that one rank
        alone would draw.
        """

    def _add_parameter(self, name: str, dtype: torch.dtype) -> None:
        """Register an uninitialised parameter of the local shape."""
        shape = local_shape(self.parameter_sharding()[name], self.tp_size)
        setattr(self, name, nn.Parameter(torch.empty(shape, dtype=dtype)))

    def _initialise(self) -> None:
        """Last step of a constructor: initialise unless told not to."""
        if not init_skipped():
            self.reset_parameters()

    @torch.no_grad()
    def draw(self, name: str, fill_: Callable[[torch.Tensor], object]) -> None:
        """Initialise a parameter as the shard of a full one that fill_ draws."""
        param = getattr(self, name)
        sharding = self.parameter_sharding()[name]
        if param.shape == sharding.shape:
            fill_(param)
            return
        full = param.new_empty(sharding.shape)
        fill_(full)
        param.copy_(local_from_full(full, sharding, self.tp_rank, self.tp_size))

    def _engine_disables_tp(self) -> bool:
        """Whether vLLM's replacement of this layer must ignore tensor parallelism.

        Raises:
            ValueError: The layer is sharded otherwise than the engine.
        """
        engine_tp_size = ParallelContext.current().tp_size
        if self.tp_size == engine_tp_size:
            return False
        if self.tp_size == 1:
            return True
        raise ValueError(
            f"{type(self).__name__} was built with tp_size={self.tp_size}, but the "
            f"engine runs with tensor_parallel_size={engine_tp_size}. Pass the "
            "parallel_context that the model builder receives, or "
            "ParallelContext.single() for a layer that every rank holds whole."
        )
