# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""The steps that run the tests in vLLM's CI."""

import re
from typing import Any

import yaml

from vllm_overlay.common import CHECKOUT

GROUP = yaml.safe_load((CHECKOUT / ".buildkite/test_areas/training.yaml").read_text())
STEPS: list[dict[str, Any]] = GROUP["steps"]
# The keys of a step in the other files of vLLM's .buildkite/test_areas.
KEYS = {
    *("label", "key", "depends_on", "device", "num_devices", "no_plugin", "optional"),
    *("timeout_in_minutes", "working_dir", "source_file_dependencies", "commands"),
}


def paths_under_test(step: dict[str, Any]) -> list[str]:
    """What a step's pytest calls are given."""
    commands = " ".join(step["commands"])
    assert "pytest" in commands
    return re.findall(r"(?<=\s)tests/[\w/.]+", commands)


def test_the_steps_have_the_format() -> None:
    assert set(GROUP) == {"group", "depends_on", "steps"}
    assert all(set(step) <= KEYS for step in STEPS)
    assert len({step["key"] for step in STEPS}) == len(STEPS)
    devices = [(step["device"], step.get("num_devices", 1)) for step in STEPS]
    assert devices == [("intel_cpu", 1), ("h200_35gb", 1), ("h100", 2), ("h100", 4)]


def test_every_path_exists() -> None:
    for step in STEPS:
        for path in [*step["source_file_dependencies"], *paths_under_test(step)]:
            assert (CHECKOUT / path).exists(), f"{step['key']}: {path}"


def test_the_cpu_runs_every_test_of_the_engine_and_the_layers() -> None:
    paths = tuple(paths_under_test(STEPS[0]))
    here = ("tests/tools/", "tests/benchmarks/", "tests/docs/", "tests/examples/")
    for file in CHECKOUT.glob("tests/**/test_*.py"):
        name = file.relative_to(CHECKOUT).as_posix()
        assert name.startswith((*paths, *here)), f"no step of the CPU runs {name}"
