# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""Write the tables of measurements in the documentation from `benchmarks/records`.

A page names a record in a comment. The part up to the second comment is generated:

    <!-- record: layers_h200 -->
    <!-- end of record -->

`python benchmarks/common/tables.py` writes the pages. With `--check` it changes nothing
and fails if a page differs from its records.

A new measurement replaces its record: copy the JSON file that the benchmark wrote, and
add the key `commit`, the commit that was measured.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
RECORDS = ROOT / "benchmarks" / "records"
_GENERATED = re.compile(
    r"(<!-- record: (\w+) -->\n)(.*?)(<!-- end of record -->)", re.DOTALL
)


def main() -> int:
    """Update or check every page; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--check", action="store_true", help="fail instead of writing")
    check = parser.parse_args().check
    different = []
    for page in sorted(ROOT.glob("docs/**/*.md")):
        text = page.read_text()
        updated = with_tables(text)
        if updated != text:
            different.append(str(page.relative_to(ROOT)))
            if not check:
                page.write_text(updated)
    if check and different:
        print(
            f"{', '.join(different)}: tables differ from benchmarks/records. Run "
            "python benchmarks/common/tables.py.",
            file=sys.stderr,
        )
        return 1
    return 0


def with_tables(text: str) -> str:
    """The page with each generated part made anew from its record."""
    return _GENERATED.sub(
        lambda found: f"{found[1]}\n{section(read(found[2]))}\n{found[4]}", text
    )


def read(name: str) -> dict[str, Any]:
    """The record of this name."""
    return json.loads((RECORDS / f"{name}.json").read_text())


def section(record: dict[str, Any]) -> str:
    """Where and when a record was made, its note, and a table for each group."""
    hardware, *versions = record["environment"].items()
    parts = [hardware[1], *(f"{name} {version}" for name, version in versions)]
    parts.append(record["date"])
    if "commit" in record:
        parts.append(f"commit {record['commit']}")
    text = f"{', '.join(parts)}: `{record['command']}`\n"
    if "note" in record:
        text += f"\n{record['note']}\n"
    groups: dict[str, list[dict[str, Any]]] = {}
    for result in record["results"]:
        groups.setdefault(result.get("group", ""), []).append(result)
    for group, results in groups.items():
        text += f"\n**{group}**\n" if group else ""
        text += "\n" + table(results)
    return text


def table(results: list[dict[str, Any]]) -> str:
    """A table of results of one kind, which their keys tell."""
    if "equal" in results[0]:
        columns = _COLUMNS_OF_PARITY
    elif "outcome" in results[0]:
        columns = _COLUMNS_OF_TESTS
    else:
        columns = _COLUMNS_OF_MEASUREMENTS
        results = [row for result in results for row in _by_peer(result)]
    filled = {
        title: cells
        for title, cell in columns.items()
        if any(cells := [cell(result) for result in results])
    }
    rows = [list(filled), ["---"] * len(filled), *zip(*filled.values())]
    return "".join(f"| {' | '.join(row)} |\n" for row in rows)


def _by_peer(result: dict[str, Any]) -> Iterable[dict[str, Any]]:
    """A row for each of what the result is compared with; the first has the case."""
    first = {key: result.get(key) for key in ("case", "unit", "ours", "note", "spread")}
    by_peer = {key: result.get(key, {}) for key in ("peers", "target", "rounds")}
    names = [*result.get("ratios", {})] or [""]
    for index, name in enumerate(names):
        of_peer = {key: values.get(name) for key, values in by_peer.items()}
        ratio = result.get("ratios", {}).get(name)
        unit = {"unit": result.get("unit")}
        yield (first if index == 0 else unit) | of_peer | {"peer": name, "ratio": ratio}


def _number(value: float | None, unit: str | None) -> str:
    if value is None:
        return ""
    digits = f"{value:,.0f}" if value >= 1000 else f"{value:.4g}"
    return f"{digits} {unit or ''}".strip()


def _ratio(value: float | None) -> str:
    return "" if value is None else f"{round(value, 3):g}"


def _ours(row: dict[str, Any]) -> str:
    parts = [_number(row.get("ours"), row["unit"]), row.get("note") or ""]
    return "; ".join(part for part in parts if part)


def _peer(row: dict[str, Any]) -> str:
    number = _number(row["peers"], row["unit"])
    return f"{row['peer']}: {number}" if number else row["peer"]


def _target(row: dict[str, Any]) -> str:
    if row["target"] is None:
        return ""
    return f"{row['target']:.2f} {'met' if row['ratio'] >= row['target'] else 'missed'}"


_Columns = dict[str, Callable[[dict[str, Any]], str]]
_COLUMNS_OF_MEASUREMENTS: _Columns = {
    "Case": lambda row: row.get("case") or "",
    "This project": _ours,
    "Compared with": _peer,
    "Ratio": lambda row: _ratio(row["ratio"]),
    "Target": _target,
    "Ratio of each round": lambda row: ", ".join(map(_ratio, row["rounds"] or [])),
    "Largest ratio of two starts": lambda row: _number(row.get("spread"), None),
}
_COLUMNS_OF_PARITY: _Columns = {
    "Compared": lambda row: row["case"],
    "Hardware": lambda row: row.get("hardware", ""),
    "Dtype": lambda row: row["dtype"],
    "Attention backend": lambda row: row["backend"],
    "Engine": lambda row: row["engine"],
    "Equal tokens": lambda row: f"{row['equal']:,} of {row['tokens']:,}",
}
_COLUMNS_OF_TESTS: _Columns = {
    "Date": lambda row: row["date"],
    "Tests": lambda row: row["tests"],
    "Outcome": lambda row: row["outcome"],
}


if __name__ == "__main__":
    sys.exit(main())
