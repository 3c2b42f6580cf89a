# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""The table of equalities."""

import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch

from vllm.model_executor.checkpoint.files import whole_file


@dataclass(frozen=True)
class Row:
    """One equality of one model.

    Attributes:
        name: which, beginning with its letter in the numerics contract.
        model: of `models.CONFIGS`.
        dtype: such as "float32".
        tokens: how many were compared.
        equal: how many of them are equal bit for bit.
        max_abs_diff: the largest difference; infinite for NaN.
    """

    name: str
    model: str
    dtype: str
    tokens: int
    equal: int
    max_abs_diff: float


@dataclass
class Report:
    """Rows in the order they were found."""

    rows: list[Row] = field(default_factory=list)

    def add(
        self,
        row: tuple[str, str, str],
        found: Sequence[torch.Tensor],
        expected: Sequence[torch.Tensor],
    ) -> None:
        """Compare and note values of each request.

        Args:
            row: name, model and dtype.
            found: of each request a tensor, shape = [tokens] or [tokens, vocab_size].
            expected: the same.

        Raises:
            AssertionError: they differ; names the first difference.
        """
        what = " / ".join(row)
        assert [x.shape for x in found] == [x.shape for x in expected], what
        assert [x.dtype for x in found] == [x.dtype for x in expected], what
        tokens = equal = 0
        largest, first = 0.0, ""
        for request, (a, b) in enumerate(zip(found, expected)):
            same = a == b
            tokens += len(a)
            equal += int(same.reshape(len(a), -1).all(1).sum()) if len(a) else 0
            if torch.equal(a, b):
                continue
            gap = torch.where(same, 0.0, (a.double() - b.double()).abs())
            largest = max(largest, gap.nan_to_num(math.inf, math.inf).max().item())
            if not first:
                place = tuple(int(i) for i in (~same).nonzero()[0])
                first = (
                    f"first in request {request} of {len(found)} at {place} of "
                    f"{tuple(a.shape)}: {a[place].item()!r} and {b[place].item()!r}"
                )
        assert tokens, f"{what}: there is nothing to compare"
        self.rows.append(Row(*row, tokens, equal, largest))
        assert not first, f"{what}: {equal} of {tokens} tokens are equal; {first}"

    def write(self, directory: Path) -> None:
        """`report.json`, whole or not at all."""
        rows = [asdict(row) for row in self.rows]
        for row in rows:
            if math.isinf(row["max_abs_diff"]):
                row["max_abs_diff"] = "inf"
        all_equal = all(row.equal == row.tokens for row in self.rows)
        directory.mkdir(parents=True, exist_ok=True)
        with whole_file(directory / "report.json") as path:
            report = {"rows": rows, "all_equal": bool(rows) and all_equal}
            path.write_text(json.dumps(report, indent=2) + "\n")

    def table(self) -> str:
        width = max(len("equality"), *(len(row.name) for row in self.rows))
        head = f"{'equality':{width}}  model      dtype      tokens    equal"
        lines = [f"{head}  max |difference|"]
        for row in self.rows:
            mark = "" if row.equal == row.tokens else "  DIFFERENT"
            lines.append(
                f"{row.name:{width}}  {row.model:9}  {row.dtype:8}  {row.tokens:7}  "
                f"{row.equal:7}  {row.max_abs_diff:16.2e}{mark}"
            )
        return "\n".join(lines)
