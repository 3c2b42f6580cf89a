# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""Measure the training layers against their peers on this machine.

Writes the record `layers.json` and its tables, `layers.md`, to `build/bench`. Run it on
an idle machine.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "common"))

import attention
import fused_ops
import logprobs
import tables
import torch
import training_step
from measure import Result
from record import write_record

from vllm.model_executor.checkpoint.files import whole_file

BENCHMARKS = {
    "attention": attention,
    "fused_ops": fused_ops,
    "logprobs": logprobs,
    "training_step": training_step,
}


def main() -> None:
    """Run the chosen benchmarks and write what they measured."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", nargs="+", choices=BENCHMARKS, default=BENCHMARKS)
    parser.add_argument("--out", type=Path, default=Path("build/bench"))
    args = parser.parse_args()

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    results: list[Result] = []
    for name in args.only:
        for result in BENCHMARKS[name].run(device):
            print(_line(result), flush=True)
            results.append(result)
    path = args.out / "layers.json"
    write_record(path, device, results=[result.as_dict() for result in results])
    with whole_file(args.out / "layers.md") as temporary:
        temporary.write_text(tables.section(json.loads(path.read_text())))


def _line(result: Result) -> str:
    peers = ", ".join(
        f"{value / result.ours:.2f}× {name}{_verdict(result, name)}"
        for name, value in result.peers.items()
    )
    return f"{result.group}: {result.case}: {result.ours:.4g} {result.unit}; {peers}"


def _verdict(result: Result, peer: str) -> str:
    if peer not in result.target:
        return ""
    wanted = result.target[peer]
    met = "met" if result.ratios[peer] >= wanted else "missed"
    return f" (target {wanted:.2f}, {met})"


if __name__ == "__main__":
    main()
