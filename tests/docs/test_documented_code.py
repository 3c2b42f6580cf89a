# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""The Python code of README and guides runs, each page as one script."""

import ast
import os
import re
from pathlib import Path

import pytest

from tests.forks import run_python

ROOT = Path(__file__).parents[2]
PAGES = [
    "README.md",
    *sorted(str(p.relative_to(ROOT)) for p in ROOT.glob("docs/**/*.md")),
]
# These share a folder, as for a reader who goes through them: the first writes the file
# that the others import.
GUIDE = [
    f"docs/guide/{name}.md"
    for name in ("write_a_model", "train", "serve", "shard", "reinforcement_learning")
]
CODE = re.compile(r'```python(?: title="(\w+\.py)")?\n(.*?)```', re.DOTALL)
OTHERS = [
    page
    for page in PAGES
    if page not in GUIDE and CODE.search((ROOT / page).read_text())
]
# What fits into the column of the documentation.
COLUMNS = 80


def script_of(page: str) -> tuple[str, str]:
    """Name and text of a page's Python blocks. What starts it goes to the end."""
    blocks = CODE.findall((ROOT / page).read_text())
    code = "\n".join(text for _, text in blocks)
    start = 'if __name__ == "__main__":\n    main()\n'
    code = code.replace(start, "") + (start if start in code else "")
    return blocks[0][0] or "page.py", code


def run_page(page: str, folder: Path) -> None:
    """As a user would run it, with engine processes, but without compilation."""
    name, code = script_of(page)
    (folder / name).write_text(code)
    done = run_python(
        [folder / name],
        timeout=300,
        cwd=folder,
        env=os.environ
        | {
            "VLLM_ENABLE_V1_MULTIPROCESSING": "1",
            "VLLM_CPU_OMP_THREADS_BIND": "nobind",
            "OMP_NUM_THREADS": "1",
            "TORCH_COMPILE_DISABLE": "1",
        },
    )
    output = f"{done.stdout[-2000:]}\n{done.stderr[-4000:]}"
    assert done.returncode == 0, f"{page}:\n{output}"


@pytest.mark.parametrize("page", OTHERS)
def test_the_page_runs(page, tmp_path):
    run_page(page, tmp_path)


def test_the_guide_runs(tmp_path):
    for page in GUIDE:
        run_page(page, tmp_path)


@pytest.mark.parametrize("page", PAGES)
def test_code_fits_its_column(page):
    blocks = re.findall(r"```.*?```", (ROOT / page).read_text(), re.DOTALL)
    lines = [line for block in blocks for line in block.splitlines()]
    assert [line for line in lines if len(line) > COLUMNS] == []


@pytest.mark.parametrize("page", PAGES)
def test_files_that_the_page_names_exist(page):
    names = re.findall(
        r"`((?:examples|benchmarks|tests|tools|vllm|csrc|patches)/[\w./-]+\.\w+)`",
        (ROOT / page).read_text(),
    )
    assert [name for name in names if not (ROOT / name).exists()] == []


@pytest.mark.parametrize(
    ("package", "page"),
    [
        ("vllm/training", "training"),
        ("vllm/training/parity", "training"),
        ("vllm/model_executor/layers/training", "layers"),
        ("vllm/model_executor/models/builder", "builders"),
    ],
)
def test_the_api_reference_has_every_exported_name(package, page):
    source = ast.parse((ROOT / package / "__init__.py").read_text())
    (exported,) = (
        ast.literal_eval(node.value)
        for node in source.body
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "__all__"
    )
    text = (ROOT / f"docs/api/{page}.md").read_text()
    assert {name for name in exported if not re.search(rf"\b{name}\n", text)} == set()
