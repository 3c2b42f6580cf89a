# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""Build the patched vLLM: the pinned release, the patches, new files and kernels.

The release is downloaded with pip and verified against base.lock. It is the one for
CUDA if the machine has an NVIDIA driver, else the one for CPU;
``VLLM_TARGET_DEVICE=cpu`` or ``VLLM_TARGET_DEVICE=cuda`` overrides that.
"""

import sys
from pathlib import Path

from setuptools import setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.dist_info import dist_info

CHECKOUT = Path(__file__).resolve().parent
sys.path.insert(0, str(CHECKOUT / "tools"))

from vllm_overlay import extension, wheel  # noqa: E402
from vllm_overlay.base import BaseWheel, fetch, find_device, load_base  # noqa: E402
from vllm_overlay.common import OverlayError  # noqa: E402


class BuildWheel(bdist_wheel):
    """Builds the wheel from the base wheel instead of from ``packages``."""

    def run(self) -> None:
        """Build the wheel into the directory that setuptools asks for."""
        release = BaseWheel(fetch(DEVICE, CHECKOUT))
        extension.build(CHECKOUT)
        wheel.build_wheel(release, BASE, DEVICE, CHECKOUT, Path(self.dist_dir))


class WriteMetadata(dist_info):
    """Writes the metadata that the wheel will have."""

    def run(self) -> None:
        """Write the ``*.dist-info`` folder."""
        super().run()
        release = BaseWheel(fetch(DEVICE, CHECKOUT))
        for path, data in wheel.dist_info_files(release, BASE, DEVICE).items():
            target = Path(self.output_dir) / path
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(data)


(CHECKOUT / "build").mkdir(exist_ok=True)
try:
    DEVICE = find_device()
    BASE = load_base(DEVICE, CHECKOUT)
    setup(
        name=wheel.NAME,
        version=BASE.built_version,
        packages=[],
        py_modules=[],
        cmdclass={"bdist_wheel": BuildWheel, "dist_info": WriteMetadata},
        options={"egg_info": {"egg_base": "build"}},
    )
except OverlayError as error:
    sys.exit(f"error: {error}")
