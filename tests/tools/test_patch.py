# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""The patch format: what it accepts, what it refuses, and what a series makes."""

from pathlib import Path

import pytest

from vllm_overlay.common import OverlayError, sha256_bytes
from vllm_overlay.patch import parse_patch
from vllm_overlay.series import load_series, without_added

PRISTINE = b"one\ntwo\nthree\nfour\nfive\n"
FIELDS = {
    "Subject": "s",
    "Why": "w",
    "Why not an extension point": "n",
    "Unnecessary when": "u",
    "Base-SHA256": f"{sha256_bytes(PRISTINE)}  vllm/a.py",
}
HUNK = "@@ -2,1 +2,2 @@\n two\n+new\n"


def make(hunks: str = HUNK, path: str = "vllm/a.py", **fields: str) -> str:
    header = "".join(f"{key}: {value}\n" for key, value in (FIELDS | fields).items())
    return f"{header}\n--- a/{path}\n+++ b/{path}\n{hunks}"


def apply(tmp_path: Path, *texts: str, pristine: bytes = PRISTINE) -> bytes:
    names = [f"{number}.patch" for number in range(len(texts))]
    for name, text in zip(names, texts, strict=True):
        (tmp_path / name).write_text(text)
    (tmp_path / "series").write_text("# in order\n" + "\n".join(names))
    return load_series(tmp_path).apply("vllm/a.py", pristine).data


def test_fields_may_continue_on_indented_lines() -> None:
    text = make().replace("Why: w\n", "Why: w\n  and more\n\n")
    patch = parse_patch("p", text)
    assert patch.fields["Why"] == "w\nand more"
    assert patch.message == (
        "s\n\nWhy: w\nand more\n\nWhy not an extension point: n\n\n"
        "Unnecessary when: u\n"
    )


@pytest.mark.parametrize(
    "hunks, expected",
    [
        (HUNK, b"one\ntwo\nnew\nthree\nfour\nfive\n"),
        (
            "@@ -2,2 +2,3 @@\n two\n+new\n three\n",
            b"one\ntwo\nnew\nthree\nfour\nfive\n",
        ),
        ("@@ -2 +2,2 @@\n two\n+new\n", b"one\ntwo\nnew\nthree\nfour\nfive\n"),
        ("@@ -0,0 +1,2 @@\n+x\n+y\n", b"x\ny\none\ntwo\nthree\nfour\nfive\n"),
        ("@@ -1 +1,2 @@\n+x\n one\n", b"x\none\ntwo\nthree\nfour\nfive\n"),
        ("@@ -5,1 +5,2 @@\n five\n+x\n", b"one\ntwo\nthree\nfour\nfive\nx\n"),
        ("@@ -3,0 +4 @@\n+x\n", b"one\ntwo\nthree\nx\nfour\nfive\n"),
        (
            "@@ -1,1 +1,2 @@\n one\n+x\n@@ -4,1 +5,2 @@\n four\n+y\n",
            b"one\nx\ntwo\nthree\nfour\ny\nfive\n",
        ),
        (
            "@@ -1,3 +1,5 @@\n one\n+x\n two\n+y\n three\n",
            b"one\nx\ntwo\ny\nthree\nfour\nfive\n",
        ),
    ],
)
def test_lines_are_added(tmp_path: Path, hunks: str, expected: bytes) -> None:
    assert apply(tmp_path, make(hunks)) == expected


def test_patches_of_one_file_are_independent_and_in_series_order(
    tmp_path: Path,
) -> None:
    early = make("@@ -1,1 +1,3 @@\n one\n+x\n+y\n")
    late = make("@@ -4,1 +4,2 @@\n four\n+z\n")
    same = make("@@ -1,1 +1,2 @@\n one\n+w\n")
    result = apply(tmp_path, early, late, same)
    assert result == b"one\nx\ny\nw\ntwo\nthree\nfour\nz\nfive\n"


def test_added_lines_can_be_taken_out(checkout: Path, patched: dict) -> None:
    series = load_series(checkout / "patches")
    pristine = b"a\n\nb\nc\n"
    file = series.apply("vllm/config/model.py", pristine)
    assert file.data == patched["vllm/config/model.py"]
    assert without_added(file.data, file.added) == pristine


def test_only_line_feeds_end_lines(tmp_path: Path) -> None:
    pristine = "one\x0c\u2028\ntwo\r\n".encode()
    pin = f"{sha256_bytes(pristine)}  vllm/a.py"
    text = make("@@ -2,1 +2,2 @@\n two\r\n+new\n", **{"Base-SHA256": pin})
    (tmp_path / "series").write_text("0.patch")
    (tmp_path / "0.patch").write_bytes(text.encode())
    result = load_series(tmp_path).apply("vllm/a.py", pristine).data
    assert result == pristine + b"new\n"


@pytest.mark.parametrize("field", list(FIELDS)[:4])
@pytest.mark.parametrize("how", ["absent", "empty"])
def test_refuses_a_missing_reason(field: str, how: str) -> None:
    line = f"{field}: {FIELDS[field]}\n"
    text = make().replace(line, "" if how == "absent" else f"{field}:\n", 1)
    with pytest.raises(OverlayError, match=f"the header lacks {field};"):
        parse_patch("p", text)


