# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""The export to vLLM's source tree, and that `git am` reproduces it."""

import io
import shutil
import subprocess
import tarfile
from pathlib import Path

import pytest

from vllm_overlay import upstream
from vllm_overlay.common import OverlayError, blob_id, sha256_file

TABLE = """\
here = ["docs/index.md", "tests/tools/"]

[[commit]]
subject = "Layers"
why = "They have a backward."
files = ["vllm/training/", "csrc/", "tests/test_layers.py"]

[[commit]]
patch = "0001"

[[commit]]
patch = "0002"
files = ["vllm/models/builder.py", "tests/mixed.txt"]

[[commit]]
subject = "More layers"
files = ["vllm/training/ops/", "docs/", ".buildkite/"]
"""
PACKAGE = """\
from vllm.config import model
from vllm.training.ops.norm import (
    NORM,
)
from .other import OTHER

__all__ = [
    "NORM",
    "OTHER",
    "model",
]
"""


@pytest.fixture
def source(tmp_path: Path, site: Path) -> Path:
    """A source tree as in a source distribution, with what git treats specially."""
    folder = tmp_path / "vllm-0.32.0"
    folder.mkdir()
    (site / "vllm").rename(folder / "vllm")
    (folder / ".gitignore").write_text("_version.py\n*.so\n")
    (folder / ".gitattributes").write_text("*.txt text\n")
    (folder / "crlf.txt").write_bytes(b"a\r\nb\r\n")
    (folder / "run.sh").write_text("#!/bin/sh\n")
    (folder / "run.sh").chmod(0o755)
    (folder / "link").symlink_to("run.sh")
    (folder / "vllm/config/__init__.py").touch()
    return folder


