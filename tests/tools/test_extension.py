# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""Compiling the kernels, and their way into the wheel and an installed vLLM."""

import importlib.util
import zipfile
from pathlib import Path

import pytest

from vllm_overlay import extension, installed
from vllm_overlay.base import BaseWheel, load_base
from vllm_overlay.common import BUILT_EXTENSION, EXTENSION, OverlayError
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
