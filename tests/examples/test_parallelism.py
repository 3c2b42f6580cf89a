# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""The examples of parallel layers, ours and other libraries', on one pair of ranks."""

import contextlib
import importlib
import importlib.util
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from vllm.model_executor.parallel_context import ParallelContext

EXAMPLES = Path(__file__).parents[2] / "examples"


@pytest.fixture(scope="module")
def examples_path():
    sys.path.insert(0, str(EXAMPLES))
    yield
    sys.path.remove(str(EXAMPLES))


@pytest.fixture(scope="module")
def ranks(examples_path):
    with importlib.import_module("trainer_and_engine").TrainerRanks() as ranks:
        yield ranks


@pytest.fixture
def run(ranks, monkeypatch, tmp_path, capsys):
    """`run(name, *arguments)`: an example's output, its trainer being `ranks`."""

    def run(name, *arguments):
        example = importlib.import_module(name)
        shared = lambda: contextlib.nullcontext(ranks)  # noqa: E731
        monkeypatch.setattr(example, "TrainerRanks", shared)
        # Of the engine's workers, which nothing but the sampler would compile for.
        monkeypatch.setenv("TORCH_COMPILE_DISABLE", "1")
        example.main([*arguments, "--out", str(tmp_path)])
        return capsys.readouterr().out

    return run


def test_generic_model_parallelism(run):
    output = run("generic_model_parallelism")
    assert output.count("rank ") == 2
    assert "48 tokens" in output and "difference 0.0e+00 (equal bit for bit)" in output
    assert output.count("allowed") == 1
    assert output.endswith("all checks passed\n")


def test_the_whole_model_of_another_library(run):
    output = run("external_layers_megatron")
    assert "48 tokens" in output and output.endswith("all checks passed\n")


def test_absent_megatron_is_said(run, monkeypatch):
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda n, *_: None if n == "megatron" else find(n)
    )
    for example in (
        ("generic_model_parallelism", "library"),
        ("external_layers_megatron",),
    ):
        with pytest.raises(SystemExit, match="pip install megatron-core==0.16.1"):
            run(*example)


def test_ranks_that_do_not_divide_the_heads_are_refused(examples_path):
    example = importlib.import_module("generic_model_parallelism")
    config = SimpleNamespace(**importlib.import_module("trainer_and_engine").FIELDS)
    for build in (example.MyModelBuilder.build, example.build_with_libraries):
        with pytest.raises(ValueError, match="num_key_value_heads=2 .*tp_size=4 ranks"):
            build(config, ParallelContext(tp_size=4))


def test_an_error_of_a_rank_is_raised(ranks):
    with pytest.raises(RuntimeError, match=r"(?s)Rank [01] .*TypeError"):
        ranks.run(divmod, 0)  # called with the context
