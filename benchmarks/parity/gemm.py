# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""The GEMM of batch-invariant mode against cuBLAS and vLLM's, on one GPU.

Each is measured on the layers of three models, in a CUDA graph that takes turns among
as many copies of the weight as do not fit into the cache. Writes all times to a JSON
file and prints by how much ordinary cuBLAS takes longer than ours.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "common"))

import tables
from measure import as_graph, medians
from record import write_record

from vllm.model_executor import vllm_internals
from vllm.model_executor.determinism.linear import gpu

# By model and layer: N, K.
LAYERS = {
    "1.7B": {
        "qkv": (4096, 2048),
        "o": (2048, 2048),
        "gate_up": (12288, 2048),
        "down": (2048, 6144),
        "head": (151936, 2048),
    },
    "8B": {
        "qkv": (6144, 4096),
        "o": (4096, 4096),
        "gate_up": (28672, 4096),
        "down": (4096, 14336),
        "head": (128256, 4096),
    },
    "32B": {
        "qkv": (10240, 5120),
        "o": (5120, 8192),
        "gate_up": (51200, 5120),
        "down": (5120, 25600),
        "head": (151936, 5120),
    },
}
ROWS = (1, 2, 4, 8, 16, 32, 64, 80, 96, 128, 192, 256, 512, 1024, 2048, 4096, 8192)
# Several times the 50 MB of an H200's cache.
_COLD_BYTES = 200e6


@dataclass
class Point:
    """One product.

    Attributes:
        model: whose layer it is.
        layer: its name.
        shape: M, N, K.
        kernel: which of ours was run: few_rows, cublaslt or vllm.
        equal_bits: whether ours has the bits of vLLM's.
        us: times in microseconds: cublas, ours and vllm.
        ratio: cuBLAS over ours: above 1 means that ours takes less.
    """

    model: str
    layer: str
    shape: tuple[int, int, int]
    kernel: str
    equal_bits: bool
    us: dict[str, float]

    @property
    def ratio(self) -> float:
        return self.us["cublas"] / self.us["ours"]


