# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""Which families of models are tested: a few, or all with `--all-models`."""

from pathlib import Path

import pytest

from tests.models.adopt import libraries
from tests.models.adopt.families import CONFIGS

# What differs most: windows, a scaled and tied embedding and Gemma's norms; learned
# positions and transposed weights; sinks, experts and biases.
FEW = ("gemma3", "gpt2", "gpt_oss")
# In an engine: capped logits too.
FEW_SERVED = (("gemma2", "bfloat16"), ("gpt_oss", "float32"), ("llama", "bfloat16"))
# In an engine of two ranks: experts; transposed weights.
FEW_SHARDED = (("mixtral", "bfloat16"), ("gpt2", "float32"))
# In an engine of two stages: a tied and scaled embedding, windows.
FEW_STAGED = (("gemma3", "bfloat16"),)
WITHOUT_STAGES = ("gpt2",)

# These need optional packages, which only all families are tested with.
WITH_ALL_MODELS = (
    "test_example.py",
    "test_libraries.py",
    "test_trainers.py",
    "test_trl.py",
)


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    every = config.getoption("--all-models", default=False)
    return True if collection_path.name in WITH_ALL_MODELS and not every else None


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    every = metafunc.config.getoption("--all-models", default=False)
    if "library_family" in metafunc.fixturenames:
        metafunc.parametrize("library_family", sorted(libraries.FAMILIES))
    elif "family_and_dtype" in metafunc.fixturenames:
        dtypes = ("float32", "bfloat16")
        whole = [(family, dtype) for family in sorted(CONFIGS) for dtype in dtypes]
        chosen = whole if every else FEW_SERVED
        metafunc.parametrize("family_and_dtype", chosen, ids="-".join)
    elif "sharded_and_dtype" in metafunc.fixturenames:
        whole = [(family, "float32") for family in sorted(CONFIGS)]
        chosen = whole if every else FEW_SHARDED
        metafunc.parametrize("sharded_and_dtype", chosen, ids="-".join)
    elif "staged" in metafunc.fixturenames:
        families = sorted({*(CONFIGS if every else FEW)} - {*WITHOUT_STAGES})
        metafunc.parametrize("staged", families)
    elif "staged_and_dtype" in metafunc.fixturenames:
        families = sorted({*CONFIGS} - {*WITHOUT_STAGES})
        whole = [(family, "float32") for family in families]
        chosen = whole if every else FEW_STAGED
        metafunc.parametrize("staged_and_dtype", chosen, ids="-".join)
    elif "family" in metafunc.fixturenames:
        chosen = sorted(CONFIGS) if every else FEW
        metafunc.parametrize("family", chosen, scope="module")
