# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""What became of each module of an adopted model, as a table."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import NamedTuple


class Row(NamedTuple):
    """One module.

    Attributes:
        path: Where it is.
        before: Its class.
        after: The class of the layer in its place; "" where it was left.
        note: Why it was left, or what that means.
    """

    path: str
    before: str
    after: str
    note: str = ""


def table(rows: Iterable[Row]) -> str:
    """The rows as text; modules that differ only in a number share a line."""
    groups: dict[Row, int] = {}
    for row in rows:
        key = row._replace(path=re.sub(r"(?<=\.)\d+(?=\.|$)", "*", row.path))
        groups[key] = groups.get(key, 0) + 1
    cells = [("module", "", "was", "is", "")] + [
        (row.path, f"{count}x", row.before, row.after or "unchanged", row.note)
        for row, count in groups.items()
    ]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    lines = (
        "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True))
        for line in cells
    )
    return "\n".join(line.rstrip() for line in lines)
