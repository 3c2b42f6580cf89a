# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""The layers under what trainers put around a model, on a whole model."""

import copy
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from vllm.model_executor.layers.training import token_logprobs
from vllm.model_executor.models.generic_transformer import (
    GenericTransformerConfig,
    GenericTransformerForCausalLM,
)
from vllm.model_executor.parallel_context import ParallelContext

VOCAB, LENGTHS = 61, (5, 1, 12, 7)
CONFIG = GenericTransformerConfig(
    vocab_size=VOCAB,
    hidden_size=64,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=64,
    initializer_range=0.2,
)


@pytest.fixture
def model(device):
    torch.manual_seed(0)
    return GenericTransformerForCausalLM(CONFIG, ParallelContext.single()).to(device)


@pytest.fixture
def packed(device):
    """Token ids, targets and cu_seqlens of several sequences."""
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(VOCAB, (2, sum(LENGTHS)), generator=generator).to(device)
    lengths = torch.tensor([0, *LENGTHS], device=device)
    return ids[0], ids[1], lengths.cumsum(0, dtype=torch.int32)


def loss_of(model, packed):
    ids, targets, cu_seqlens = packed
    hidden_states = model.model(ids, None, cu_seqlens, max(LENGTHS))
    return -token_logprobs(hidden_states, model.lm_head, targets).sum()


def gradients(model):
    grads = {name: p.grad for name, p in model.named_parameters()}
    for parameter in model.parameters():
        parameter.grad = None
    assert all(grad is not None for grad in grads.values())
    return grads


def expected_gradients(model, packed):
    loss_of(model, packed).backward()
    return gradients(model)


def assert_close(actual, expected, eps):
    """Sums of a few hundred products in another order."""
    for name, value in expected.items():
        error = (actual[name] - value).abs().max()
        assert error <= 64 * eps * value.abs().max(), name


def test_compiled_as_one_graph(model, packed):
    expected = expected_gradients(model, packed)
    expected_loss = loss_of(model, packed)
    with torch._dynamo.config.patch(disable=False):
        compiled = torch.compile(loss_of, fullgraph=True)
        loss = compiled(model, packed)
        loss.backward()
    torch.testing.assert_close(loss, expected_loss, rtol=1e-5, atol=0)
    assert_close(gradients(model), expected, torch.finfo(torch.float32).eps)


def test_activation_checkpointing_changes_nothing(model, packed, assert_equal):
    expected = expected_gradients(model, packed)
    ids, targets, cu_seqlens = packed
    hidden_states = checkpoint(
        model.model, ids, None, cu_seqlens, max(LENGTHS), use_reentrant=False
    )
    loss = checkpoint(
        lambda h: -token_logprobs(h, model.lm_head, targets).sum(),
        hidden_states,
        use_reentrant=False,
    )
    loss.backward()
    for name, grad in gradients(model).items():
        assert_equal(name, grad, expected[name])


def test_autocast_reaches_every_parameter(model, packed, device):
    expected = expected_gradients(model, packed)
    with torch.autocast(device.type, torch.bfloat16):
        loss = loss_of(model, packed)
    loss.backward()
    assert loss.dtype == torch.float32
    grads = gradients(model)
    assert all(grad.dtype == torch.float32 for grad in grads.values())
    for name, value in expected.items():
        error = (grads[name] - value).norm() / value.norm()
        # Two layers of a few roundings of 2^-9 each, and the head.
        assert 0 < error < 32 * 2**-9, name


def test_gradients_accumulate(model, packed, assert_equal):
    expected = expected_gradients(model, packed)
    for _ in range(2):
        loss_of(model, packed).backward()
    for name, grad in gradients(model).items():
        assert_equal(name, grad, 2 * expected[name])


@pytest.mark.parametrize("mode", [torch.inference_mode, torch.no_grad])
def test_without_gradients_the_bits_are_the_same(model, packed, mode, assert_equal):
    expected = loss_of(model, packed).detach()
    with mode():
        assert_equal("loss", loss_of(model, packed), expected)


def test_fused_adamw_moves_every_parameter(model, packed):
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, fused=True)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    losses = []
    for _ in range(5):
        loss = loss_of(model, packed)
        losses.append(loss.item())
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert losses[-1] < 0.8 * losses[0]
    for name, parameter in model.named_parameters():
        assert not torch.equal(parameter, before[name]), name


def test_copies_are_independent(model, packed, assert_equal):
    expected = loss_of(model, packed)
    clone = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    assert_equal("loss", loss_of(clone, packed), expected)


def test_save_and_load(model, packed, tmp_path, assert_equal):
    torch.save(model.state_dict(), tmp_path / "model.pt")
    torch.save(model, tmp_path / "whole.pt")
    other = GenericTransformerForCausalLM(CONFIG, ParallelContext.single())
    other.load_state_dict(torch.load(tmp_path / "model.pt"))
    expected = loss_of(model, packed)
    assert_equal("loss", loss_of(other.to(packed[0].device), packed), expected)
    whole = torch.load(tmp_path / "whole.pt", weights_only=False)
    assert_equal("loss", loss_of(whole, packed), expected)


def test_built_on_meta(model, packed, device, assert_equal):
    with torch.device("meta"):
        other = GenericTransformerForCausalLM(CONFIG, ParallelContext.single())
    assert all(parameter.is_meta for parameter in other.parameters())
    other.to_empty(device=device)
    torch.manual_seed(2)
    other.reset_parameters()
    for layer in other.modules():
        if isinstance(layer, nn.Module) and hasattr(layer, "variance_epsilon"):
            layer.reset_parameters()
    other.load_state_dict(model.state_dict())
    assert_equal("loss", loss_of(other, packed), loss_of(model, packed))


def test_mixed_weights_and_activations(model, packed, device):
    """bf16 weights with fp32 norms, as some trainers keep them."""
    model.to(torch.bfloat16)
    for layer in model.modules():
        if hasattr(layer, "variance_epsilon"):
            layer.to(torch.float32)
    loss_of(model, packed).backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad.dtype == parameter.dtype, name
        assert parameter.grad.ne(0).any(), name


def test_two_data_parallel_ranks(run_on_two_ranks):
    """DDP, FSDP2 and distributed checkpoints."""
    run_on_two_ranks(Path(__file__).with_name("data_parallel_checks.py"))
