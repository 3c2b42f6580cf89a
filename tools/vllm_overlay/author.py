# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""Authoring: the series as commits of a git repository, and commits as the series."""

import re
import shutil
import tempfile
from pathlib import Path

from vllm_overlay.base import BaseWheel
from vllm_overlay.common import OverlayError, git
from vllm_overlay.series import load_series

PRISTINE = "pristine"
_NAME_LENGTH = 52  # what `git format-patch` takes of a subject


def start_edit(base: BaseWheel, patches: Path, tree: Path) -> str:
    """Make a repository with the release as its first commit, then one a patch.

    Here a patch need not fit exactly, which is how edits by hand are mended.

    Args:
        base: The pinned release.
        patches: The folder of the series.
        tree: The folder to make.

    Returns:
        What was made, for people.
    """
    if tree.exists():
        raise OverlayError(f"{tree} exists; edit and save it, or delete it and retry")
    series = load_series(patches)
    tree.mkdir(parents=True)
    base.archive.extractall(tree, sorted(n for n in base.names if n.endswith(".py")))
    git(tree, "init", "--quiet")
    git(tree, "add", "--all", "--force")
    git(tree, "commit", "--quiet", "--message", "The release of base.lock")
    git(tree, "tag", PRISTINE)
    try:
        for patch in series.patches:
            git(tree, "apply", "--index", "--whitespace=nowarn", patch.path.resolve())
            git(tree, "commit", "--quiet", "--cleanup=verbatim", "-m", patch.message)
    except OverlayError:
        shutil.rmtree(tree)  # saved, it would drop the patches that it lacks
        raise
    count = len(series.patches)
    return f"{tree}: the release has the tag '{PRISTINE}', {count} commits follow"


def save(tree: Path, patches: Path) -> str:
    """Make the series of the commits that follow the release.

    Args:
        tree: A repository that ``start_edit`` made.
        patches: The folder of the series, whose patches are replaced.

    Returns:
        What was made, for people.

    Raises:
        OverlayError: If a commit makes no valid patch. Nothing is written then.
    """
    if changes := git(tree, "status", "--porcelain"):
        raise OverlayError(f"{tree} has changes to commit, nothing written:\n{changes}")
    # --minimal finds a difference that only adds lines whenever there is one.
    diff = ("diff", "--unified=1", "--minimal", "--full-index", "--no-renames")
    commits = git(tree, "rev-list", "--reverse", f"{PRISTINE}..HEAD").split()
    with tempfile.TemporaryDirectory() as folder:
        for number, commit in enumerate(commits, start=1):
            log = git(tree, "log", "-1", "--format=%f%n%B", commit)
            name, _, message = log.partition("\n")
            text = git(tree, *diff, f"{commit}^", commit)
            text = re.sub(r"^(@@ .+? @@).*", r"\1", text, flags=re.MULTILINE)
            (Path(folder) / f"{number:04}-{name[:_NAME_LENGTH]}.patch").write_bytes(
                f"Subject: {message.strip()}\n\n{text}".encode()
            )
        new = load_series(Path(folder))
        for path in patches.glob("*.patch"):
            path.unlink()
        for patch in new.patches:
            shutil.copy(patch.path, patches)
    return f"{patches}: {len(commits)} patches written"
