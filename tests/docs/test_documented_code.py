# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""The Python code of README and guides runs, each page as one script."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PAGES = [
    "README.md",
    *sorted(str(p.relative_to(ROOT)) for p in ROOT.glob("docs/**/*.md")),
]
WITH_CODE = [page for page in PAGES if "```python\n" in (ROOT / page).read_text()]


def script_of(page: str) -> str:
    """A page's Python blocks in order; what starts the script goes to the end."""
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / page).read_text(), re.DOTALL)
    code = "\n".join(blocks)
    start = 'if __name__ == "__main__":\n    main()\n'
    return code.replace(start, "") + (start if start in code else "")


def test_the_guides_have_code():
    assert {"README.md", "docs/guide/bring_your_own_model.md"} <= set(WITH_CODE)


@pytest.mark.parametrize("page", WITH_CODE)
def test_the_page_runs(page, tmp_path):
    """As a user would run it, with engine processes, but without compilation."""
    script = tmp_path / "page.py"
    script.write_text(script_of(page))
    done = subprocess.run(
        [sys.executable, str(script)],
        cwd=tmp_path,
        env=os.environ
        | {
            "VLLM_ENABLE_V1_MULTIPROCESSING": "1",
            "VLLM_CPU_OMP_THREADS_BIND": "nobind",
            "OMP_NUM_THREADS": "1",
            "TORCH_COMPILE_DISABLE": "1",
        },
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, f"{done.stdout[-2000:]}\n{done.stderr[-4000:]}"
