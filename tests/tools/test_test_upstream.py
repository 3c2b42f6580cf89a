# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""Comparing two runs of vLLM's own tests."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import test_upstream
from test_upstream import MINIMUM, compare, read_outcomes

PASSED = {f"tests/test_a.py::test_{i}": "passed" for i in range(MINIMUM)}


def test_equal_runs():
    failing = PASSED | {"tests/test_b.py::test": "failed"}
    assert compare(failing, dict(failing), set()) == []


def test_every_difference_is_named():
    pristine = PASSED | {"x": "passed", "y": "failed", "z": "skipped", "same": "failed"}
    patched = PASSED | {"x": "failed", "y": "passed", "w": "passed", "same": "failed"}
    assert compare(pristine, patched, {"y"}) == [
        "w: absent without the patches, passed with them",
        "x: passed without the patches, failed with them",
        "z: skipped without the patches, absent with them",
    ]


def test_too_few_tests_are_an_error():
    few = dict(list(PASSED.items())[1:])
    (problem,) = compare(few, few, set())
    assert f"only {MINIMUM - 1} tests passed on both sides" in problem
    assert compare({}, {}, set())


def test_the_plugin_records_outcomes(tmp_path):
    (tmp_path / "test_sample.py").write_text(
        "import os, pytest\n"
        "def test_good(): pass\n"
        "def test_bad(): assert 0\n"
        "def test_skip(): pytest.skip()\n"
        "@pytest.fixture\n"
        "def broken(): yield; raise OSError\n"
        "def test_teardown(broken): pass\n"
        "def test_crash(): os._exit(3)\n"
    )
    outcomes = tmp_path / "outcomes.jsonl"
    tools = Path(test_upstream.__file__).parent
    subprocess.run(
        [sys.executable, "-m", "pytest", "-p", "upstream_outcomes", str(tmp_path)],
        env=os.environ | {"OUTCOMES": str(outcomes), "PYTHONPATH": str(tools)},
        cwd=tmp_path,
        capture_output=True,
        check=False,
    )
    names = {t.rpartition("::")[2]: o for t, o in read_outcomes(outcomes).items()}
    assert names == {
        "test_good": "passed",
        "test_bad": "failed",
        "test_skip": "skipped",
        "test_teardown": "failed",
        "test_crash": "crashed",
    }


def test_a_run_without_outcomes(tmp_path):
    assert read_outcomes(tmp_path / "none.jsonl") == {}


@pytest.mark.parametrize("differs", [False, True])
def test_the_exit_code(differs, tmp_path, monkeypatch, capsys):
    patched = PASSED | ({"tests/test_a.py::test_0": "failed"} if differs else {})
    runs = {"pristine": PASSED, "patched": patched}
    monkeypatch.setattr(test_upstream, "CHECKOUT", tmp_path)
    monkeypatch.setattr(test_upstream, "unpack_sources", lambda folder: folder)
    monkeypatch.setattr(test_upstream, "make_trees", lambda folder: dict.fromkeys(runs))
    monkeypatch.setattr(test_upstream, "run_tests", lambda name, *rest: runs[name])
    assert test_upstream.main() == differs
    said = capsys.readouterr().out
    assert ("test_0: passed without the patches, failed with" in said) == differs
    assert ("equal, test by test" in said) != differs


def test_the_selection_gives_reasons():
    import tomllib

    selection = tomllib.loads(test_upstream.SELECTION.read_text())
    assert all(
        path.endswith(".py") and reason for path, reason in selection["tests"].items()
    )
