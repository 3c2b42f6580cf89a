# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""Turn the series and the new files into a stack of commits on vLLM's own source tree.

What the stack needs beyond the series is in patches/upstream: the table of its commits,
the cover letter, and the lines that build the kernels with vLLM. What differs for
another release than that of base.lock is in a folder of its name in patches/.
"""

import re
import shutil
import subprocess
import tarfile
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path

from vllm_overlay.base import BaseWheel, fetch, load_base
from vllm_overlay.common import OverlayError, blob_id, bullets, git
from vllm_overlay.imports import fill_packages, unresolved
from vllm_overlay.series import load_series
from vllm_overlay.stack import Commit, candidates, load_stack, number

PRISTINE = "pristine"
BRANCH = "training"
# Stands in the commits where git knows no name; nothing is signed off with it.
_NOBODY = {"name": "nobody", "email": "nobody@localhost"}
# The path and the ids before and after of a file in a patch.
_INDEX = re.compile(r"^diff --git a/(\S+) b/\S+\nindex (\w+)\.\.(\w+)", re.MULTILINE)


def export(source: str, out: Path, checkout: Path, version: str | None = None) -> str:
    """Make the branch, export it as patches and prove that these apply.

    Args:
        source: A folder with the release's source tree, or ``"sdist"``.
        out: The folder to make; the repository goes to ``out/vllm``, the patches to
            ``out/patches``.
        checkout: The root of the checkout.
        version: The release; by default that of base.lock.

    Returns:
        What was made, for people.

    Raises:
        OverlayError: If a patch does not apply, a new file exists upstream, a commit
            imports what it lacks, or the exported patches do not reproduce the branch.
    """
    if out.exists() and any(out.iterdir()):
        raise OverlayError(f"{out} is not empty; name a new folder, or empty it")
    release = Release(checkout, version or load_base("source", checkout).version)
    repository = out / "vllm"
    with _source_tree(source, release) as tree:
        after = release.check_tree(tree)
        shutil.copytree(
            tree, repository, symlinks=True, ignore=shutil.ignore_patterns(".git")
        )
    git(repository, "init", "--quiet", "--initial-branch", PRISTINE)
    identity = _identity(checkout)
    author = identity or _NOBODY
    _commit(repository, f"vLLM {release.version}\n", author)
    git(repository, "checkout", "--quiet", "-b", BRANCH)
    sign = ("--signoff",) if identity else ()
    for commit, paths in release.commits:
        _make(repository, release, commit, paths)
        patch = release.patches.get(commit.patch)
        _commit(repository, commit.message(patch), author, *sign)
    release.check_result(repository, after)
    patches = (out / "patches").resolve()
    _format(repository, patches, checkout, author)
    _prove(repository, patches)
    return (
        f"{repository}: branch {BRANCH} on vLLM {release.version}, "
        f"{len(release.commits)} commits; {patches}: the same as patches, `git am` "
        "checked" + ("" if identity else "; not signed off, git has no user.name")
    )


class Release:
    """A release of vLLM, and what the checkout has for it.

    Args:
        checkout: The root of the checkout.
        version: Of the release.

    Attributes:
        commits: The stack, and the paths of the new files of each commit.
        patches: The patches of the series by number.
        files: The new files by path.
    """

    def __init__(self, checkout: Path, version: str) -> None:
        self.version = version
        self.checkout = checkout
        self.pinned = load_base("source", checkout).version == version
        self.folder = checkout / "patches" / version
        if not self.pinned and not self.folder.is_dir():
            raise OverlayError(
                f"vLLM {version} is not known: there is no {self.folder}. Give a "
                "version that has a folder there, or none"
            )
        self.series = load_series(checkout / "patches")
        stack = load_stack(checkout, self.series)
        self.patches = {number(patch): patch for patch in self.series.patches}
        every = candidates(checkout)
        self.commits = list(zip(stack.commits, stack.assign(every)))
        self.files = {p: every[p] for _, paths in self.commits for p in paths}

    def archive(self) -> Path:
        """Return the source distribution."""
        kind = "source" if self.pinned else f"source-{self.version}"
        return fetch(kind, self.checkout)

    def diffs(self, commit: Commit) -> list[Path]:
        """Return the patch of a commit, and before it what replaces a part of it."""
        if not commit.patch:
            return []
        patch = self.patches.get(commit.patch)
        own = patch.path if patch else self.checkout / "patches/upstream" / commit.patch
        return [*sorted(self.folder.glob(f"{own.stem[:4]}*.patch")), own]

    def check_tree(self, tree: Path) -> dict[str, str]:
        """Refuse a source tree that is not the release, or has a new file's path.

        Returns:
            The id that each patched file will have, by path.

        Raises:
            OverlayError: Naming the files.
        """
        if taken := [path for path in self.files if (tree / path).exists()]:
            raise OverlayError(
                "these exist in vLLM's source tree; new files need new paths:"
                f"{bullets(taken)}"
            )
        before: dict[str, str] = {}
        after: dict[str, str] = {}
        for diff in (diff for commit, _ in self.commits for diff in self.diffs(commit)):
            for path, old, new in _INDEX.findall(diff.read_text("utf-8")):
                if self.pinned or diff.parent == self.folder:
                    before.setdefault(path, old)
                    after[path] = new
        if not self.pinned:
            lines = (self.folder / "base").read_text(encoding="utf-8").splitlines()
            before = {path: pin for pin, path in map(str.split, lines[1:])}
        _compare(tree, before, f"{tree} is not vLLM {self.version}")
        return self._merged(tree) | after

    def _merged(self, tree: Path) -> dict[str, str]:
        """What merging the changes of the series gives for another release.

        A merge sees whole files, so that lines which `git apply` has put elsewhere are
        noticed.
        """
        if self.pinned:
            return {}
        wheel = BaseWheel(fetch("cpu", self.checkout))
        pristine = {path: wheel.read(path) for path in self.series.pins()}
        patched = self.series.apply(pristine)
        with tempfile.TemporaryDirectory() as folder:
            ours, base, theirs = (Path(folder) / name for name in ("a", "b", "c"))
            ids = {}
            for path, data in patched.items():
                shutil.copyfile(tree / path, ours)
                base.write_bytes(pristine[path])
                theirs.write_bytes(data)
                with suppress(OverlayError):  # a conflict gives another id
                    git(Path(folder), "merge-file", "--quiet", ours, base, theirs)
                ids[path] = blob_id(ours.read_bytes())
        return ids

    def check_result(self, repository: Path, after: Mapping[str, str]) -> None:
        """Check that the branch has the new files, and the patches at their places."""
        _compare(
            repository,
            after,
            "lines of the patches are at other places than a merge puts them; write "
            f"patches for these files to {self.folder}",
        )
        changed = [
            path
            for path, file in self.files.items()
            if (repository / path).read_bytes() != file.read_bytes()
        ]
        if changed:
            raise OverlayError(
                "these were not exported as a whole, since vLLM lacks what they "
                f"import:{bullets(changed)}"
            )


def _compare(tree: Path, ids: Mapping[str, str], what: str) -> None:
    wrong = []
    for path, wanted in ids.items():
        file = tree / path
        found = blob_id(file.read_bytes()) if file.is_file() else "nothing"
        if found != wanted:
            wrong.append(f"{path} is {found}, not {wanted}")
    if wrong:
        raise OverlayError(f"{what}:{bullets(wrong)}")


@contextmanager
def _source_tree(source: str, release: Release) -> Iterator[Path]:
    if source != "sdist":
        if not (Path(source) / "vllm").is_dir():
            raise OverlayError(
                f"{source} has no vllm/; give the root of vLLM's source tree, or "
                "'sdist' to download it"
            )
        yield Path(source)
        return
    archive = release.archive()
    with tempfile.TemporaryDirectory() as folder:
        with tarfile.open(archive) as tar:
            tar.extractall(folder, filter="data")
        yield Path(folder) / archive.name.removesuffix(".tar.gz")


def _make(repository: Path, release: Release, commit: Commit, paths: list[str]) -> None:
    """Write what a commit adds and check that it can be imported."""
    for path in paths:
        target = repository / path
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(release.files[path], target)
    replaced: list[str] = []
    for diff in release.diffs(commit):
        without = [f"--exclude={path}" for path in replaced]
        git(repository, "apply", "--whitespace=nowarn", *without, diff.resolve())
        replaced += [path for path, *_ in _INDEX.findall(diff.read_text("utf-8"))]
    tree = {
        path: repository / path for path in git(repository, "ls-files").splitlines()
    }
    tree |= {path: repository / path for path in paths}
    packages = fill_packages(tree, release.files)
    if missing := unresolved(tree, [*paths, *replaced, *packages]):
        raise OverlayError(
            f"the commit {commit.subject or commit.patch!r} imports what comes later, "
            f"or nowhere:{bullets(missing)}"
        )


def _format(
    repository: Path, patches: Path, checkout: Path, author: Mapping[str, str]
) -> None:
    """Export the branch with a cover letter that says how large each commit is."""
    cover = (checkout / "patches/upstream/cover.md").read_text(encoding="utf-8")
    commits = f"{PRISTINE}..{BRANCH}"
    log = git(repository, "log", "--reverse", "--shortstat", "--format=%x00%s", commits)
    lines = ["files  lines  commit"]
    for entry in log.split("\0")[1:]:
        subject, _, sizes = entry.strip().partition("\n")
        files, added = (int(n) for n in re.findall(r"(\d+) (?:file|ins)", sizes)[:2])
        lines.append(f"{files:5}  {added:5}  {subject}")
    description = f"{cover.strip()}\n\n" + "\n".join(lines)
    git(repository, "config", f"branch.{BRANCH}.description", description)
    options = ("--cover-letter", "--cover-from-description=subject")
    export = ("format-patch", "--quiet", *options, "-o", patches, commits)
    git(repository, *export, identity=author)


def _prove(repository: Path, patches: Path) -> None:
    """Apply the patches to a fresh clone and compare the trees."""
    with tempfile.TemporaryDirectory() as folder:
        clone = Path(folder) / "vllm"
        pristine = ("--branch", PRISTINE)
        git(Path(folder), "clone", "--quiet", *pristine, repository.resolve(), clone)
        files = sorted(patches.glob("*.patch"))[1:]  # the first is the cover letter
        git(clone, "am", "--quiet", "--keep-non-patch", "--keep-cr", *files)
        if _tree(clone, "HEAD") != _tree(repository, BRANCH):
            raise OverlayError(
                f"`git am` of {patches} does not give the tree of {repository}"
            )


def _tree(repository: Path, revision: str) -> str:
    return git(repository, "rev-parse", f"{revision}^{{tree}}").strip()


def _identity(checkout: Path) -> dict[str, str] | None:
    """The name and address that git has for the checkout, if it has both."""
    # With the settings that `git` leaves out.
    command = ["git", "-C", str(checkout), "config", "--default", "", "--get"]
    found = {
        key: subprocess.check_output([*command, f"user.{key}"], text=True).strip()
        for key in ("name", "email")
    }
    return found if all(found.values()) else None


def _commit(
    repository: Path, message: str, author: Mapping[str, str], *options: str
) -> None:
    # --force: the source distribution holds files that vLLM's .gitignore lists.
    git(repository, "add", "--all", "--force")
    commit = ("commit", "--quiet", *options, "--message", message)
    git(repository, *commit, identity=author)
