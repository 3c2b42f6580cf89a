# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""Measure the training layers against their peers on this machine.

Writes one JSON file a benchmark and a table of all to `build/bench`; with
`--report FILE` the table also replaces this kind of hardware's part of a document.
Run it on an idle machine.
"""

from __future__ import annotations

import argparse
import datetime
import sys
from collections.abc import Iterable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "common"))

import attention
import fused_ops
import logprobs
import torch
import training_step
from environment import environment
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
    parser.add_argument("--report", type=Path, help="document to update")
    args = parser.parse_args()
    if args.report is not None and set(args.only) != set(BENCHMARKS):
        parser.error("--report is for all benchmarks; leave --only out")

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    args.out.mkdir(parents=True, exist_ok=True)
    machine = environment(device)
    today = datetime.date.today().isoformat()
    results: list[Result] = []
    for name in args.only:
        found = []
        for result in BENCHMARKS[name].run(device):
            print(_line(result), flush=True)
            found.append(result)
        measured = [result.as_dict() for result in found]
        write_record(args.out / f"{name}.json", device, results=measured)
        results += found
    heading = f"## {'GPU' if device.type == 'cuda' else 'CPU'}"
    versions = ", ".join(f"{k} {v}" for k, v in machine.items() if k != "hardware")
    text = f"{heading}\n\n{machine['hardware']}; {versions}; {today}.\n\n"
    text += _tables(results)
    _write(args.out / "table.md", text)
    if args.report is not None:
        _write(args.report, _replace(args.report.read_text(), heading, text))


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


def _tables(results: Iterable[Result]) -> str:
    groups: dict[str, list[Result]] = {}
    for result in results:
        groups.setdefault(result.group, []).append(result)
    text = ""
    for group, members in groups.items():
        text += f"### {group}\n\n| case | ours | peer / ours | |\n|---|---|---|---|\n"
        for result in members:
            peers = "<br>".join(
                f"{ratio:.2f} {name}{_verdict(result, name)}"
                for name, ratio in result.ratios.items()
            )
            ours = f"{result.ours:.4g} {result.unit}"
            text += f"| {result.case} | {ours} | {peers} | {result.note} |\n"
        text += "\n"
    return text


def _replace(document: str, heading: str, text: str) -> str:
    """Put a section in the place of the one with the same heading."""
    before, found, rest = document.partition(f"{heading}\n")
    if not found:
        return f"{document.rstrip()}\n\n{text.rstrip()}\n"
    _, next_heading, after = rest.partition("\n## ")
    return f"{before}{text.rstrip()}\n{next_heading}{after}"


def _write(path: Path, text: str) -> None:
    with whole_file(path) as temporary:
        temporary.write_text(text)


if __name__ == "__main__":
    main()
