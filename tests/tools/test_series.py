# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""The series: what it makes of the release's files, and which patches it refuses."""

import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from vllm_overlay.common import OverlayError, blob_id
from vllm_overlay.series import load_series

PATH = "vllm/a.py"
PRISTINE = b"one\ntwo\nthree\nfour\nfive\n"
PATCHED = b"one\ntwo\nnew\nthree\nfour\nfive\n"
HUNK = "@@ -2,2 +2,3 @@\n two\n+new\n three\n"
Write = Callable[..., None]


@pytest.fixture
def patch(tmp_path: Path, write_patch: Write) -> Path:
    """A good patch, the only one of ``patches``."""
    path = tmp_path / "patches/0001-s.patch"
    write_patch(path, "s", {PATH: (PRISTINE, PATCHED, HUNK)})
    return path


def apply(folder: Path, pristine: bytes = PRISTINE) -> bytes:
    return load_series(folder).apply({PATH: pristine})[PATH]


def replace(path: Path, old: str, new: str) -> None:
    text = path.read_bytes().decode()
    assert old in text
    path.write_bytes(text.replace(old, new).encode())


def test_a_patch_is_a_commit(patch: Path) -> None:
    (read,) = load_series(patch.parent).patches
    assert read.message == (
        "s\n\nWhy: for the test,\non two lines\n\nWhy not an extension point: there is "
        "none\n\nUnnecessary when: never\n"
    )
    assert read.files == {PATH: (blob_id(PRISTINE), blob_id(PATCHED))}


@pytest.mark.parametrize(
    "hunks, expected",
    [
        (HUNK, PATCHED),
        ("@@ -1 +1,3 @@\n+x\n+y\n one\n", b"x\ny\n" + PRISTINE),
        ("@@ -5 +5,2 @@\n five\n+x\n", PRISTINE + b"x\n"),
        (
            "@@ -1,2 +1,3 @@\n one\n+x\n two\n@@ -4,2 +5,3 @@\n four\n+y\n five\n",
            b"one\nx\ntwo\nthree\nfour\ny\nfive\n",
        ),
        (
            "@@ -1,4 +1,6 @@\n one\n+x\n two\n three\n+y\n four\n",
            b"one\nx\ntwo\nthree\ny\nfour\nfive\n",
        ),
    ],
)
def test_lines_are_added(
    patch: Path, write_patch: Write, hunks: str, expected: bytes
) -> None:
    write_patch(patch, "s", {PATH: (PRISTINE, expected, hunks)})
    assert apply(patch.parent) == expected


def test_patches_apply_in_the_order_of_their_numbers(
    checkout: Path, patched: dict[str, bytes]
) -> None:
    series = load_series(checkout / "patches")
    assert [patch.path.name[:4] for patch in series.patches] == ["0001", "0002"]
    pristine = {
        "vllm/models/registry.py": PRISTINE,
        "vllm/config/model.py": b"a\n\nb\nc\n",
    }
    assert series.pins() == {path: blob_id(data) for path, data in pristine.items()}
    assert series.apply(pristine) == patched
    first = checkout / "patches/0001-Registry-one-more.patch"
    first.rename(first.with_name("0003-Registry-one-more.patch"))
    with pytest.raises(
        OverlayError,
        match="0002-Config-more.patch was made for .* at vllm/models/registry.py",
    ):
        load_series(checkout / "patches").apply(pristine)


def test_only_line_feeds_end_lines(patch: Path, write_patch: Write) -> None:
    pristine = "one\x0c\u2028\ntwo\r\n".encode()
    hunk = "@@ -2 +2,3 @@\n two\r\n+new\r\n+ \n"
    write_patch(patch, "s", {PATH: (pristine, pristine + b"new\r\n \n", hunk)})
    assert apply(patch.parent, pristine) == pristine + b"new\r\n \n"


