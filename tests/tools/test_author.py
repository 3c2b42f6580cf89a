# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""Editing the series as commits."""

import subprocess
from pathlib import Path

import pytest

from vllm_overlay.author import save, start_edit
from vllm_overlay.base import BaseWheel
from vllm_overlay.common import OverlayError
from vllm_overlay.series import load_series

REGISTRY = "vllm/models/registry.py"
REASONS = "Why: w\n\nWhy not an extension point: n\n\nUnnecessary when: u"


@pytest.fixture
def base(base_wheel: Path) -> BaseWheel:
    return BaseWheel(base_wheel)


@pytest.fixture
def patches(checkout: Path) -> Path:
    return checkout / "patches"


@pytest.fixture
def tree(tmp_path: Path, base: BaseWheel, patches: Path) -> Path:
    """The series as commits."""
    folder = tmp_path / "build/tree"
    start_edit(base, patches, folder)
    return folder


def read(patches: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in patches.iterdir()}


def git(tree: Path, *arguments: str) -> str:
    command = ["git", "-c", "user.name=n", "-c", "user.email=e@localhost", *arguments]
    return subprocess.check_output(command, cwd=tree, text=True)


def commit(tree: Path, message: str = f"More: six\n\n{REASONS}") -> None:
    git(tree, "add", "--all")
    git(tree, "commit", "--quiet", "--allow-empty", "--message", message)


def test_a_patch_is_a_commit(
    tree: Path, base: BaseWheel, patched: dict[str, bytes]
) -> None:
    subjects = git(tree, "log", "--format=%s", "pristine..").splitlines()
    assert subjects == ["Config: more", "Registry: one more"]
    for path, data in patched.items():
        assert (tree / path).read_bytes() == data
        assert git(tree, "show", f"pristine:{path}").encode() == base.read(path)


def test_saving_changes_nothing(tree: Path, patches: Path) -> None:
    before = read(patches)
    save(tree, patches)
    assert read(patches) == before


def test_a_commit_becomes_a_patch(
    tree: Path, patches: Path, base: BaseWheel, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = read(patches)
    # The settings of who edits do not matter.
    (tree.parent / "gitconfig").write_text("[diff]\nnoprefix = true\n")
    monkeypatch.setenv("GIT_CONFIG_GLOBAL", str(tree.parent / "gitconfig"))
    with (tree / REGISTRY).open("a") as stream:
        stream.write("six\n")
    subject = "More: " + "a long subject, " * 4 + "to be cut"
    commit(tree, f"{subject}\n\n{REASONS}")
    save(tree, patches)
    name = "0003-More-a-long-subject-a-long-subject-a-long-subject-a-.patch"
    assert read(patches).keys() - before.keys() == {name}
    assert (patches / name).read_text().startswith(f"Subject: {subject}\n\nWhy: w\n")
    series = load_series(patches)
    pristine = {path: base.read(path) for path in series.pins()}
    assert series.apply(pristine)[REGISTRY].endswith(b"five\nsix\n")


def test_a_dropped_commit_drops_its_patch(tree: Path, patches: Path) -> None:
    git(tree, "reset", "--quiet", "--hard", "HEAD^")
    save(tree, patches)
    assert list(read(patches)) == ["0001-Registry-one-more.patch"]


def test_an_edit_by_hand_is_mended(
    tmp_path: Path, patches: Path, base: BaseWheel
) -> None:
    for path in patches.iterdir():
        path.write_text(path.read_text().replace("two_and_a_half", "2.5"))
    start_edit(base, patches, tmp_path / "tree")
    save(tmp_path / "tree", patches)
    series = load_series(patches)
    pristine = {path: base.read(path) for path in series.pins()}
    assert b"\n2.5\n" in series.apply(pristine)[REGISTRY]


@pytest.mark.parametrize(
    "path, text, message, problem",
    [
        (REGISTRY, "one\nthree\nfour\nfive\n", REASONS, "only adds lines"),
        ("vllm/new.py", "new\n", REASONS, "new files are not patched in"),
        ("setup.py", "new\n", REASONS, "below vllm/"),
        ("vllm/_version.py", "x\n__version__ = version = '0.32.0'\n", REASONS, "never"),
        (REGISTRY, "zero\none\n", "no reasons", "lacks Why, Why not"),
        (None, "", REASONS, "changes existing files"),
    ],
)
def test_bad_commits_write_nothing(
    tree: Path, patches: Path, path: str | None, text: str, message: str, problem: str
) -> None:
    before = read(patches)
    if path:
        git(tree, "reset", "--quiet", "--hard", "pristine")
        (tree / path).write_text(text)
    commit(tree, f"Subject\n\n{message}")
    with pytest.raises(OverlayError, match=problem):
        save(tree, patches)
    assert read(patches) == before


def test_uncommitted_changes_are_named(tree: Path, patches: Path) -> None:
    (tree / REGISTRY).write_text("")
    (tree / "vllm/new.py").write_text("")
    with pytest.raises(OverlayError, match=rf"(?s)M {REGISTRY}.*\? vllm/new.py"):
        save(tree, patches)


def test_editing_overwrites_nothing(tree: Path, patches: Path, base: BaseWheel) -> None:
    with pytest.raises(OverlayError, match="tree exists"):
        start_edit(base, patches, tree)


def test_a_patch_that_does_not_apply_leaves_nothing(
    tmp_path: Path, patches: Path, base: BaseWheel
) -> None:
    patch = patches / "0002-Config-more.patch"
    patch.write_text(patch.read_text().replace(" two_and_a_half", " 2.5"))
    with pytest.raises(OverlayError, match="registry.py: patch does not apply"):
        start_edit(base, patches, tmp_path / "tree")
    assert not (tmp_path / "tree").exists()
