# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""Adopted models in trainers of others: DDP, FSDP2, transformers and accelerate."""

import copy
import os
import sys
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from transformers import AutoModelForCausalLM, Trainer, TrainingArguments

from tests.forks import run_python
from tests.models.adopt.families import CONFIGS, VOCABULARY, make
from tests.models.gpus import skip_without_gpus
from vllm import training

HERE = Path(__file__).parent
# Losses after a few steps of SGD, of fp32 sums in another order.
TOLERANCE = dict(rtol=1e-4, atol=0)


@pytest.fixture(scope="module")
def rows():
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(3, VOCABULARY, (16, 11), generator=generator)
    return [{"input_ids": row, "labels": row} for row in ids]


def test_two_ranks(tmp_path):
    skip_without_gpus(2)
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", 2]
    done = run_python(
        [*torchrun, HERE / "parallel_checks.py", tmp_path, *sorted(CONFIGS)],
        timeout=500,
        env=os.environ
        | {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)},
        cwd=tmp_path,
    )
    report = done.stdout + done.stderr
    assert done.returncode == 0, report[-6000:]
    assert report.count("passed on rank") == 2


def losses_of_trainer(model, rows, folder, checkpointing):
    args = TrainingArguments(
        output_dir=str(folder),
        use_cpu=True,
        optim="sgd",
        learning_rate=0.1,
        lr_scheduler_type="constant",
        max_grad_norm=0.0,
        per_device_train_batch_size=4,
        gradient_accumulation_steps=2,
        max_steps=3,
        logging_steps=1,
        gradient_checkpointing=checkpointing,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
    )
    trainer = Trainer(model, args, train_dataset=rows)
    trainer.train()
    trainer.save_model()
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


@pytest.mark.parametrize("checkpointing", [False, True])
def test_transformers_trainer(family, rows, tmp_path, checkpointing):
    original = make(family)
    model = training.adopt(copy.deepcopy(original))
    losses = losses_of_trainer(model, rows, tmp_path, checkpointing)
    expected = losses_of_trainer(original, rows, tmp_path / "original", False)
    assert len(losses) == 3 and losses[2] < losses[0]
    torch.testing.assert_close(losses, expected, **TOLERANCE)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    for (name, parameter), saved in zip(
        model.named_parameters(), loaded.parameters(), strict=True
    ):
        assert torch.equal(parameter, saved), name


def test_accelerate(family, rows):
    original = make(family)
    found = []
    for model in (original, training.adopt(copy.deepcopy(original))):
        accelerator = Accelerator(cpu=True, gradient_accumulation_steps=2)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        loader = torch.utils.data.DataLoader(rows, batch_size=4)
        model, optimizer, loader = accelerator.prepare(model.train(), optimizer, loader)
        losses = []
        for batch in loader:
            with accelerator.accumulate(model):
                loss = model(**batch, use_cache=False).loss
                accelerator.backward(loss)
                accelerator.clip_grad_norm_(model.parameters(), 1.0)
                optimizer.step()
                optimizer.zero_grad()
            losses.append(loss.detach())
        found.append(torch.stack(losses))
    torch.testing.assert_close(found[1], found[0], **TOLERANCE)
