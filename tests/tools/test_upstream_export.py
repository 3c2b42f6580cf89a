# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""The export to vLLM's source tree, and that `git am` reproduces it."""

import io
import subprocess
import tarfile
from pathlib import Path

import pytest

from vllm_overlay import upstream
from vllm_overlay.common import OverlayError, sha256_file


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
    return folder


@pytest.fixture(autouse=True)
def no_identity(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GIT_CONFIG_GLOBAL", "/dev/null")
    monkeypatch.setenv("GIT_CONFIG_SYSTEM", "/dev/null")


@pytest.fixture
def whole_checkout(checkout: Path) -> Path:
    """A checkout with tests, docs and files that stay here."""
    for path in (
        "tests/models/test_builder.py",
        "tests/tools/test_overlay.py",
        "docs/training/builders.md",
        "docs/index.md",
        "examples/demo.py",
        "csrc/training/cpu/norm.cpp",
        ".buildkite/test_areas/training.yaml",
    ):
        (checkout / path).parent.mkdir(parents=True, exist_ok=True)
        (checkout / path).write_text(f"{path}\n")
    (checkout / "docs/picture.png").write_bytes(bytes(range(256)))
    (checkout / "tests/mixed.txt").write_bytes(b"From x\r\n--- a\n+++ b\n")
    return checkout


def git(folder: Path, *arguments: str | Path) -> str:
    command = ["git", *map(str, arguments)]
    return subprocess.check_output(command, cwd=folder, text=True).strip()


def test_the_patches_reproduce_the_branch(
    tmp_path: Path, source: Path, whole_checkout: Path, patched: dict[str, bytes]
) -> None:
    out = tmp_path / "out"
    upstream.export(str(source), out, whole_checkout)
    repository = out / "vllm"
    subjects = git(repository, "log", "--reverse", "--format=%s", "training")
    assert subjects.split("\n") == [
        "vLLM 0.32.0",
        "Add training-aware layers and model builders",
        "Registry: one more",
        "Config: more",
        "Add tests of the training-aware layers",
        "Document and benchmark the training-aware layers",
    ]
    files = set(git(repository, "ls-files").split("\n"))
    assert {
        "vllm/_version.py",
        "vllm/_C.abi3.so",
        "csrc/training/cpu/norm.cpp",
    } <= files
    assert {"tests/models/test_builder.py", "docs/picture.png"} <= files
    assert not files & {"tests/tools/test_overlay.py", "docs/index.md", "base.lock"}
    for path, data in patched.items():
        assert (repository / path).read_bytes() == data
    changed = git(repository, "diff", "--name-only", "training~3", "training~2")
    assert changed.split("\n") == ["vllm/config/model.py", "vllm/models/registry.py"]

    clone = tmp_path / "clone"
    git(tmp_path, "clone", "-q", "-b", "pristine", repository, clone)
    git(clone, "config", "user.name", "n")
    git(clone, "config", "user.email", "e@localhost")
    patches = sorted((out / "patches").glob("*.patch"))
    assert len(patches) == 5
    git(clone, "am", "-q", "--keep-cr", *patches)
    tree = "HEAD^{tree}"
    assert git(clone, "rev-parse", tree) == git(repository, "rev-parse", tree)


def test_a_configured_identity_is_used(
    tmp_path: Path, source: Path, checkout: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = tmp_path / "gitconfig"
    config.write_text("[user]\nname = Some One\nemail = one@localhost\n")
    monkeypatch.setenv("GIT_CONFIG_GLOBAL", str(config))
    upstream.export(str(source), tmp_path / "out", checkout)
    author = git(tmp_path / "out/vllm", "log", "-1", "--format=%an <%ae>")
    assert author == "Some One <one@localhost>"


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


def test_collisions_are_named(tmp_path: Path, source: Path, checkout: Path) -> None:
    for folder in (source, checkout):
        for path in ("tests/conftest.py", "examples/demo.py"):
            (folder / path).parent.mkdir(exist_ok=True)
            (folder / path).write_text("")
    with pytest.raises(OverlayError) as caught:
        upstream.export(str(source), tmp_path / "out", checkout)
    assert "tests/conftest.py" in str(caught.value)
    assert "examples/demo.py" in str(caught.value)
    assert not (tmp_path / "out").exists()


def test_another_source_tree_is_refused(
    tmp_path: Path, source: Path, checkout: Path
) -> None:
    with (source / "vllm/models/registry.py").open("a") as stream:
        stream.write("changed\n")
    with pytest.raises(
        OverlayError, match="made for .* at vllm/models/registry.py, not"
    ):
        upstream.export(str(source), tmp_path / "out", checkout)


def test_a_used_folder_is_refused(tmp_path: Path, source: Path, checkout: Path) -> None:
    with pytest.raises(OverlayError, match="not empty"):
        upstream.export(str(source), tmp_path, checkout)
    with pytest.raises(OverlayError, match="has no vllm/"):
        upstream.export(str(tmp_path / "site-packages/other"), tmp_path / "o", checkout)
