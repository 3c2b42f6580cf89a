# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""Models of other libraries, trained and served as they are."""

import copy
import json

import pytest
import torch
import torch.nn.functional as F

from tests.models.adopt.inputs import PROMPTS, assert_greedy_tokens, token_ids
from tests.models.adopt.libraries import LENGTH, SIZES, make
from vllm import ModelRegistry, training
from vllm.model_executor.models.builder.convention import logits_of
from vllm.training import parity

# fp32 sums in another order, through two layers.
TOLERANCE = dict(rtol=1e-4, atol=1e-5)


def test_logits_and_gradients(library_family):
    # On CPU torch's flex_attention has no gradients.
    model = make(library_family, attention="sdpa")
    adopted = training.adopt(make(library_family))
    ids = token_ids(2, 11)
    logits = [logits_of(each(ids)) for each in (model, adopted)]
    torch.testing.assert_close(*logits, **TOLERANCE)
    targets = ids[:, 1:].flatten()
    for each in logits:
        F.cross_entropy(each[:, :-1].flatten(0, 1), targets).backward()
    for (name, p), q in zip(
        adopted.named_parameters(), model.parameters(), strict=True
    ):
        error = (p.grad - q.grad).abs().max()
        assert error <= 1e-4 * q.grad.abs().max() + 1e-10, name


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_same_bits(make_llm, tmp_path, monkeypatch, library_family, dtype):
    monkeypatch.setenv("VLLM_BATCH_INVARIANT", "1")
    original = make(library_family, getattr(torch, dtype))
    training.save_checkpoint(original, tmp_path)
    config = {"architectures": ["Adopted"], **SIZES}
    (tmp_path / "config.json").write_text(json.dumps(config))
    ModelRegistry.register_model(
        "Adopted",
        lambda config: training.adopt(make(library_family, torch.get_default_dtype())),
    )
    llm = make_llm(
        tmp_path,
        dtype=dtype,
        max_model_len=LENGTH,
        max_num_batched_tokens=LENGTH,
        max_num_seqs=8,
    )

    def logits(ids):
        with torch.compiler.set_stance("force_eager"):
            return logits_of(original(ids))

    assert_greedy_tokens(logits, llm, 1e-4 if dtype == "float32" else 0.06)
    trainer = training.adopt(copy.deepcopy(original))
    report = parity.check(llm, trainer, PROMPTS, max_tokens=12)
    assert report.all_equal, report
