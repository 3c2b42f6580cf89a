# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""The command line, and the small scripts beside it."""

import subprocess
import sys
import zipfile
from pathlib import Path

import check_spdx
import install_cpu_torch
import pytest


def overlay(checkout: Path, *arguments: str | Path) -> tuple[int, str]:
    command = [sys.executable, checkout / "tools/overlay.py", *arguments]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert "Traceback" not in result.stderr
    return result.returncode, result.stdout + result.stderr


def test_apply_check_revert(checkout: Path, site: Path) -> None:
    status, text = overlay(checkout, "apply", "--check", "--into", site)
    assert status == 1 and "there is no overlay" in text
    assert overlay(checkout, "apply", "--into", site, "--link")[0] == 0
    assert (site / "vllm/models/builder.py").is_symlink()
    assert overlay(checkout, "apply", "--check", "--into", site)[0] == 0
    assert overlay(checkout, "apply", "--revert", "--into", site)[0] == 0
    status, text = overlay(checkout, "apply", "--into", site / "other")
    assert status == 1 and text.startswith("overlay.py: error: ")


def test_edit_and_save(checkout: Path, fetched: Path, tmp_path: Path) -> None:
    tree = tmp_path / "tree"
    status, text = overlay(checkout, "edit", tree)
    assert status == 0 and "'pristine', 2 commits follow" in text
    before = {path: path.read_bytes() for path in checkout.glob("patches/*")}
    status, text = overlay(checkout, "save", tree)
    assert status == 0 and "2 patches written" in text
    assert {path: path.read_bytes() for path in checkout.glob("patches/*")} == before
    status, text = overlay(checkout, "edit", tree)
    assert status == 1 and f"{tree} exists" in text


def test_build_and_device(
    checkout: Path, fetched: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("VLLM_TARGET_DEVICE", "cpu")
    assert overlay(checkout, "device") == (0, "cpu\n")
    status, text = overlay(checkout, "build")
    assert status == 0 and Path(text.strip()).parent == checkout / "build/dist"
    monkeypatch.setenv("VLLM_TARGET_DEVICE", "tpu")
    assert overlay(checkout, "build")[0] == 1


def test_licence_headers(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    lines = check_spdx.HEADER
    good = {
        "a.py": "# {}\n# {}\ncode\n",
        "a.sh": "#!/bin/sh\n# {}\n# {}\n",
        "a.cpp": "// {}\n// {}\n",
    }
    for name, text in good.items():
        (tmp_path / name).write_text(text.format(*lines))
    assert check_spdx.main([str(tmp_path / name) for name in good]) == 0
    (tmp_path / "bad.py").write_text(f"# {lines[0]}\ncode\n")
    (tmp_path / "empty.py").write_text("")
    assert check_spdx.main([str(tmp_path / n) for n in ("bad.py", "empty.py")]) == 1
    assert "bad.py" in (text := capsys.readouterr().out) and "empty.py" in text


@pytest.mark.usefixtures("offline")
def test_no_cpu_torch_says_how_to_get_it(
    tmp_path: Path,
    base_wheel: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Pip finds only the plain build, as on most machines; it must stay away."""
    name = base_wheel.with_name("torch-2.13.0-py3-none-any.whl")
    with zipfile.ZipFile(name, "w") as archive:
        archive.writestr("torch-2.13.0.dist-info/METADATA", "Name: torch\n")
    monkeypatch.setattr(install_cpu_torch, "is_installed", lambda: False)
    monkeypatch.setenv("PIP_TARGET", str(tmp_path / "target"))
    assert install_cpu_torch.main() == 1
    message = capsys.readouterr().err
    assert "No matching distribution found for torch==2.13.0+cpu" in message
    assert not (tmp_path / "target").exists()
    assert "/pip install uv && " in message
    assert "/uv pip install --torch-backend=cpu torch==2.13.0\n" in message


@pytest.mark.parametrize(
    "version, cuda, expected",
    [
        ("2.13.0+cpu", "None", True),
        ("2.13.0", "None", True),
        ("2.13.0", "'13.0'", False),
        ("2.12.0+cpu", "None", False),
        (None, "None", False),
    ],
)
def test_the_installed_torch_is_judged(
    tmp_path: Path, version: str | None, cuda: str, expected: bool
) -> None:
    if version is not None:
        (tmp_path / "torch").mkdir()
        (tmp_path / "torch/__init__.py").touch()
        (tmp_path / "torch/version.py").write_text(f"cuda = {cuda}\n")
        info = tmp_path / f"torch-{version}.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(f"Name: torch\nVersion: {version}\n")
    script = (
        f"import sys; sys.path = [{str(tmp_path)!r}] + "
        "[p for p in sys.path if 'site-packages' not in p]; "
        "import install_cpu_torch; sys.exit(not install_cpu_torch.is_installed())"
    )
    folder = Path(install_cpu_torch.__file__).parent
    result = subprocess.run(
        [sys.executable, "-c", script], cwd=folder, check=False, timeout=60
    )
    assert (result.returncode == 0) == expected
