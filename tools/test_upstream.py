# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""Run vLLM's own tests with and without the patches and compare the outcomes.

The tests are those of vLLM's source distribution, selected in
tests/upstream_selection.toml. Exits 1 if any outcome differs.
"""

import collections
import json
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
import tomllib
import zipfile
from pathlib import Path

TOOLS = Path(__file__).resolve().parent
sys.path.insert(0, str(TOOLS))

from vllm_overlay import installed  # noqa: E402
from vllm_overlay.base import fetch  # noqa: E402
from vllm_overlay.common import CHECKOUT, OverlayError  # noqa: E402

SELECTION = CHECKOUT / "tests" / "upstream_selection.toml"
MINIMUM = 300
Outcomes = dict[str, str]


def unpack_sources(folder: Path) -> Path:
    """All of vLLM's source tree but the package, which must not be imported from it."""
    with tarfile.open(fetch("source")) as archive:
        members = [
            member
            for member in archive.getmembers()
            if member.name.split("/")[1:2] not in (["vllm"], ["csrc"], ["rust"])
        ]
        archive.extractall(folder, members, filter="data")
    (root,) = folder.iterdir()
    return root


def make_trees(folder: Path) -> dict[str, Path]:
    """The release unpacked, as it is and with the overlay."""
    pristine, patched = folder / "pristine", folder / "patched"
    with zipfile.ZipFile(fetch("cpu")) as archive:
        archive.extractall(pristine)
    shutil.copytree(pristine, patched, copy_function=os.link)
    installed.apply(patched, CHECKOUT, False)
    return {"pristine": pristine, "patched": patched}


def run_tests(name: str, tree: Path, sources: Path, folder: Path) -> Outcomes:
    """Run the selection against the vLLM in `tree`.

    Args:
        name: Of the tree, for messages and files.
        tree: Comes first on the path.
        sources: vLLM's source tree, in which the tests run.
        folder: Gets caches, the log and the outcomes.

    Raises:
        OverlayError: The tests would import another vLLM.
    """
    home = folder / f"home-{name}"
    home.mkdir(parents=True)
    outcomes = folder / f"{name}.jsonl"
    path = [tree, TOOLS, sources / "tests" / "vllm_test_utils"]
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join(map(str, path)),
        "OUTCOMES": str(outcomes),
        "XDG_CACHE_HOME": str(home),
        "HF_HOME": str(home / "huggingface"),
        "VLLM_CACHE_ROOT": str(home / "vllm"),
        "VLLM_CONFIG_ROOT": str(home / "config"),
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "HF_HUB_OFFLINE": "1",
    }
    command = [sys.executable, "-c", "import vllm; print(vllm.__file__)"]
    imported = subprocess.run(
        command, env=environment, cwd=sources, capture_output=True, text=True
    ).stdout.strip()
    if not imported.endswith(str(tree / "vllm" / "__init__.py")):
        raise OverlayError(f"the tests of {name} would import vLLM from {imported!r}")
    tests = tomllib.loads(SELECTION.read_text(encoding="utf-8"))["tests"]
    command = [sys.executable, "-m", "pytest", "-q", "--tb=short", "--timeout=120"]
    command += ["-p", "no:cacheprovider", "-p", "upstream_outcomes"]
    command += [f"tests/{test}" for test in tests]
    log = folder / f"{name}.log"
    print(f"{name}: {len(tests)} files, log in {log}", flush=True)
    # The path of a socket, such as one of Ray's, has a hundred characters at most.
    short = tempfile.TemporaryDirectory(ignore_cleanup_errors=True)
    with log.open("w") as output, short as temporary:
        subprocess.run(
            command,
            env=environment | {"TMPDIR": temporary},
            cwd=sources,
            stdout=output,
            stderr=output,
        )
    return read_outcomes(outcomes)


def read_outcomes(path: Path) -> Outcomes:
    """The last outcome of each test, but never a better one after `failed`."""
    result: Outcomes = {}
    if not path.exists():
        return result
    for line in path.read_text(encoding="utf-8").splitlines():
        test, outcome = json.loads(line)
        if result.get(test) != "failed":
            result[test] = outcome
    return result


def compare(pristine: Outcomes, patched: Outcomes, unstable: set[str]) -> list[str]:
    """What is wrong with the two runs, a line each.

    Args:
        pristine: Outcomes without the patches.
        patched: Outcomes with them.
        unstable: Tests that are not compared.
    """
    problems = []
    for test in sorted((pristine.keys() | patched.keys()) - unstable):
        before = pristine.get(test, "absent")
        after = patched.get(test, "absent")
        if before != after:
            problems.append(f"{test}: {before} without the patches, {after} with them")
    both = sum(
        outcome == patched.get(test) == "passed" for test, outcome in pristine.items()
    )
    if both < MINIMUM:
        problems.append(
            f"only {both} tests passed on both sides; at least {MINIMUM} have to, "
            "for the comparison to mean something"
        )
    return problems


def main() -> int:
    """Run the comparison."""
    folder = CHECKOUT / "build" / "upstream"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    try:
        sources = unpack_sources(folder / "source")
        runs = {
            name: run_tests(name, tree, sources, folder)
            for name, tree in make_trees(folder).items()
        }
    except OverlayError as error:
        print(f"test_upstream.py: error: {error}", file=sys.stderr)
        return 1
    for name, outcomes in runs.items():
        counts = collections.Counter(outcomes.values())
        summary = ", ".join(f"{count} {what}" for what, count in counts.most_common())
        print(f"{name:8}: {len(outcomes)} tests, {summary}")
    unstable = set(tomllib.loads(SELECTION.read_text(encoding="utf-8"))["unstable"])
    problems = compare(runs["pristine"], runs["patched"], unstable)
    print("\n".join(problems) or "equal, test by test")
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