def test_repositories_and_settings_are_out_of_reach(
    patch: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Git would skip a file of an ignored folder, and change white space."""
    repository = patch.parents[1]
    subprocess.run(["git", "init", "-q"], cwd=repository, check=True)
    (repository / ".gitignore").write_text("*\n")
    (repository / "gitconfig").write_text("[core]\nautocrlf = true\n")
    monkeypatch.setenv("GIT_CONFIG_GLOBAL", str(repository / "gitconfig"))
    monkeypatch.setenv("GIT_DIR", str(repository / ".git"))
    monkeypatch.setenv("GIT_WORK_TREE", str(repository))
    (repository / "temporary").mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(repository / "temporary"))
    assert apply(patch.parent) == PATCHED
    assert list((repository / "temporary").iterdir()) == []


def test_another_release_is_refused(patch: Path) -> None:
    other = PRISTINE + b"six\n"
    with pytest.raises(OverlayError) as caught:
        apply(patch.parent, other)
    for text in (PATH, blob_id(other), "0001-s.patch", blob_id(PRISTINE), "base.lock"):
        assert text in str(caught.value)


def test_an_edit_by_hand_is_named(patch: Path) -> None:
    replace(patch, "+new", "+newer")
    with pytest.raises(OverlayError, match="vllm/a.py is .*after an edit by hand run"):
        apply(patch.parent)


@pytest.mark.parametrize(
    "old, new",
    [(" two\n", " tow\n"), ("+2,3", "+2,4"), (" three\n", "")],
)
def test_what_git_does_not_apply_is_named(patch: Path, old: str, new: str) -> None:
    replace(patch, old, new)
    with pytest.raises(OverlayError, match="(?s)0001-s.patch` failed in .*: .*patch"):
        apply(patch.parent)


def test_a_place_that_git_would_choose_is_refused(
    patch: Path, write_patch: Write
) -> None:
    """Without the line that it names git takes the nearest that looks the same."""
    pristine, patched = b"x\nx\nx\nx\n", b"x\nx\nx\nnew\nx\n"
    hunk = "@@ -3,2 +3,3 @@\n x\n+new\n x\n"
    write_patch(patch, "s", {PATH: (pristine, patched, hunk)})
    assert apply(patch.parent, pristine) == patched
    replace(patch, "@@ -3,2 +3,3", "@@ -2,2 +2,3")
    with pytest.raises(OverlayError, match="vllm/a.py is"):
        apply(patch.parent, pristine)


def test_git_is_needed(patch: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(patch.parent))
    with pytest.raises(OverlayError, match="git is needed .*apt-get install git"):
        apply(patch.parent)


@pytest.mark.parametrize(
    "field", ["Subject", "Why", "Why not an extension point", "Unnecessary when"]
)
@pytest.mark.parametrize("how", ["absent", "empty"])
def test_a_missing_reason_is_refused(patch: Path, field: str, how: str) -> None:
    replace(patch, f"\n\n{field}: " if field != "Subject" else "Subject: ", "\n\nX")
    if how == "empty":
        patch.write_text(f"{field}:\n{patch.read_text()}")
    with pytest.raises(OverlayError, match=rf"the header lacks .*{field}"):
        load_series(patch.parent)


@pytest.mark.parametrize(
    "hunks, message",
    [
        ("@@ -2,3 +2,3 @@\n two\n-three\n+new\n four\n", "(?s)only adds lines.*-three"),
        ("@@ -2,2 +2 @@\n two\n-three\n", "(?s)only adds lines.*-three"),
        ("@@ -1,3 +1,4 @@\n one\n two\n+new\n three\n", "' one' is beside no added"),
        ("@@ -2,3 +2,4 @@\n two\n+new\n three\n four\n", "' four' is beside no added"),
        (HUNK.replace(" @@\n", " @@ def f\n"), "def f': remove what follows"),
        ("", "changes existing files"),
    ],
)
def test_hunks_are_refused(
    patch: Path, write_patch: Write, hunks: str, message: str
) -> None:
    write_patch(patch, "s", {PATH: (PRISTINE, PATCHED, hunks)})
    with pytest.raises(OverlayError, match=message):
        load_series(patch.parent)


@pytest.mark.parametrize(
    "old, new, message",
    [
        (PATH, "setup.py", "below vllm/"),
        (PATH, "vllm/_version.py", "never patched"),
        (PATH, "vllm/platforms/__init__.py", "never patched"),
        (PATH, "vllm/utils/cpu_triton_utils.py", "never patched"),
        (f"--- a/{PATH}", "--- /dev/null", "new files"),
        (f"+++ b/{PATH}", "+++ b/vllm/b.py", "each once"),
        (blob_id(PRISTINE), blob_id(PRISTINE)[:10], "full ids"),
        ("index ", "old mode 100644\nnew mode 100755\nindex ", "no change of mode"),
        ("Subject: s", "From: someone\nSubject: s", "its first line"),
        ("Subject: s\n\n", "Subject: s\n", "an empty line"),
    ],
)
def test_files_and_headers_are_refused(
    patch: Path, old: str, new: str, message: str
) -> None:
    replace(patch, old, new)
    with pytest.raises(OverlayError, match=message):
        load_series(patch.parent)


def test_a_path_out_of_the_tree_is_refused(patch: Path) -> None:
    replace(patch, PATH, "vllm/../../a.py")
    with pytest.raises(OverlayError, match="below vllm/"):
        load_series(patch.parent)


def test_a_file_twice_is_refused(patch: Path) -> None:
    diff = patch.read_text().partition("diff")
    patch.write_text(patch.read_text() + diff[1] + diff[2])
    with pytest.raises(OverlayError, match="each once"):
        load_series(patch.parent)
