# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""How the layers' tests judge accuracy and memory."""

import os
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.utils._python_dispatch import TorchDispatchMode

from tests.forks import run_python
from vllm.model_executor.parallel_context import ParallelContext

# Where there is a GPU the kernels are tested as they are.
collect_ignore = ["test_interpreted_triton.py"] if torch.cuda.is_available() else []


@pytest.fixture(scope="session", autouse=True)
def batch_invariant_mode() -> None:
    """vLLM's batch-invariant mode, where VLLM_BATCH_INVARIANT asks for it."""
    if os.environ.get("VLLM_BATCH_INVARIANT") == "1" and torch.cuda.is_available():
        from vllm.model_executor.determinism.batch_invariant import (
            init_batch_invariance,
        )

        init_batch_invariance()


@pytest.fixture
def device() -> torch.device:
    """Where the layers' tests run: CUDA where there is a GPU, else the CPU."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


@pytest.fixture
def on_device(device: torch.device) -> Iterator[None]:
    """New tensors and layers are on the device of the tests."""
    torch.set_default_device(device)
    yield
    torch.set_default_device(None)


@pytest.fixture
def single() -> ParallelContext:
    return ParallelContext.single()


@pytest.fixture
def second_of_two() -> ParallelContext:
    """A context of two ranks without a group: enough to build layers."""
    return ParallelContext(tp_rank=1, tp_size=2, rank=1)


def _assert_as_accurate(
    what: str, actual: torch.Tensor, plain: torch.Tensor, exact: torch.Tensor
) -> None:
    """The error is at most twice that of plain torch in the same dtype.

    Judged by the root mean square over all elements, which unlike the largest error
    does not depend on luck. No element may be off by more than eight times the
    largest error of plain torch, so that a single wrong one is found. Both bounds
    allow the rounding of the result itself on top: eps times the size of the exact
    values.

    Args:
        what: names the tensor in the message.
        actual: the result to judge.
        plain: the same by plain torch, in the dtype of actual.
        exact: the same in fp64.
    """
    assert actual.dtype == plain.dtype, what
    assert actual.shape == plain.shape == exact.shape, what
    if not exact.numel():
        return
    eps = torch.finfo(actual.dtype).eps
    error, plain_error = (actual.double() - exact).abs(), (plain.double() - exact).abs()
    bound = 2 * _rms(plain_error) + eps * _rms(exact)
    assert _rms(error) <= bound, f"{what}: RMS error {_rms(error):.3e} > {bound:.3e}"
    bound = 8 * plain_error.max() + eps * exact.abs().max()
    if not error.max() <= bound:
        where = torch.unravel_index(error.argmax(), error.shape)
        coordinate = tuple(int(index) for index in where)
        raise AssertionError(
            f"{what}: error {error.max():.3e} at {coordinate} exceeds {bound:.3e}; "
            f"got {actual[coordinate]}, plain torch {plain[coordinate]}, "
            f"exact {exact[coordinate]}"
        )


def _rms(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.square().mean().sqrt()


@pytest.fixture
def assert_as_accurate() -> Callable[..., None]:
    return _assert_as_accurate


def _assert_equal(what: str, actual: torch.Tensor, expected: torch.Tensor) -> None:
    """Equal bit for bit; the message names the first difference."""
    assert (actual.dtype, actual.shape) == (expected.dtype, expected.shape), what
    if torch.equal(actual, expected):
        return
    coordinate = tuple(int(index) for index in (actual != expected).nonzero()[0])
    raise AssertionError(
        f"{what}: first difference at {coordinate}: {actual[coordinate]} and "
        f"{expected[coordinate]}"
    )


@pytest.fixture
def assert_equal() -> Callable[..., None]:
    return _assert_equal


def _run_on_ranks(count: int, *checks: Path) -> None:
    """The tests of files pass in each of so many processes under torchrun."""
    arguments = [
        *("-m", "torch.distributed.run", "--standalone"),
        *("--nproc-per-node", count, "-m", "pytest", "-q", "-x"),
        *("-p", "no:cacheprovider", *checks),
    ]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    result = run_python(arguments, timeout=300, env=environment)
    report = result.stdout + result.stderr
    assert result.returncode == 0, report
    assert report.count(" passed") == count, report


@pytest.fixture
def run_on_ranks() -> Callable[..., None]:
    return _run_on_ranks


@pytest.fixture
def run_on_two_ranks() -> Callable[..., None]:
    return partial(_run_on_ranks, 2)


@pytest.fixture(scope="session")
def context(request: pytest.FixtureRequest) -> Iterator[ParallelContext]:
    """Of all processes that torchrun started, which are tensor-parallel ranks.

    On GPUs if there is one for each, else on the CPU. vLLM's own groups, which
    `vllm_groups` asks for, are on its platform's devices: a machine with too few GPUs
    has none. After a failure the groups are left as they are: the other ranks do not
    get here, and torchrun ends them when this one has ended.
    """
    # Not above: what interprets Triton's kernels has to come before they are imported.
    from vllm.training.parallel import destroy_parallel, initialize_parallel

    size = int(os.environ["WORLD_SIZE"])
    if not 0 < torch.cuda.device_count() < size:
        context, destroy = initialize_parallel(size), destroy_parallel
    else:
        dist.init_process_group("gloo")
        rank = dist.get_rank()
        group = dist.group.WORLD
        context = ParallelContext(tp_rank=rank, tp_size=size, rank=rank, tp_group=group)
        destroy = dist.destroy_process_group
    yield context
    if not request.session.testsfailed:
        destroy()


@pytest.fixture
def vllm_groups(context: ParallelContext) -> None:
    if 0 < torch.cuda.device_count() < context.tp_size:
        pytest.skip(f"needs {context.tp_size} GPUs, or none, for vLLM's own groups")


@pytest.fixture
def on_the_ranks_device(context: ParallelContext) -> Iterator[None]:
    """New tensors and layers are on the rank's device."""
    torch.set_default_device(context.device)
    yield
    torch.set_default_device(None)


class LargestTensor(TorchDispatchMode):
    """Records the number of elements of the largest tensor that torch returns."""

    numel = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        for value in result if isinstance(result, (tuple, list)) else (result,):
            if isinstance(value, torch.Tensor):
                self.numel = max(self.numel, value.numel())
        return result


@pytest.fixture
def largest_tensor() -> LargestTensor:
    return LargestTensor()
