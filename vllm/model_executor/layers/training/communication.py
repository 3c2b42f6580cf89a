# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""Collectives over a process group, without a gradient.

While vLLM's engine runs a step, those over its tensor-parallel group are the engine's
own: custom all-reduce, captured in CUDA graphs, with a fixed order in batch-invariant
mode. All others, a trainer's among them, are torch's functional collectives, which
torch.compile traces and which can be waited for later.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.distributed import ProcessGroup

from vllm import envs
from vllm.model_executor import vllm_internals
from vllm.model_executor.determinism.ordered_sum import ordered_sum

# Waits for a collective that was started, and returns its result.
Finish = Callable[[], torch.Tensor]

_TORCH = torch.ops._c10d_functional


def engine_group(group: ProcessGroup) -> Any | None:
    """The engine's tensor-parallel group if it runs a step and `group` is that one."""
    if not vllm_internals.is_forward_context_available():
        return None
    coordinator = vllm_internals.get_tp_group()
    return coordinator if coordinator.device_group is group else None


def all_reduce(x: torch.Tensor, group: ProcessGroup) -> torch.Tensor:
    """The sum over the ranks, in an order of the library's choice."""
    engine = engine_group(group)
    if engine is None:
        return start_all_reduce(x, group)()
    # On CPU the engine adds up in place.
    if x.device.type == "cpu":
        return engine.all_reduce(x.clone(memory_format=torch.contiguous_format))
    return engine.all_reduce(x.contiguous())


def start_all_reduce(x: torch.Tensor, group: ProcessGroup) -> Finish:
    """`all_reduce` in the background."""
    total = _TORCH.all_reduce(x.contiguous(), "sum", group.group_name)
    return lambda: _TORCH.wait_tensor(total)


def all_gather(x: torch.Tensor, group: ProcessGroup, dim: int) -> torch.Tensor:
    """The ranks' tensors of one shape, side by side along a dim, in rank order."""
    engine = engine_group(group)
    if engine is None:
        return start_all_gather(x, group, dim)()
    return engine.all_gather(x.contiguous(), dim)


def start_all_gather(x: torch.Tensor, group: ProcessGroup, dim: int) -> Finish:
    """`all_gather` in the background."""
    size, dim = group.size(), dim % x.ndim
    gathered = _TORCH.all_gather_into_tensor(x.contiguous(), size, group.group_name)

    def finish() -> torch.Tensor:
        pieces = _TORCH.wait_tensor(gathered)
        return torch.cat(pieces.chunk(size), dim) if dim else pieces

    return finish


def reduce_scatter(x: torch.Tensor, group: ProcessGroup, dim: int) -> torch.Tensor:
    """This rank's slice along a dim of the sum, in an order of the library's choice."""
    engine = engine_group(group)
    if engine is None:
        return start_reduce_scatter(x, group, dim)()
    if x.is_cuda and engine.device_communicator.pynccl_comm.disabled:
        # vLLM's would return what it found in memory.
        raise RuntimeError(
            "vLLM's reduce-scatter needs its own binding of NCCL, which found no "
            "library in this process. Name one: VLLM_NCCL_SO_PATH=/.../libnccl.so.2, "
            "and leave VLLM_DISABLE_PYNCCL unset."
        )
    return engine.reduce_scatter(x.contiguous(), dim)


def start_reduce_scatter(x: torch.Tensor, group: ProcessGroup, dim: int) -> Finish:
    """`reduce_scatter` in the background."""
    slices = _slices_first(x, group.size(), dim).flatten(0, 1)
    own = _TORCH.reduce_scatter_tensor(slices, "sum", group.size(), group.group_name)
    return lambda: _TORCH.wait_tensor(own)


def all_to_all(
    x: torch.Tensor,
    group: ProcessGroup,
    output_sizes: Sequence[int],
    input_sizes: Sequence[int],
) -> torch.Tensor:
    """Send rank i the i-th piece of the first dim; the pieces received in rank order.

    Args:
        x: shape = [sum(input_sizes), ...]
        group: the ranks.
        output_sizes: of the piece that comes from each rank.
        input_sizes: of the piece that goes to each rank.

    Returns:
        shape = [sum(output_sizes), ...].
    """
    received = _TORCH.all_to_all_single(
        x.contiguous(), list(output_sizes), list(input_sizes), group.group_name
    )
    return _TORCH.wait_tensor(received)


def ordered_all_reduce(parts: torch.Tensor, group: ProcessGroup) -> torch.Tensor:
    """The sum of all ranks' parts, in rank order, in fp32, rounded once.

    Args:
        parts: shape = [parts of a rank, ...]
        group: the ranks.
    """
    engine = engine_group(group)
    if engine is not None and len(parts) == 1 and envs.VLLM_BATCH_INVARIANT:
        # The engine's own sum has that order then.
        return all_reduce(parts[0], group)
    return ordered_sum(all_gather(parts, group, 0))


def ordered_reduce_scatter(
    parts: torch.Tensor, group: ProcessGroup, dim: int
) -> torch.Tensor:
    """This rank's slice of `ordered_all_reduce`, with the same bits.

    Args:
        parts: shape = [parts of a rank, ...]
        group: the ranks.
        dim: of a part.
    """
    size, count = group.size(), len(parts)
    dim = dim % (parts.ndim - 1) + 1
    slices = _slices_first(parts, size, dim).flatten(0, 1)
    received = all_to_all(slices, group, [count] * size, [count] * size)
    return ordered_sum(received)


def own_slice(x: torch.Tensor, group: ProcessGroup, dim: int) -> torch.Tensor:
    """This rank's slice along a dim."""
    return x.chunk(group.size(), dim)[group.rank()].contiguous()


def _slices_first(x: torch.Tensor, size: int, dim: int) -> torch.Tensor:
    """The slices along a dim, shape = [size, *slice.shape]."""
    return torch.stack(x.chunk(size, dim))
