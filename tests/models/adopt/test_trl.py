# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""TRL's GRPO with an adopted model: trainer and colocated engine have the same bits."""

import json
import os
import sys
from pathlib import Path

import pytest
import transformers
import trl
from datasets import Dataset

from tests.forks import run_python
from tests.models.adopt.families import make
from tests.models.gpus import skip_without_gpus
from vllm import training
from vllm.model_executor.parallel_context import ParallelContext
from vllm.training.trl import GRPOTrainer

HERE = Path(__file__).parent
ROOT = HERE.parents[2]
EXAMPLE = ROOT / "examples" / "trl_grpo.py"
ENVIRONMENT = {"VLLM_BATCH_INVARIANT": "1", "PYTHONPATH": os.pathsep.join(sys.path)}


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory):
    """Where the example has written a report and a model."""
    folder = tmp_path_factory.mktemp("trl")
    done = run_python(
        [EXAMPLE, "--steps", 16, "--out", folder],
        timeout=500,
        # Traced, but not compiled to C++.
        env=os.environ | ENVIRONMENT | {"VLLM_CPU_CI_ENV": "1"},
    )
    assert done.returncode == 0, f"{done.stdout[-2000:]}\n{done.stderr[-4000:]}"
    return folder / "model"


def test_the_example(model_dir):
    report = json.loads((model_dir.parent / "report.json").read_text())
    assert report["steps"] == len(report["kl"]) == 16
    assert report["kl_max"] == report["max_abs_logprob_difference"] == 0
    # Random digits earn a twelfth.
    assert sum(report["rewards"][-4:]) > 1.5 * sum(report["rewards"][:4]) > 0
    image = (model_dir.parent / "report.png").read_bytes()
    assert image.startswith(b"\x89PNG")


def test_two_ranks(model_dir):
    skip_without_gpus(2)
    # vLLM's memory for collectives has one name in all jobs of an external launcher,
    # and stays when a job has ended.
    for left in Path("/dev/shm").glob("-tp:0-*-cpushm_*"):
        left.unlink()
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", 2]
    done = run_python(
        [*torchrun, HERE / "trl_checks.py", model_dir],
        timeout=400,
        env=os.environ | ENVIRONMENT | {"OMP_NUM_THREADS": "1"},
        cwd=model_dir.parent,
    )
    report = done.stdout + done.stderr
    assert done.returncode == 0, report[-6000:]
    assert report.count("passed on rank") == 2


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({}, "use_vllm=False"),
        ({"use_vllm": True, "vllm_mode": "server"}, "vllm_mode='server'"),
        ({"use_vllm": True}, "bf16=True is TRL's default"),
        ({"use_vllm": True, "bf16": False, "cast_lm_head_to_fp32": True}, "lm_head"),
        (
            {"use_vllm": True, "bf16": False, "vllm_model_impl": "transformers"},
            "vllm_model_impl='transformers'",
        ),
        (
            {"use_vllm": True, "bf16": False, "vllm_tensor_parallel_size": 2},
            "adopted for an engine of tensor-parallel size 1",
        ),
        ({"use_vllm": True, "bf16": False}, "name_or_path is empty"),
    ],
)
def test_settings_by_which_engine_and_trainer_would_differ(
    settings, message, tmp_path, monkeypatch, model_dir
):
    # TRL leaves its settings in the environment.
    monkeypatch.setattr(os, "environ", os.environ.copy())
    model = training.adopt(make("qwen3"), parallel_context=ParallelContext.single())
    tokenizer = transformers.AutoTokenizer.from_pretrained(model_dir)
    args = trl.GRPOConfig(output_dir=str(tmp_path), use_cpu=True, **settings)
    with pytest.raises(ValueError, match=message):
        GRPOTrainer(
            model,
            len,
            args,
            train_dataset=Dataset.from_dict({"prompt": ["1"]}),
            processing_class=tokenizer,
        )
