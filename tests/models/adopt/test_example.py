# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""The example that adopts a class of transformers, with a second of training."""

import os
from pathlib import Path

import pytest

from tests.forks import run_python

EXAMPLE = Path(__file__).parents[3] / "examples" / "adopt.py"


@pytest.mark.parametrize("model_class", ["Qwen3ForCausalLM", "DeepseekV3ForCausalLM"])
def test_the_example(model_class, tmp_path):
    done = run_python(
        [EXAMPLE, model_class, "--seconds", 1, "--out", tmp_path],
        timeout=500,
        env=os.environ | {"VLLM_ENABLE_V1_MULTIPROCESSING": "1"},
    )
    output = f"{done.stdout[-4000:]}\n{done.stderr[-4000:]}"
    assert done.returncode == 0, output
    assert "VocabParallelEmbedding" in done.stdout, output
    assert "equal bit for bit     320" in done.stdout, output


def test_a_class_that_is_none(tmp_path):
    done = run_python([EXAMPLE, "BertModel", "--out", tmp_path], timeout=300)
    assert done.returncode != 0
    assert "BertModel is no class of transformers for causal" in done.stderr
