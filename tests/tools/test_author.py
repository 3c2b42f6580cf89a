# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""Writing patches from edited files."""

from pathlib import Path

import pytest

from vllm_overlay.author import start_edit, write_patch
from vllm_overlay.base import BaseWheel
from vllm_overlay.common import OverlayError
from vllm_overlay.series import load_series, series_names

REGISTRY = "vllm/models/registry.py"
CONFIG = "vllm/config/model.py"


@pytest.fixture
def base(base_wheel: Path) -> BaseWheel:
    return BaseWheel(base_wheel)


def test_a_new_patch_gets_a_header_to_fill_in(
    tmp_path: Path, checkout: Path, base: BaseWheel
) -> None:
    patch, tree = checkout / "patches/0003-new.patch", tmp_path / "tree"
    start_edit(base, patch, tree, [REGISTRY])
    edited = b"zero\n" + base.read(REGISTRY) + b"six\n"
    (tree / REGISTRY).write_bytes(edited)
    write_patch(base, patch, tree)
    assert series_names(checkout / "patches")[-1] == "0003-new.patch"
    with pytest.raises(OverlayError, match="lacks Subject, Why, Why not"):
        load_series(checkout / "patches")
    head, body = patch.read_text().split("Base-SHA256", 1)
    patch.write_text(head.replace(":\n", ": reason\n") + "Base-SHA256" + body)
    (checkout / "patches/series").write_text("0003-new.patch\n")
    for name in ("0001-registry.patch", "0002-both.patch"):
        (checkout / "patches" / name).unlink()
    series = load_series(checkout / "patches")
    assert series.apply(REGISTRY, base.read(REGISTRY)).data == edited


def test_editing_keeps_the_header_and_the_other_files(
    tmp_path: Path, checkout: Path, base: BaseWheel
) -> None:
    patch, tree = checkout / "patches/0002-both.patch", tmp_path / "tree"
    start_edit(base, patch, tree, [])
    assert (tree / CONFIG).read_bytes() == b"first\na\n\nb\nc\nlast\n"
    (tree / CONFIG).unlink()
    with (tree / REGISTRY).open("a") as stream:
        stream.write("more\n")
    header = patch.read_text().split("Base-SHA256")[0]
    write_patch(base, patch, tree)
    assert patch.read_text().split("Base-SHA256")[0] == header
    assert series_names(checkout / "patches").count("0002-both.patch") == 1
    series = load_series(checkout / "patches")
    assert series.apply(CONFIG, base.read(CONFIG)).data == b"first\na\n\nb\nc\nlast\n"
    assert series.apply(REGISTRY, base.read(REGISTRY)).data.endswith(b"five\nmore\n")


def test_writing_again_changes_nothing(
    tmp_path: Path, checkout: Path, base: BaseWheel
) -> None:
    patch, tree = checkout / "patches/0002-both.patch", tmp_path / "tree"
    start_edit(base, patch, tree, [])
    write_patch(base, patch, tree)
    first = patch.read_text()
    write_patch(base, patch, tree)
    assert patch.read_text() == first


def test_a_file_without_edits_leaves_the_patch(
    tmp_path: Path, checkout: Path, base: BaseWheel
) -> None:
    patch, tree = checkout / "patches/0002-both.patch", tmp_path / "tree"
    start_edit(base, patch, tree, [])
    (tree / CONFIG).write_bytes(base.read(CONFIG))
    write_patch(base, patch, tree)
    assert CONFIG not in patch.read_text()


@pytest.mark.parametrize(
    "edited, message",
    [
        (b"one\nthree\nfour\nfive\n", "line 2: 'two'"),
        (b"one\nTWO\nthree\nfour\nfive\nsix\n", "only add lines"),
    ],
)
def test_refuses_edits_that_do_not_only_add(
    tmp_path: Path, checkout: Path, base: BaseWheel, edited: bytes, message: str
) -> None:
    patch, tree = checkout / "patches/0001-registry.patch", tmp_path / "tree"
    start_edit(base, patch, tree, [])
    before = patch.read_text()
    (tree / REGISTRY).write_bytes(edited)
    with pytest.raises(OverlayError, match=message):
        write_patch(base, patch, tree)
    assert patch.read_text() == before


def test_refuses_new_files_and_empty_trees(
    tmp_path: Path, checkout: Path, base: BaseWheel
) -> None:
    patch, tree = checkout / "patches/0003-new.patch", tmp_path / "tree"
    with pytest.raises(OverlayError, match="no edited file"):
        write_patch(base, patch, tree)
    (tree / "vllm").mkdir(parents=True)
    (tree / "vllm/new.py").write_text("new\n")
    with pytest.raises(OverlayError, match="vllm/new.py is not in the base"):
        write_patch(base, patch, tree)
    assert not patch.exists()


def test_edit_overwrites_nothing(
    tmp_path: Path, checkout: Path, base: BaseWheel
) -> None:
    patch, tree = checkout / "patches/0001-registry.patch", tmp_path / "tree"
    start_edit(base, patch, tree, [])
    with pytest.raises(OverlayError, match="registry.py exists"):
        start_edit(base, patch, tree, [])