def main() -> None:
    """Measure all products, write the file and print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("build/bench/gemm.json"))
    parser.add_argument("--models", nargs="+", choices=LAYERS, default=list(LAYERS))
    parser.add_argument("--rows", nargs="+", type=int, default=list(ROWS))
    args = parser.parse_args()
    if os.environ.get("VLLM_BATCH_INVARIANT") == "1":
        parser.error("unset VLLM_BATCH_INVARIANT: it changes the ordinary cuBLAS too")
    torch.manual_seed(0)
    points = []
    for model in args.models:
        _compile(list(LAYERS[model].values()), args.rows)
        for layer, (out_features, in_features) in LAYERS[model].items():
            found = list(_measure(model, layer, out_features, in_features, args.rows))
            print(_line(found), flush=True)
            points += found
    results = _by_rows(points)
    print(tables.table(results))
    print(_slowest(points))
    every = [vars(point) | {"ratio": point.ratio} for point in points]
    write_record(args.out, torch.device("cuda"), results=results, points=every)


def _random(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, device="cuda", dtype=torch.bfloat16)


def _vllm(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    return vllm_internals.batch_invariant_kernels().matmul_persistent(x, weight.t())


def _ours(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    return gpu.in_order_linear(x, weight, None)


def _compile(layers: list[tuple[int, int]], rows: list[int]) -> None:
    """Compile the Triton kernels at once, which else takes most of the time."""

    def run(function: Callable[..., object], num_rows: int, index: int) -> None:
        with torch.inference_mode():
            function(inputs[index][:num_rows], weights[index])

    weights = [_random(*shape) for shape in layers]
    inputs = [_random(max(rows), in_features) for _, in_features in layers]
    # Triton sets itself up in the first launch, which threads must not do together.
    for function in (_vllm, _ours):
        run(function, 1, 0)
    small = [num_rows for num_rows in rows if num_rows <= gpu.FEW_ROWS]
    with ThreadPoolExecutor(min(16, os.cpu_count() or 1)) as pool:
        for function, chosen in ((_vllm, rows), (_ours, small)):
            for future in [
                pool.submit(run, function, num_rows, index)
                for num_rows in chosen
                for index in range(len(layers))
            ]:
                future.result()
    torch.cuda.synchronize()


def _measure(
    model: str, layer: str, out_features: int, in_features: int, rows: list[int]
) -> Iterator[Point]:
    weight = _random(out_features, in_features)
    copies = max(2, round(_COLD_BYTES / (2 * weight.numel())))
    weights = [weight, *(weight.clone() for _ in range(copies - 1))]
    for num_rows in rows:
        x = _random(num_rows, in_features)
        functions = {"cublas": F.linear, "ours": _ours, "vllm": _vllm}
        equal = torch.equal(_ours(x, weight), _vllm(x, weight))
        # The settings that ours changes for a call are torch's again.
        graphs = {
            name: as_graph(_over(function, x, weights))
            for name, function in functions.items()
        }
        times = medians(graphs, torch.device("cuda"), seconds=0.02, least=5)
        us = {name: time * 1e3 / len(weights) for name, time in times.items()}
        kernel = "few_rows"
        if num_rows > gpu.FEW_ROWS:
            kernel = "cublaslt" if gpu.prove(num_rows, weight) else "vllm"
        shape = num_rows, out_features, in_features
        yield Point(model, layer, shape, kernel, equal, us)


def _over(
    function: Callable[..., torch.Tensor], x: torch.Tensor, weights: list[torch.Tensor]
) -> Callable[[], object]:
    def run() -> None:
        # The results' memory is used again at once.
        for weight in weights:
            function(x, weight)

    return run


def _line(points: list[Point]) -> str:
    first = points[0]
    _, out_features, in_features = first.shape
    cells = " ".join(f"{p.shape[0]}:{p.ratio:.2f}{_mark(p)}" for p in points)
    return f"{first.model} {first.layer} [{out_features}, {in_features}]  {cells}"


def _mark(point: Point) -> str:
    """Ran: t, our kernel; c, cuBLASLt; v, vLLM's. !: its bits are not vLLM's."""
    return {"few_rows": "t", "cublaslt": "c", "vllm": "v"}[point.kernel] + (
        "" if point.equal_bits else "!"
    )


def _by_rows(points: list[Point]) -> list[dict[str, object]]:
    """For each number of rows the ratios over all weights, and whether bits differ."""
    by_rows: dict[int, list[Point]] = {}
    for point in points:
        by_rows.setdefault(point.shape[0], []).append(point)
    results: list[dict[str, object]] = []
    for num_rows, column in by_rows.items():
        cublas = torch.tensor([point.ratio for point in column])
        vllm = torch.tensor([p.us["vllm"] / p.us["ours"] for p in column])
        equal = sum(point.equal_bits for point in column)
        results.append(
            {
                "case": f"{num_rows} rows",
                "ratios": {
                    "cuBLAS, least of all shapes": cublas.min().item(),
                    "cuBLAS, geometric mean": cublas.log().mean().exp().item(),
                    "vLLM's batch-invariant GEMM": vllm.log().mean().exp().item(),
                },
                "note": f"equal bits: {equal} of {len(column)}",
            }
        )
    return results


def _slowest(points: list[Point]) -> str:
    """The products of least ratio to cuBLAS, marked as by `_mark`."""
    return "\n".join(
        f"{p.ratio:.3f}{_mark(p)} {p.model} {p.layer} {p.shape} "
        + ", ".join(f"{name} {time:.1f}" for name, time in p.us.items())
        + " us"
        for p in sorted(points, key=lambda point: point.ratio)[:12]
    )


if __name__ == "__main__":
    main()
