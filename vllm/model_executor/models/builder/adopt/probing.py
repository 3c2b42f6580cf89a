# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""Where a module calls attention, found by a forward of a few tokens.

The forward runs on fake tensors, which have shapes and no values: neither the
module's weights nor the time of a real forward are needed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.modules.module import (
    register_module_forward_hook,
    register_module_forward_pre_hook,
)
from torch.overrides import TorchFunctionMode

from vllm.model_executor.models.builder.adopt import torch_attention
from vllm.model_executor.models.builder.adopt.attention import AttentionSite

_TOKENS = 6

# By calling module, in the order of its calls.
Sites = dict[nn.Module, list[AttentionSite]]


def find_attention(
    module: nn.Module,
    call: Callable[[torch.Tensor, torch.Tensor], Any],
    transformers: Any = None,
) -> Sites:
    """Every call of attention in a forward.

    Args:
        module: Any module, also one on the meta device.
        call: Calls it with packed token ids and positions, shape = [num_tokens].
        transformers: `transformers_attention`, for one of transformers' models.

    Returns:
        What each module asks for, in the order of its calls.

    Raises:
        ValueError: Attention is called in a way that cannot be trained and served.
    """
    sites: Sites = {}
    paths = {part: path for path, part in module.named_modules()}

    def record(caller: nn.Module, site: AttentionSite) -> None:
        sites.setdefault(caller, []).append(site)

    with _running_modules() as running, _paths_in_errors(running, paths):
        recorded = transformers.recorded(module, record) if transformers else None
        with recorded or nullcontext(), _Recorder(running, record):
            _run_on_fake_tensors(module, call)
    return sites


class _Recorder(TorchFunctionMode):
    """Records calls of `scaled_dot_product_attention` and computes none."""

    def __init__(
        self,
        running: list[nn.Module],
        record: Callable[[nn.Module, AttentionSite], None],
    ) -> None:
        super().__init__()
        self.running, self.record = running, record

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is not F.scaled_dot_product_attention:
            return func(*args, **kwargs)
        site, _ = torch_attention.read_call(*args, **kwargs)
        self.record(self.running[-1], site)
        query = args[0] if args else kwargs["query"]
        return query.new_zeros(*query.shape[:-1], site.value_size)


def _run_on_fake_tensors(
    module: nn.Module, call: Callable[[torch.Tensor, torch.Tensor], Any]
) -> None:
    with FakeTensorMode(allow_non_fake_inputs=True), torch.no_grad():
        tensors = {
            f"module.{name}": torch.empty_strided(
                t.shape, t.stride(), dtype=t.dtype, device="cpu"
            )
            for name, t in (*module.named_parameters(), *module.named_buffers())
        }
        input_ids = torch.zeros(_TOKENS, dtype=torch.int64)
        positions = torch.arange(_TOKENS)
        was_training = {part: part.training for part in module.modules()}
        module.eval()
        try:
            caller = _Caller(module, call)
            torch.func.functional_call(caller, tensors, (input_ids, positions))
        finally:
            for part, training in was_training.items():
                part.training = training


class _Caller(nn.Module):
    """Calls a module in a way of one's own."""

    def __init__(self, module: nn.Module, call: Callable[..., Any]) -> None:
        super().__init__()
        self.module, self.call = module, call

    def forward(self, input_ids: torch.Tensor, positions: torch.Tensor) -> None:
        self.call(input_ids, positions)


@contextmanager
def _running_modules() -> Iterator[list[nn.Module]]:
    """The modules whose forwards run now, the innermost last."""
    running: list[nn.Module] = []

    def enter(module: nn.Module, args: Any) -> None:
        running.append(module)

    def leave(module: nn.Module, args: Any, output: Any) -> None:
        running.pop()

    handles = [
        register_module_forward_pre_hook(enter),
        register_module_forward_hook(leave),
    ]
    try:
        yield running
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def _paths_in_errors(
    running: list[nn.Module], paths: dict[nn.Module, str]
) -> Iterator[None]:
    """Say in which module something was raised."""
    try:
        yield
    except Exception as error:
        inside = [paths[m] for m in running if m in paths]
        where = inside[-1] if inside else ""
        raise ValueError(f"{where or 'The model'}: {error}") from error
