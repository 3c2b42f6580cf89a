# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""Timing and memory of a function and its peers, measured side by side."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field

import torch


@dataclass
class Result:
    """One function against its peers in one run.

    Attributes:
        group: which table it belongs to.
        case: sizes and dtype.
        unit: of the numbers: `ms` or `MiB`.
        ours: our median.
        peers: medians of the others, by name. The ratio of one is its number over
            ours: above 1 means that ours takes less.
        target: the wanted ratio by peer, where there is one.
        note: what else was derived from the run, such as a bandwidth.
    """

    group: str
    case: str
    unit: str
    ours: float
    peers: dict[str, float]
    target: dict[str, float] = field(default_factory=dict)
    note: str = ""

    @property
    def ratios(self) -> dict[str, float]:
        return {name: value / self.ours for name, value in self.peers.items()}

    def as_dict(self) -> dict[str, object]:
        return asdict(self) | {"ratios": self.ratios}


def name_of(dtype: torch.dtype) -> str:
    """Such as `bfloat16`."""
    return str(dtype).removeprefix("torch.")


def dtypes_of_products(device: torch.device) -> list[torch.dtype]:
    """In which dtypes what consists of matrix products is measured.

    On a CPU without instructions for bf16 torch needs forty times as long for them.
    """
    if device.type == "cuda":
        return [torch.bfloat16]
    has_bf16 = torch.ops.mkldnn._is_mkldnn_bf16_supported()
    return [torch.float32, torch.bfloat16] if has_bf16 else [torch.float32]


def medians(
    variants: dict[str, Callable[[], object]],
    device: torch.device,
    *,
    seconds: float = 3.0,
    least: int = 3,
    before: Callable[[], object] = lambda: None,
) -> dict[str, float]:
    """The median time of each variant, in milliseconds.

    The variants take turns, so that what else the machine does falls on all alike.
    Each has two rounds to warm up. On CUDA the time is between two events, with the
    cache flushed before.

    Args:
        variants: the functions by name.
        device: where they run.
        seconds: about how long all of them together may take.
        least: rounds to run however long they take.
        before: called before each call that is timed, such as a barrier of ranks;
            ranks need `seconds` of 0, so that all run the same rounds.
    """
    clock = _cuda_time if device.type == "cuda" else _cpu_time
    for _ in range(2):
        for function in variants.values():
            function()
    times: dict[str, list[float]] = {name: [] for name in variants}
    begin = time.perf_counter()
    while len(times[next(iter(times))]) < least or (
        time.perf_counter() - begin < seconds
    ):
        for name, function in variants.items():
            before()
            times[name].append(clock(function))
    return {name: statistics.median(values) for name, values in times.items()}


def _cpu_time(function: Callable[[], object]) -> float:
    begin = time.perf_counter()
    function()
    return (time.perf_counter() - begin) * 1e3


_flushed: torch.Tensor | None = None


def _cuda_time(function: Callable[[], object]) -> float:
    global _flushed
    if _flushed is None:
        _flushed = torch.empty(1 << 28, dtype=torch.uint8, device="cuda")
    _flushed.zero_()
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    function()
    end.record()
    torch.cuda.synchronize()
    return begin.elapsed_time(end)


def forward_backward(
    function: Callable[..., object], *inputs: torch.Tensor
) -> Callable[[], object]:
    """A function that runs another and its backward.

    Args:
        function: returns a tensor, or several.
        inputs: arguments; those that require a gradient get one.
    """
    outputs = function(*inputs)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    grads = tuple(torch.randn_like(output) for output in outputs)
    wanted = [tensor for tensor in inputs if tensor.requires_grad]

    def run() -> object:
        outputs = function(*inputs)
        outputs = outputs if isinstance(outputs, tuple) else (outputs,)
        return torch.autograd.grad(outputs, wanted, grads)

    return run


def peak_cuda_memory(function: Callable[[], object]) -> float:
    """Most CUDA memory that a call holds beyond what was held before, in MiB."""
    function()
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    function()
    torch.cuda.synchronize()
    return (torch.cuda.max_memory_allocated() - before) / 2**20


def as_graph(function: Callable[[], object]) -> Callable[[], object]:
    """A function of CUDA work as one graph that is launched at once."""
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        for _ in range(3):
            function()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        # The result stays alive with the function, and so does its memory.
        results = function()

    def replay() -> object:
        graph.replay()
        return results

    return replay