@pytest.fixture(autouse=True)
def no_identity(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GIT_CONFIG_GLOBAL", "/dev/null")
    monkeypatch.setenv("GIT_CONFIG_SYSTEM", "/dev/null")


@pytest.fixture
def checkout(checkout: Path) -> Path:
    """A checkout with the table of a stack, tests, docs and files that stay there."""
    files = {
        "patches/upstream/stack.toml": TABLE,
        "patches/upstream/cover.md": "Training in vLLM\n\nWhat it is for.\n",
        "vllm/training/__init__.py": PACKAGE,
        "vllm/training/other.py": "OTHER = 1\n",
        "tests/test_layers.py": "import vllm.training.other\n",
        "tests/tools/test_overlay.py": "",
        "docs/training/builders.md": "",
        "docs/index.md": "",
        ".buildkite/test_areas/training.yaml": "group: Training\n",
    }
    for path, text in files.items():
        (checkout / path).parent.mkdir(parents=True, exist_ok=True)
        (checkout / path).write_text(text)
    (checkout / "docs/picture.png").write_bytes(bytes(range(256)))
    (checkout / "tests/mixed.txt").write_bytes(b"From x\r\n--- a\n+++ b\n")
    return checkout


def git(folder: Path, *arguments: str | Path) -> str:
    command = ["git", *map(str, arguments)]
    return subprocess.check_output(command, cwd=folder, text=True).strip()


def edit_table(checkout: Path, old: str, new: str) -> None:
    path = checkout / "patches/upstream/stack.toml"
    assert old in (text := path.read_text())
    path.write_text(text.replace(old, new))


def test_the_patches_reproduce_the_branch(
    tmp_path: Path, source: Path, checkout: Path, patched: dict[str, bytes]
) -> None:
    out = tmp_path / "out"
    assert "not signed off" in upstream.export(str(source), out, checkout)
    repository = out / "vllm"
    subjects = git(repository, "log", "--reverse", "--format=%s", "training")
    assert subjects.split("\n") == [
        "vLLM 0.32.0",
        "Layers",
        "Registry: one more",
        "Config: more",
        "More layers",
    ]
    files = set(git(repository, "ls-files").split("\n"))
    assert {"vllm/_version.py", "vllm/_C.abi3.so", "csrc/training/kernels.cpp"} <= files
    assert {"tests/test_layers.py", "docs/picture.png"} <= files
    assert not files & {"tests/tools/test_overlay.py", "docs/index.md", "base.lock"}
    for path, data in patched.items():
        assert (repository / path).read_bytes() == data
    changed = git(repository, "diff", "--name-only", "training~2", "training~1")
    assert changed.split("\n") == [
        "tests/mixed.txt",
        "vllm/config/model.py",
        "vllm/models/builder.py",
        "vllm/models/registry.py",
    ]

    clone = tmp_path / "clone"
    git(tmp_path, "clone", "-q", "-b", "pristine", repository, clone)
    git(clone, "config", "user.name", "n")
    git(clone, "config", "user.email", "e@localhost")
    cover, *patches = sorted((out / "patches").glob("*.patch"))
    assert len(patches) == 4
    git(clone, "am", "-q", "--keep-cr", *patches)
    tree = "HEAD^{tree}"
    assert git(clone, "rev-parse", tree) == git(repository, "rev-parse", tree)
    letter = cover.read_text()
    assert "Subject: [PATCH 0/4] Training in vLLM\n" in letter
    assert "\nWhat it is for.\n\nfiles  lines  commit\n" in letter
    assert "\n    1      1  Registry: one more\n" in letter


def test_messages_have_the_reasons(
    tmp_path: Path, source: Path, checkout: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = tmp_path / "gitconfig"
    config.write_text("[user]\nname = Some One\nemail = one@localhost\n")
    monkeypatch.setenv("GIT_CONFIG_GLOBAL", str(config))
    assert "not signed off" not in upstream.export(
        str(source), tmp_path / "out", checkout
    )
    show = ("show", "--no-patch", "--format=%an <%ae>%n%B")
    registry = git(tmp_path / "out/vllm", *show, "training~2")
    assert registry.startswith(
        "Some One <one@localhost>\nRegistry: one more\n\nWhy: for the test"
    )
    assert "Unnecessary when: never\n\nSigned-off-by: Some One <one@" in registry
    assert git(tmp_path / "out/vllm", *show, "training~3").endswith(
        "Layers\n\nThey have a backward.\n\nSigned-off-by: Some One <one@localhost>"
    )


def test_a_package_grows_with_its_modules(
    tmp_path: Path, source: Path, checkout: Path
) -> None:
    upstream.export(str(source), tmp_path / "out", checkout)
    package = "vllm/training/__init__.py"
    first = git(tmp_path / "out/vllm", "show", f"training~1:{package}")
    assert first == (
        "from vllm.config import model\nfrom .other import OTHER\n\n"
        '__all__ = [\n    "OTHER",\n    "model",\n]'
    )
    assert (tmp_path / "out/vllm" / package).read_text() == PACKAGE


def test_an_import_of_what_comes_later_is_refused(
    tmp_path: Path, source: Path, checkout: Path
) -> None:
    (checkout / "tests/test_layers.py").write_text(
        "def test():\n    from vllm.models import builder\n"
    )
    with pytest.raises(OverlayError) as caught:
        upstream.export(str(source), tmp_path / "out", checkout)
    assert "the commit 'Layers' imports what comes later" in str(caught.value)
    assert "tests/test_layers.py:2: vllm.models.builder" in str(caught.value)


def test_every_patch_has_a_commit(tmp_path: Path, source: Path, checkout: Path) -> None:
    edit_table(checkout, 'patch = "0001"', 'subject = "None"')
    with pytest.raises(OverlayError, match="has the patches 0002, .* has 0001, 0002"):
        upstream.export(str(source), tmp_path / "out", checkout)


def test_the_source_distribution_is_unpacked(
    tmp_path: Path, source: Path, checkout: Path
) -> None:
    archive = checkout / "build/base/vllm-0.32.0.tar.gz"
    archive.parent.mkdir(parents=True)
    with tarfile.open(archive, "w:gz") as tar:
        tar.add(source, "vllm-0.32.0")
        tar.addfile(tarfile.TarInfo("vllm-0.32.0/empty"), io.BytesIO())
    lock = (checkout / "base.lock").read_text().split("[source]")[0]
    (checkout / "base.lock").write_text(
        f'{lock}[source]\nrequirement = "vllm==0.32.0"\n'
        f'file = "{archive.name}"\nsha256 = "{sha256_file(archive)}"\n'
    )
    upstream.export("sdist", tmp_path / "out", checkout)
    assert (tmp_path / "out/vllm/empty").exists()


@pytest.fixture
def newer(source: Path, checkout: Path) -> Path:
    """The source tree of another release, and the checkout's folder for it."""
    path = source / "vllm/models/registry.py"
    path.write_bytes(b"zero\n" + path.read_bytes())
    folder = checkout / "patches/0.33.0"
    folder.mkdir()
    paths = ("vllm/config/model.py", "vllm/models/registry.py")
    pins = [f"{blob_id((source / path).read_bytes())} {path}\n" for path in paths]
    (folder / "base").write_text("# ids\n" + "".join(pins))
    return source


@pytest.mark.usefixtures("fetched")
def test_another_release(tmp_path: Path, newer: Path, checkout: Path) -> None:
    done = upstream.export(str(newer), tmp_path / "out", checkout, "0.33.0")
    assert "on vLLM 0.33.0, 4 commits" in done
    registry = (tmp_path / "out/vllm/vllm/models/registry.py").read_text()
    assert registry.startswith(
        "zero\none\ntwo\ntwo_and_a_half\ntwo_and_three_quarters\n"
    )
    with pytest.raises(OverlayError, match=r"vLLM 0\.34\.0 is not known"):
        upstream.export(str(newer), tmp_path / "other", checkout, "0.34.0")


@pytest.mark.usefixtures("fetched")
def test_what_differs_for_another_release(
    tmp_path: Path, newer: Path, checkout: Path
) -> None:
    """Where a merge puts a line is known; a place that only looks alike is refused."""
    path = newer / "vllm/models/registry.py"
    path.write_bytes(b"one\n2\n3\nfour\nfive\ntwo\nthree\n")
    base = checkout / "patches/0.33.0/base"
    lines = base.read_text().split("\n")
    lines[2] = f"{blob_id(path.read_bytes())} vllm/models/registry.py"
    base.write_text("\n".join(lines))
    with pytest.raises(OverlayError, match="at other places than a merge") as caught:
        upstream.export(str(newer), tmp_path / "out", checkout, "0.33.0")
    assert "vllm/models/registry.py is" in str(caught.value)
    assert str(checkout / "patches/0.33.0") in str(caught.value)


def test_collisions_are_named(tmp_path: Path, source: Path, checkout: Path) -> None:
    for path in ("tests/test_layers.py", "docs/picture.png"):
        (source / path).parent.mkdir(exist_ok=True)
        (source / path).write_text("")
    with pytest.raises(OverlayError) as caught:
        upstream.export(str(source), tmp_path / "out", checkout)
    assert "tests/test_layers.py" in str(caught.value)
    assert "docs/picture.png" in str(caught.value)
    assert not (tmp_path / "out").exists()


def test_another_source_tree_is_refused(
    tmp_path: Path, source: Path, checkout: Path
) -> None:
    with (source / "vllm/models/registry.py").open("a") as stream:
        stream.write("changed\n")
    with pytest.raises(OverlayError, match=r"is not vLLM 0\.32\.0:\n *vllm/models/reg"):
        upstream.export(str(source), tmp_path / "out", checkout)
    shutil.rmtree(source / "vllm/models")
    with pytest.raises(OverlayError, match=r"registry\.py is nothing, not"):
        upstream.export(str(source), tmp_path / "out", checkout)


def test_a_used_folder_is_refused(tmp_path: Path, source: Path, checkout: Path) -> None:
    with pytest.raises(OverlayError, match="not empty"):
        upstream.export(str(source), tmp_path, checkout)
    with pytest.raises(OverlayError, match="has no vllm/"):
        upstream.export(str(tmp_path / "site-packages/other"), tmp_path / "o", checkout)
