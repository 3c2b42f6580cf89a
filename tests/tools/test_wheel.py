# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""The wheel, and pip's way to it."""

import base64
import csv
import hashlib
import io
import os
import subprocess
import sys
import zipfile
from collections.abc import Mapping
from email.parser import Parser
from pathlib import Path

import pytest

from vllm_overlay import installed
from vllm_overlay.base import BaseWheel, load_base
from vllm_overlay.common import OverlayError
from vllm_overlay.manifest import MANIFEST
from vllm_overlay.wheel import build_wheel

TAG = "cp38-abi3-manylinux_2_28_x86_64"


def build(checkout: Path, base_wheel: Path, device: str = "cpu") -> Path:
    lock = load_base(device, checkout)
    wheel = BaseWheel(base_wheel)
    return build_wheel(wheel, lock, device, checkout, checkout / "dist")


def pip(
    checkout: Path, *arguments: str | Path, **environment: str
) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "pip", *map(str, arguments)],
        cwd=checkout,
        env=os.environ | environment,
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.mark.parametrize("device, local", [("cpu", "cpu"), ("cuda", "cu130")])
def test_names_versions_and_tags(
    checkout: Path, base_wheel: Path, device: str, local: str
) -> None:
    path = build(checkout, base_wheel, device)
    version = f"0.32.0+train1.{local}"
    assert path.name == f"vllm-{version}-{TAG}.whl"
    assert list(path.parent.iterdir()) == [path]
    with zipfile.ZipFile(path) as archive:
        names = archive.namelist()
        folder = f"vllm-{version}.dist-info"
        assert {n.split("/")[0] for n in names} == {"vllm", folder}
        assert f"Tag: {TAG}\n" in archive.read(f"{folder}/WHEEL").decode()
        metadata = Parser().parsestr(archive.read(f"{folder}/METADATA").decode())
        entry_points = archive.read(f"{folder}/entry_points.txt")
        assert f"{folder}/licenses/LICENSE" in names
    assert entry_points == b"[console_scripts]\nvllm = vllm.cli:main\n"
    assert metadata["Name"] == "vllm"
    assert metadata["Version"] == version
    assert metadata.get_payload() == "Requires-Dist: torchvision is only text here.\n"


def test_cpu_requirements_have_no_cuda_builds(checkout: Path, base_wheel: Path) -> None:
    requirements = {}
    for device in ("cpu", "cuda"):
        path = build(checkout, base_wheel, device)
        with zipfile.ZipFile(path) as archive:
            folder = f"{'-'.join(path.name.split('-')[:2])}.dist-info"
            text = archive.read(f"{folder}/METADATA").decode()
        requirements[device] = Parser().parsestr(text).get_all("Requires-Dist")
    assert requirements["cpu"] == [
        "numpy",
        "numba==0.65.0",
        'zentorch==2.13.0.1; extra == "zen"',
        "torch==2.13.0",
    ]
    assert len(requirements["cuda"]) == 8


def test_record_is_right(checkout: Path, base_wheel: Path) -> None:
    with zipfile.ZipFile(build(checkout, base_wheel)) as archive:
        folder = "vllm-0.32.0+train1.cpu.dist-info"
        record = archive.read(f"{folder}/RECORD").decode()
        rows = list(csv.reader(io.StringIO(record)))
        assert sorted(row[0] for row in rows) == sorted(archive.namelist())
        for name, digest, size in rows:
            if name == f"{folder}/RECORD":
                assert (digest, size) == ("", "")
                continue
            data = archive.read(name)
            actual = base64.urlsafe_b64encode(hashlib.sha256(data).digest())
            assert digest == "sha256=" + actual.decode().rstrip("=")
            assert int(size) == len(data)


def test_contents(
    checkout: Path,
    base_wheel: Path,
    patched: Mapping[str, bytes],
    overlay: Mapping[str, bytes],
) -> None:
    path = build(checkout, base_wheel)
    with zipfile.ZipFile(path) as new, zipfile.ZipFile(base_wheel) as old:
        ours = {n: new.read(n) for n in new.namelist() if ".dist-info" not in n}
        theirs = {n: old.read(n) for n in old.namelist() if ".dist-info" not in n}
        stored = new.getinfo("vllm/_C.abi3.so").compress_type
    assert stored == zipfile.ZIP_STORED
    manifest = ours.pop(MANIFEST)
    assert ours == {**theirs, **patched, **overlay}
    assert b'"complete": true' in manifest


def test_the_same_input_gives_the_same_wheel(checkout: Path, base_wheel: Path) -> None:
    first = build(checkout, base_wheel).read_bytes()
    assert build(checkout, base_wheel).read_bytes() == first


def test_new_paths_must_be_new(checkout: Path, base_wheel: Path) -> None:
    for path in ("vllm/__init__.py", "vllm/config/model.py"):
        (checkout / path).parent.mkdir(exist_ok=True)
        (checkout / path).write_text("")
    with pytest.raises(OverlayError) as caught:
        build(checkout, base_wheel)
    assert "vllm/__init__.py" in str(caught.value)
    assert "vllm/config/model.py" in str(caught.value)
    assert not (checkout / "dist").exists()


def test_a_patch_for_another_release_leaves_nothing(
    checkout: Path, base_wheel: Path
) -> None:
    patch = checkout / "patches/0001-Registry-one-more.patch"
    patch.write_text(patch.read_text().replace(" two\n", " tow\n"))
    with pytest.raises(OverlayError, match="vllm/models/registry.py: patch does not"):
        build(checkout, base_wheel)
    assert not (checkout / "dist").exists()


def test_pip_installs_what_check_accepts(
    tmp_path: Path, checkout: Path, fetched: Path
) -> None:
    site = tmp_path / "target"
    # Without isolation, because the test is offline.
    result = pip(
        checkout,
        *("install", "--no-deps", "--no-build-isolation", "--no-index"),
        *("--target", site, "."),
        VLLM_TARGET_DEVICE="cpu",
    )
    assert result.returncode == 0, result.stderr
    assert (site / "vllm-0.32.0+train1.cpu.dist-info/METADATA").exists()
    assert installed.check(site, checkout) == []
    assert sorted(path.name for path in checkout.glob("*egg-info")) == []
    with (checkout / "vllm/models/builder.py").open("a") as stream:
        stream.write("MORE = 2\n")
    assert len(installed.check(site, checkout)) == 1
    installed.apply(site, checkout, link=False)
    assert installed.check(site, checkout) == []


def test_pip_refuses_an_unknown_device(checkout: Path, fetched: Path) -> None:
    result = pip(
        checkout,
        *("wheel", "--no-deps", "--no-build-isolation", "--no-index", "."),
        VLLM_TARGET_DEVICE="tpu",
    )
    assert result.returncode != 0
    assert "VLLM_TARGET_DEVICE=tpu is not supported" in result.stdout + result.stderr
    assert "cpu or cuda" in result.stdout + result.stderr


def test_pip_refuses_an_editable_install(checkout: Path) -> None:
    result = pip(
        checkout,
        *("install", "--no-deps", "--no-build-isolation", "--no-index", "-e", "."),
    )
    assert result.returncode != 0
    assert "overlay.py apply --link" in result.stdout + result.stderr
    assert not (checkout / "build").exists()
