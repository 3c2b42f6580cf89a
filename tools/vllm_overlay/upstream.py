# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""Turn the series and the overlay into commits on vLLM's own source tree."""

import shutil
import subprocess
import tarfile
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from vllm_overlay.base import fetch, load_base
from vllm_overlay.common import OverlayError, blob_id, bullets, source_files
from vllm_overlay.series import Series, load_series

PRISTINE = "pristine"
BRANCH = "training"
# The overlay's commits: what they add goes before and after the series, so that the
# code that a patch calls is there when it is called.
_BEFORE = (("Add training-aware layers and model builders", ("vllm", "csrc")),)
_AFTER = (
    ("Add tests of the training-aware layers", ("tests", ".buildkite")),
    (
        "Document and benchmark the training-aware layers",
        ("docs", "examples", "benchmarks"),
    ),
)
# About this repository, not about vLLM.
_OURS = ("tests/tools/", "tests/benchmarks/", "docs/index.md")


def export(source: str, out: Path, checkout: Path) -> str:
    """Make the branch, export it as patches and prove that these apply.

    Args:
        source: A folder with the release's source tree, or ``"sdist"``.
        out: The folder to make; the repository goes to ``out/vllm``, the patches to
            ``out/patches``.
        checkout: The root of the checkout.

    Returns:
        What was made, for people.

    Raises:
        OverlayError: If a patch does not apply, a new file exists upstream, or the
            exported patches do not reproduce the branch.
    """
    if out.exists() and any(out.iterdir()):
        raise OverlayError(f"{out} is not empty; name a new folder, or empty it")
    version = load_base("source", checkout).version
    series = load_series(checkout / "patches")
    repository = out / "vllm"
    with _source_tree(source, checkout) as tree:
        groups = _overlay(checkout, tree)
        shutil.copytree(
            tree, repository, symlinks=True, ignore=shutil.ignore_patterns(".git")
        )
    _git(repository, "init", "--quiet", "--initial-branch", PRISTINE)
    _identify(repository)
    _commit(repository, f"vLLM {version}\n")
    _git(repository, "checkout", "--quiet", "-b", BRANCH)
    for subject, _ in _BEFORE:
        _add(repository, subject, groups[subject])
    _commit_series(repository, series)
    for subject, _ in _AFTER:
        _add(repository, subject, groups[subject])
    patches = (out / "patches").resolve()
    commits = f"{PRISTINE}..{BRANCH}"
    _git(repository, "format-patch", "--quiet", "--output-directory", patches, commits)
    _prove(repository, patches)
    count = len(list(patches.glob("*.patch")))
    return (
        f"{repository}: branch {BRANCH}; {patches}: {count} patches, `git am` checked"
    )


@contextmanager
def _source_tree(source: str, checkout: Path) -> Iterator[Path]:
    if source != "sdist":
        if not (Path(source) / "vllm").is_dir():
            raise OverlayError(
                f"{source} has no vllm/; give the root of vLLM's source tree, or "
                "'sdist' to download it"
            )
        yield Path(source)
        return
    archive = fetch("source", checkout)
    with tempfile.TemporaryDirectory() as folder:
        with tarfile.open(archive) as tar:
            tar.extractall(folder, filter="data")
        yield Path(folder) / archive.name.removesuffix(".tar.gz")


def _overlay(checkout: Path, tree: Path) -> dict[str, dict[str, Path]]:
    """Group the files to add by the subject of their commit."""
    groups = {}
    taken: list[str] = []
    for subject, roots in (*_BEFORE, *_AFTER):
        files = {
            path: file
            for path, file in source_files(checkout, *roots).items()
            if not path.startswith(_OURS)
        }
        groups[subject] = files
        taken += [path for path in files if (tree / path).exists()]
    if taken:
        raise OverlayError(
            f"these exist in vLLM's source tree; new files need new paths:"
            f"{bullets(taken)}"
        )
    return groups


def _add(repository: Path, subject: str, files: dict[str, Path]) -> None:
    if not files:
        return
    for path, file in files.items():
        target = repository / path
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(file, target)
    _commit(repository, f"{subject}\n")


def _commit_series(repository: Path, series: Series) -> None:
    for path, pin in series.pins().items():
        if not (repository / path).is_file():
            raise OverlayError(f"{path} is patched, but not in vLLM's source tree")
        if (found := blob_id((repository / path).read_bytes())) != pin:
            raise OverlayError(
                f"the patches were made for {pin} at {path}, not {found}"
            )
    for patch in series.patches:
        _git(repository, "apply", "--whitespace=nowarn", patch.path.resolve())
        _commit(repository, patch.message)


def _prove(repository: Path, patches: Path) -> None:
    """Apply the patches to a fresh clone and compare the trees."""
    with tempfile.TemporaryDirectory() as folder:
        clone = Path(folder) / "vllm"
        _git(
            Path(folder),
            "clone",
            "--quiet",
            "-b",
            PRISTINE,
            repository.resolve(),
            clone,
        )
        _identify(clone)
        files = sorted(patches.glob("*.patch"))
        _git(clone, "am", "--quiet", "--keep-non-patch", "--keep-cr", *files)
        if _tree(clone, "HEAD") != _tree(repository, BRANCH):
            raise OverlayError(
                f"`git am` of {patches} does not give the tree of {repository}"
            )


def _tree(repository: Path, revision: str) -> str:
    return _git(repository, "rev-parse", f"{revision}^{{tree}}")


def _identify(repository: Path) -> None:
    """Give a repository an identity of its own if git has none configured."""
    for key, value in (("name", "vLLM overlay"), ("email", "overlay@localhost")):
        if not _git(repository, "config", "--default", "", "--get", f"user.{key}"):
            _git(repository, "config", f"user.{key}", value)


def _commit(repository: Path, message: str) -> None:
    # --force: the source distribution holds files that vLLM's .gitignore lists.
    _git(repository, "add", "--all", "--force")
    _git(repository, "commit", "--quiet", "--message", message)


def _git(folder: Path, *arguments: str | Path) -> str:
    command = ["git", "-c", "core.autocrlf=false", *map(str, arguments)]
    result = subprocess.run(
        command, cwd=folder, capture_output=True, text=True, check=False
    )
    if result.returncode != 0:
        raise OverlayError(f"{' '.join(command)} failed in {folder}:\n{result.stderr}")
    return result.stdout.strip()