REFUSED = {
    "a removed line": ("@@ -2,2 +2,2 @@\n two\n-three\n+new\n", "only adds lines"),
    "a removed last line": ("@@ -2,2 +2,2 @@\n two\n+new\n-three\n", "only adds"),
    "context before": ("@@ -1,2 +1,3 @@\n one\n two\n+new\n", "-U1"),
    "context after": ("@@ -2,2 +2,3 @@\n+new\n two\n three\n", "-U1"),
    "context between": (
        "@@ -1,4 +1,6 @@\n one\n+x\n two\n three\n four\n+y\n",
        "the counts|-U1",
    ),
    "no added line": ("@@ -2,1 +2,1 @@\n two\n", "adds nothing"),
    "a wrong old count": ("@@ -2,2 +2,2 @@\n two\n+new\n", "counts"),
    "a small new count": ("@@ -2,1 +2,2 @@\n two\n+new\n+more\n", "part of no hunk"),
    "a wrong new start": ("@@ -2,1 +3,2 @@\n two\n+new\n", "put it at 2"),
    "hunks out of order": (
        "@@ -4,1 +4,2 @@\n four\n+y\n@@ -1,1 +1,2 @@\n one\n+x\n",
        "out of order",
    ),
    "a function name": ("@@ -2,1 +2,2 @@ def f\n two\n+new\n", "after the second"),
    "a broken hunk line": ("@@ -2 +x @@\n two\n+new\n", "malformed"),
    "no newline at the end": (HUNK + "\\ No newline at end of file\n", "no hunk"),
    "no hunk": ("", "has no hunks"),
    "a missing pin": (HUNK + "--- a/vllm/b.py\n+++ b/vllm/b.py\n" + HUNK, "<sha256>"),
    "a file twice": (HUNK + "--- a/vllm/a.py\n+++ b/vllm/a.py\n" + HUNK, "each once"),
}


@pytest.mark.parametrize("hunks, message", REFUSED.values(), ids=REFUSED)
def test_refuses_hunks(hunks: str, message: str) -> None:
    with pytest.raises(OverlayError, match=message):
        parse_patch("p", make(hunks))


@pytest.mark.parametrize(
    "text, message",
    [
        (make(path="setup.py"), "outside vllm/"),
        (make(path="vllm/../setup.py"), "outside vllm/"),
        (make(path="vllm/_version.py"), "never patched"),
        (make(path="vllm/platforms/__init__.py"), "never patched"),
        (make(path="vllm/utils/cpu_triton_utils.py"), "never patched"),
        (make().replace("--- a/vllm/a.py", "--- /dev/null"), "new files"),
        (make().replace("+++ b/vllm/a.py", "+++ b/vllm/b.py"), "same PATH"),
        ("text\n" + make(), "'text' is no header line"),
        (make(Fuzz="2"), "field 'Fuzz' is unknown"),
        ("Subject: again\n" + make(), "given twice"),
        (make(**{"Base-SHA256": "123  vllm/a.py"}), "is not one '<sha256>  <path>'"),
        (make().split("---")[0], "must be the same"),
    ],
)
def test_refuses_files_and_headers(text: str, message: str) -> None:
    with pytest.raises(OverlayError, match=message):
        parse_patch("p", text)


@pytest.mark.parametrize(
    "hunks, message",
    [
        ("@@ -3,1 +3,2 @@\n two\n+new\n", "line 3 of vllm/a.py is not 'two'"),
        ("@@ -2,1 +2,2 @@\n two \n+new\n", "line 2 of vllm/a.py is not 'two '"),
        ("@@ -6,1 +6,2 @@\n \n+new\n", "line 6 of vllm/a.py is not ''"),
        ("@@ -9,0 +10,1 @@\n+new\n", "has no line 9"),
    ],
)
def test_has_no_fuzz(tmp_path: Path, hunks: str, message: str) -> None:
    with pytest.raises(OverlayError, match=message):
        apply(tmp_path, make(hunks))


def test_refuses_another_release(tmp_path: Path) -> None:
    with pytest.raises(OverlayError, match="0.patch was made for"):
        apply(tmp_path, make(), pristine=PRISTINE + b"six\n")


def test_refuses_two_pins_of_one_file(tmp_path: Path) -> None:
    other = make(**{"Base-SHA256": f"{'0' * 64}  vllm/a.py"})
    with pytest.raises(OverlayError, match="another patch pins it"):
        apply(tmp_path, make(), other)


@pytest.mark.parametrize("series", ["", "0.patch\n1.patch\n", "0.patch\n0.patch\n"])
def test_series_lists_every_patch_once(tmp_path: Path, series: str) -> None:
    (tmp_path / "0.patch").write_text(make())
    (tmp_path / "series").write_text(series)
    with pytest.raises(OverlayError, match="list every patch once"):
        load_series(tmp_path)
