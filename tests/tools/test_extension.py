# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""Compiling the kernels, and their way into the wheel and an installed vLLM."""

import importlib.util
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from vllm_overlay import extension, installed
from vllm_overlay.base import BaseWheel, load_base
from vllm_overlay.common import BUILT_EXTENSION, CHECKOUT, EXTENSION, OverlayError
from vllm_overlay.wheel import build_wheel


def test_compiles_what_changed(checkout: Path) -> None:
    library = extension.build(checkout)
    assert library == checkout / BUILT_EXTENSION
    first, when = library.read_bytes(), library.stat().st_mtime_ns
    assert first.startswith(b"\x7fELF")
    assert extension.build(checkout).stat().st_mtime_ns == when
    source = checkout / "csrc/training/kernels.cpp"
    source.write_text("int another_answer() { return 43; }\n")
    assert b"another_answer" in extension.build(checkout).read_bytes()
    assert b"another_answer" not in first


def test_a_failed_build_keeps_the_library(checkout: Path) -> None:
    before = extension.build(checkout).read_bytes()
    (checkout / "csrc/training/kernels.cpp").write_text("int broken( {\n")
    with pytest.raises(OverlayError, match="cannot compile the kernels") as caught:
        extension.build(checkout)
    assert "kernels.cpp:1" in str(caught.value)
    assert "C++20 compiler" in str(caught.value)
    assert (checkout / BUILT_EXTENSION).read_bytes() == before


def test_without_torch(checkout: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(OverlayError, match="compiled against torch.*make setup"):
        extension.build(checkout)
    assert not (checkout / "build").exists()


def test_without_cmake(checkout: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(extension.sys, "executable", str(checkout / "python"))
    monkeypatch.setenv("PATH", str(checkout))
    with pytest.raises(OverlayError, match="cmake is needed.*pip install cmake"):
        extension.build(checkout)


def configure(folder: Path, *options: str) -> str:
    """Configure this repository's own project, as a person would."""
    command = [extension._find("cmake"), "-S", CHECKOUT, "-B", folder, *options]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    return " ".join((result.stdout + result.stderr).split())


def test_cmake_by_hand(tmp_path: Path) -> None:
    output = configure(tmp_path / "a", f"-DPython3_EXECUTABLE={sys.executable}")
    assert "Build files have been written to" in output
    python = tmp_path / "python3"
    python.write_text(f'#!/bin/sh\nexec {sys.executable} -S "$@"\n')
    python.chmod(0o755)
    output = configure(tmp_path / "b", f"-DPython3_EXECUTABLE={python}")
    assert f"{python} has no torch to compile against. Activate" in output
    output = configure(tmp_path / "c", f"-DTORCH_ROOT={tmp_path}")
    assert f"{tmp_path} is not the folder of an installed torch 2.11" in output


def test_the_wheel_and_an_overlay_have_it(
    checkout: Path, base_wheel: Path, site: Path
) -> None:
    library = extension.build(checkout)
    lock = load_base("cpu", checkout)
    wheel = build_wheel(BaseWheel(base_wheel), lock, "cpu", checkout, checkout / "dist")
    with zipfile.ZipFile(wheel) as archive:
        assert archive.read(EXTENSION) == library.read_bytes()
    installed.apply(site, checkout, link=True)
    assert (site / EXTENSION).resolve() == library
    assert installed.check(site, checkout) == []
    (checkout / BUILT_EXTENSION).rename(checkout / "elsewhere")
    with pytest.raises(OverlayError, match="not built in the checkout"):
        installed.apply(site, checkout, link=True)
    (checkout / "elsewhere").rename(checkout / BUILT_EXTENSION)
    installed.revert(site, checkout)
    assert not (site / EXTENSION).exists()
