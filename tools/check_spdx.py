# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""Check that source files start with vLLM's two-line licence header."""

import sys
from pathlib import Path

HEADER = (
    "SPDX-License-Identifier: Apache-2.0",
    "SPDX-FileCopyrightText: Copyright contributors to the vLLM project",
)


def has_header(text: str) -> bool:
    """Say whether ``text`` starts with the header, after a ``#!`` line if any."""
    lines = text.split("\n")
    if lines[0].startswith("#!"):
        lines.pop(0)
    return tuple(line.lstrip("#/ ") for line in lines[:2]) == HEADER


def main(names: list[str]) -> int:
    """Check the files; return 1 and name them if any lacks the header."""
    bad = [name for name in names if not has_header(Path(name).read_text())]
    for name in bad:
        header = "\n".join(f"# {line}" for line in HEADER)
        print(f"{name}: does not start with these lines (// in C++):\n{header}")
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
