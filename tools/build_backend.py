# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""The build backend: setuptools, which runs setup.py, without editable installs."""

from typing import NoReturn

from setuptools.build_meta import (
    build_sdist,
    build_wheel,
    get_requires_for_build_sdist,
    get_requires_for_build_wheel,
    prepare_metadata_for_build_wheel,
)

__all__ = [
    "build_sdist",
    "build_wheel",
    "get_requires_for_build_sdist",
    "get_requires_for_build_wheel",
    "prepare_metadata_for_build_wheel",
]


def get_requires_for_build_editable(config_settings: object = None) -> NoReturn:
    """Refuse an editable install before anything is downloaded."""
    raise SystemExit(
        "error: this package cannot be installed with `pip install -e`: vLLM's own "
        "files are not in this repository. For development, install it with "
        "`pip install .` and then link its files to the checkout with `python "
        "tools/overlay.py apply --link --into SITE_PACKAGES` (`make setup` does both)"
    )


def build_editable(
    wheel_directory: str,
    config_settings: object = None,
    metadata_directory: str | None = None,
) -> NoReturn:
    """Refuse an editable install; pip wants this hook for the one above."""
    get_requires_for_build_editable()
