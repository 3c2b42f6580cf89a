# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""Models of other libraries, trained and served as they are."""

import copy
import json

import pytest
import torch
import torch.nn.functional as F

from tests.models.adopt.libraries import LENGTH, SIZES, VOCABULARY, make
from vllm import ModelRegistry, SamplingParams, training
from vllm.model_executor.models.builder.convention import logits_of
from vllm.training import parity

PROMPTS = [[5, 6, 7, 8, 9], [10, 11, 12], [3 + i % 90 for i in range(40)], [4]]
# fp32 sums in another order, through two layers.
TOLERANCE = dict(rtol=1e-4, atol=1e-5)


def _ids(*shape):
    generator = torch.Generator().manual_seed(1)
    return torch.randint(0, VOCABULARY, shape, generator=generator)


def test_logits_and_gradients(library_family):
    # On CPU torch's flex_attention has no gradients.
    model = make(library_family, attention="sdpa")
    adopted = training.adopt(make(library_family))
    ids = _ids(2, 11)
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


def assert_greedy_tokens(model, llm, tolerance):
    """Each token has the largest logit of the unmodified model, or nearly so."""
    sampling = SamplingParams(temperature=0, max_tokens=8, detokenize=False)
    prompts = [{"prompt_token_ids": prompt} for prompt in PROMPTS]
    for prompt, output in zip(PROMPTS, llm.generate(prompts, sampling)):
        tokens = prompt + list(output.outputs[0].token_ids)
        with torch.no_grad(), torch.compiler.set_stance("force_eager"):
            logits = logits_of(model(torch.tensor([tokens])))[0].float()
        for place in range(len(prompt), len(tokens)):
            row = logits[place - 1]
            assert row[tokens[place]] >= row.max() - tolerance


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
    assert_greedy_tokens(original, llm, 1e-4 if dtype == "float32" else 0.06)
    trainer = training.adopt(copy.deepcopy(original))
    report = parity.check(llm, trainer, PROMPTS, max_tokens=12)
    assert report.all_equal, report
