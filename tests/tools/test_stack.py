# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""The stack of commits for vLLM: what each has, and the words in what it ships."""

import re
import shutil
from importlib.util import find_spec
from pathlib import Path

import pytest

from vllm_overlay.common import CHECKOUT, OverlayError
from vllm_overlay.imports import fill_packages, unresolved
from vllm_overlay.series import load_series
from vllm_overlay.stack import Commit, Stack, candidates, load_stack

# What only this repository has.
OUR_TOOLS = re.compile(
    r"overlay\.py|RFC\.md|\bmake [a-z]+(-[a-z]+)?`|make setup|overlay"
)


@pytest.fixture(scope="module")
def stack() -> Stack:
    return load_stack(CHECKOUT, load_series(CHECKOUT / "patches"))


@pytest.fixture(scope="module")
def commits(stack: Stack) -> list[tuple[Commit, list[str]]]:
    return list(zip(stack.commits, stack.assign(candidates(CHECKOUT))))


def test_a_commit_imports_only_what_is_there(
    commits: list[tuple[Commit, list[str]]], tmp_path: Path
) -> None:
    ours = candidates(CHECKOUT)
    (site,) = map(Path, find_spec("vllm").submodule_search_locations)
    tree = {f"vllm/{file.relative_to(site)}": file for file in site.rglob("*.py")}
    tree = {path: file for path, file in tree.items() if path not in ours}
    for commit, paths in commits:
        for path in paths:
            tree[path] = ours[path]
            if path.endswith("/__init__.py"):
                tree[path] = tmp_path / path.replace("/", ".")
                shutil.copy(ours[path], tree[path])
        missing = unresolved(tree, [*paths, *fill_packages(tree, ours)])
        assert not missing, f"{commit.subject or commit.patch}: {missing}"
    for path in filter(ours.__contains__, tree):
        assert tree[path].read_bytes() == ours[path].read_bytes(), path


def test_no_word_of_our_tools_is_shipped(
    commits: list[tuple[Commit, list[str]]],
) -> None:
    for _, paths in commits:
        for path in paths:
            text = (CHECKOUT / path).read_text(encoding="utf-8")
            assert not (found := OUR_TOOLS.search(text)), f"{path}: {found[0]}"


def test_a_file_belongs_to_the_longest_pattern() -> None:
    commits = Commit("a", files=("vllm/", "tests/a*")), Commit("b", files=("vllm/b/",))
    paths = ["tests/a/b.py", "tests/tools/c.py", "vllm/a.py", "vllm/b/c.py"]
    first, second = Stack(commits, ("tests/tools/",)).assign(paths)
    assert first == ["tests/a/b.py", "vllm/a.py"] and second == ["vllm/b/c.py"]


@pytest.mark.parametrize(
    "files, message",
    [
        (("vllm/",), r"vllm/a\.py is in 2 commits"),
        (("csrc/",), "csrc/ is for no file"),
        ((), r"docs/a\.md is in 0 commits"),
    ],
)
def test_a_table_that_is_not_right(files: tuple[str, ...], message: str) -> None:
    paths = ["vllm/a.py"] if files else ["vllm/a.py", "docs/a.md"]
    stack = Stack((Commit("a", files=("vllm/",)), Commit("b", files=files)), ())
    with pytest.raises(OverlayError, match=message):
        stack.assign(paths)


@pytest.mark.parametrize("folder", sorted(CHECKOUT.glob("patches/*/base")), ids=str)
def test_another_release_pins_what_is_patched(folder: Path) -> None:
    _, *lines = folder.read_text(encoding="utf-8").splitlines()
    built = {"CMakeLists.txt", "setup.py"}
    assert {line.split()[1] for line in lines} == built | set(
        load_series(CHECKOUT / "patches").pins()
    )
