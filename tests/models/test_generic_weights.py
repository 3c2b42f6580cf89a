# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""Weights that an engine is given, at its start and while it runs."""

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import (
    checkpoint_wrapper,
)

from tests.models.builder.models import (
    GENERIC,
    assert_trainer_agrees,
    greedy,
    save_generic,
)
from vllm import ModelRegistry
from vllm.model_executor.checkpoint.save import checkpoint_tensors
from vllm.model_executor.model_loader.reload import layerwise
from vllm.model_executor.models.generic_transformer import (
    GenericTransformerForCausalLM,
    GenericTransformerForCausalLMVLLM,
)

PROMPTS = [[1, 2, 3], [5, 6] * 20]


def build_wrapped(config, parallel_context):
    """As a trainer wraps it: a compiled module, one layer under checkpointing."""
    model = GenericTransformerForCausalLM(config, parallel_context)
    model.model.layers[0] = checkpoint_wrapper(model.model.layers[0])
    return torch.compile(model)


@torch.no_grad()
def perturb(model: nn.Module) -> None:
    for parameter in model.parameters():
        parameter.add_(torch.randn_like(parameter), alpha=0.05)


def reload(llm, **given) -> None:
    try:
        llm.collective_rpc("reload_weights", kwargs=given)
    finally:
        llm.reset_prefix_cache()


def test_refused_weights_leave_the_engine_as_it_was(make_llm, tmp_path, monkeypatch):
    """A tied model in wrappers. What is in order goes without a warning."""
    warned = []
    monkeypatch.setattr(
        layerwise.logger, "warning", lambda *given: warned.append(given)
    )
    model = save_generic(tmp_path, tie_word_embeddings=True)
    file = tmp_path / "model.safetensors"
    head, embedding = "lm_head.weight", "model.embed_tokens.weight"
    tensors = load_file(file)
    save_file(tensors | {head: tensors[embedding] + 1}, file)
    for target in (GenericTransformerForCausalLMVLLM, build_wrapped):
        ModelRegistry.register_model(GENERIC, target)
        with pytest.raises(ValueError, match="Tied in the model and different"):
            make_llm(tmp_path)
    save_file(tensors | {head: tensors[embedding].clone()}, file)
    llm = make_llm(tmp_path)
    assert_trainer_agrees(model, PROMPTS, greedy(llm, PROMPTS))

    def failing():
        yield from list(tensors.items())[:3]
        raise RuntimeError("the iterator fails")

    whole = file.read_bytes()
    file.write_bytes(whole[:-1])
    for given, error, message in (
        (
            {"weights_path": str(tmp_path)},
            ValueError,
            "model.safetensors is not a whol",
        ),
        (
            {"weights_path": "/no/such"},
            FileNotFoundError,
            "no model directory /no/such",
        ),
        ({"weights_iterator": failing()}, RuntimeError, "the iterator fails"),
        (
            {"weights_iterator": tensors},
            TypeError,
            "pairs, and instead of one 'model.e",
        ),
        (
            {"weights_iterator": [*tensors.items(), (head, tensors[embedding] + 1)]},
            ValueError,
            f"Tied in the model and different .*{embedding} and {head}",
        ),
    ):
        with pytest.raises(error, match=message):
            reload(llm, **given)
    assert_trainer_agrees(model, PROMPTS, greedy(llm, PROMPTS))

    perturb(model)
    reload(llm, weights_iterator=list(checkpoint_tensors(model)))
    assert_trainer_agrees(model, PROMPTS, greedy(llm, PROMPTS))
    perturb(model)
    model.save_pretrained(tmp_path)
    reload(llm, weights_path=str(tmp_path))
    assert_trainer_agrees(model, PROMPTS, greedy(llm, PROMPTS))
    assert not warned
