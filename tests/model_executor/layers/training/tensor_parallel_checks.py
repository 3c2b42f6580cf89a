# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""Layers over several tensor-parallel ranks against one rank alone.

Run on each rank by `test_tensor_parallel.py`.
"""

import pytest
import torch

from tests.model_executor.layers.training.parallel_model import (
    HIDDEN,
    TOKENS,
    VOCAB,
    local,
    make_batch,
    make_model,
    results,
    shardings_of,
)
from vllm.config import VllmConfig, set_current_vllm_config
from vllm.model_executor.layers.training import (
    ColumnParallelLinear,
    MergedColumnParallelLinear,
    ParallelLMHead,
    QKVParallelLinear,
    RowParallelLinear,
    VocabParallelEmbedding,
    communication,
    token_logprobs,
    weighted_nll,
)
from vllm.model_executor.layers.training.logprobs import full_logprobs
from vllm.model_executor.layers.training.ops.logprobs import blocks as block_sizes
from vllm.model_executor.parallel_context import ParallelContext

pytestmark = pytest.mark.usefixtures("on_the_ranks_device")


@pytest.fixture
def many_blocks(monkeypatch):
    """`token_logprobs` in blocks smaller than the batch."""
    blocks = block_sizes.Blocks(10 * VOCAB, 3 * VOCAB, 100, 9, 1, 10 * VOCAB)
    monkeypatch.setattr(block_sizes, "CPU_BLOCKS", blocks)
    monkeypatch.setattr(block_sizes, "CUDA_BLOCKS", blocks)


@pytest.mark.parametrize("sequence_parallel", [False, True])
@pytest.mark.parametrize(
    ("num_kv_heads", "tied", "through_logits"),
    [
        (4, False, False),
        (4, True, True),
        (2, False, True),
        (2, True, False),
        (1, False, False),
        (1, True, True),
    ],
)
def test_gradients_are_those_of_one_rank(
    context,
    num_kv_heads,
    tied,
    through_logits,
    sequence_parallel,
    many_blocks,
    assert_as_accurate,
):
    single = ParallelContext.single()
    options = {"tied": tied}
    model = make_model(
        context, num_kv_heads, sequence_parallel=sequence_parallel, **options
    )
    shardings = shardings_of(model)
    actual = results(model, through_logits=through_logits)
    in_fp64 = results(
        make_model(
            context, num_kv_heads, sequence_parallel=sequence_parallel, **options
        ).double(),
        through_logits=through_logits,
    )
    plain_model = make_model(single, num_kv_heads, **options)
    plain = results(plain_model, through_logits=through_logits)
    exact_model = make_model(single, num_kv_heads, **options).double()
    exact = results(exact_model, through_logits=through_logits)

    assert actual.keys() == plain.keys() == shardings.keys() | {"logprobs"}
    for name, tensor in actual.items():
        expected = [
            local(each[name], shardings.get(name), context) for each in (plain, exact)
        ]
        assert_as_accurate(name, tensor, *expected)
        assert_as_accurate_in_fp64(name, in_fp64[name], *expected)


def assert_as_accurate_in_fp64(name, actual, plain, exact):
    """Another order of sums in fp64 errs as plain fp32 does, times the ratio of eps.

    By a factor of eight at most, and the rounding of the result itself.
    """
    assert actual.dtype == torch.float64 and actual.shape == exact.shape, name
    if not exact.numel():
        return
    in_fp32 = (plain.double() - exact).square().mean().sqrt()
    eps, eps32 = (torch.finfo(d).eps for d in (torch.float64, torch.float32))
    bound = 8 * eps / eps32 * in_fp32 + eps * exact.square().mean().sqrt()
    error = (actual - exact).square().mean().sqrt()
    assert error <= bound, f"{name}: RMS error {error:.3e} > {bound:.3e}"


@pytest.mark.parametrize("sequence_parallel", [False, True])
@pytest.mark.parametrize("num_kv_heads", [2, 1])
def test_replicas_have_equal_bits(
    context, num_kv_heads, sequence_parallel, assert_equal
):
    model = make_model(context, num_kv_heads, sequence_parallel=sequence_parallel)
    gradients = results(model)
    replicated = {
        name: (gradients[name], context.tp_size)
        for name, sharding in shardings_of(model).items()
        if sharding.dim is None
    }
    assert len(replicated) == 6
    qkv = model.attention.qkv_proj
    for name in ("weight", "bias"):
        name = f"attention.qkv_proj.{name}"
        replicated[name] = gradients[name][qkv.q_size :], qkv.num_kv_head_replicas
    for name, (gradient, count) in replicated.items():
        of_ranks = communication.all_gather(gradient[None], context.tp_group, 0)
        first = context.tp_rank // count * count
        assert_equal(name, gradient, of_ranks[first])


@pytest.mark.parametrize("sequence_parallel", [False, True])
def test_every_parameter_gets_a_gradient(context, sequence_parallel):
    model = make_model(context, sequence_parallel=sequence_parallel)
    results(model)
    tokens = max(0, VOCAB - model.head.vocab_start_index)
    for layer in (model.embedding, model.head):
        for parameter in layer.parameters():
            assert parameter[tokens:].eq(0).all()
            assert parameter.grad[tokens:].eq(0).all()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        if tokens or not name.startswith(("embedding", "head")):
            assert parameter.grad.ne(0).any(), name


def test_frozen_parameters_and_inputs_get_none(context):
    """As with adapters: only what needs a gradient is computed and communicated."""
    layer = ColumnParallelLinear(HIDDEN, 16, parallel_context=context)
    layer.weight.requires_grad_(False)
    x = torch.randn(TOKENS, HIDDEN, requires_grad=True)
    layer(x).sum().backward()
    assert layer.weight.grad is None and layer.bias.grad.eq(TOKENS).all()
    total = communication.all_reduce(layer.weight.sum(0), context.tp_group)
    torch.testing.assert_close(x.grad, total.expand_as(x))
    layer.weight.requires_grad_(True)
    x = x.detach()
    layer(x).sum().backward()
    torch.testing.assert_close(layer.weight.grad, x.sum(0).expand_as(layer.weight))


def test_forward_runs_in_inference_mode(context, assert_equal):
    *inputs, targets, _ = make_batch()
    model = make_model(context)
    expected = model(*inputs).detach()
    with torch.inference_mode():
        assert_equal("hidden", model(*inputs), expected)
        token_logprobs(expected, model.head, targets)


@pytest.mark.parametrize("called", [False, True])
@pytest.mark.parametrize("sequence_parallel", [False, True])
def test_entropy_and_full_rows_are_those_of_one_rank(
    context, sequence_parallel, called, many_blocks, assert_as_accurate
):
    *_, targets, grad = make_batch()
    generator = torch.Generator().manual_seed(6)
    whole = torch.randn(TOKENS, HIDDEN, generator=generator, device="cpu")
    whole = whole.to(targets.device)

    def results(context, dtype, rows):
        torch.manual_seed(3)
        kwargs = {"params_dtype": torch.float32, "parallel_context": context}
        head = ParallelLMHead(
            VOCAB, HIDDEN, True, sequence_parallel=sequence_parallel, **kwargs
        ).to(dtype)
        if called:
            head.register_forward_hook(lambda _, args, logits: 2 * logits.tanh())
        inputs = [whole[rows].to(dtype).requires_grad_(), head.weight, head.bias]
        g = grad.to(dtype)
        logprobs, entropy = token_logprobs(
            inputs[0], head, targets, temperature=0.7, return_entropy=True
        )
        full = full_logprobs(inputs[0], head, temperature=0.7)
        batch = torch.stack([inputs[0], inputs[0]])
        both = token_logprobs(batch, head, targets.expand(2, -1), temperature=0.7)
        torch.testing.assert_close(both, logprobs.expand(2, -1))
        loss = (g * (logprobs + 2 * entropy)).sum() + (g * full.square().sum(-1)).sum()
        gradients = torch.autograd.grad(loss, inputs)
        nll, _ = weighted_nll(inputs[0], head, targets, g, temperature=0.7)
        gradients += torch.autograd.grad(nll, inputs)
        return (logprobs, entropy, full, nll, *gradients), head.parameter_sharding()

    single, rows = ParallelContext.single(), slice(None)
    if sequence_parallel:
        each = TOKENS // context.tp_size
        rows = slice(context.tp_rank * each, (context.tp_rank + 1) * each)
    actual, shardings = results(context, torch.float32, rows)
    plain = results(single, torch.float32, slice(None))[0]
    exact = results(single, torch.float64, slice(None))[0]
    names = ("logprobs", "entropy", "full", "nll", *("hidden", "weight", "bias") * 2)
    for name, tensor, *expected in zip(names, actual, plain, exact):
        if name == "hidden":
            expected = [each[rows] for each in expected]
        expected = [local(each, shardings.get(name), context) for each in expected]
        assert_as_accurate(name, tensor, *expected)


@pytest.mark.parametrize("num_kv_heads", [2, 1])
def test_vllms_loaders_cut_the_same_shards(
    context, vllm_groups, num_kv_heads, assert_equal
):
    kwargs = {"parallel_context": context}
    layers = {
        "column": ColumnParallelLinear(HIDDEN, 48, **kwargs),
        "row": RowParallelLinear(48, HIDDEN, **kwargs),
        "merged": MergedColumnParallelLinear(HIDDEN, [48, 16], **kwargs),
        "qkv": QKVParallelLinear(HIDDEN, 8, 4, num_kv_heads, **kwargs),
        "embedding": VocabParallelEmbedding(VOCAB, HIDDEN, **kwargs),
        "head": ParallelLMHead(VOCAB, HIDDEN, True, **kwargs),
    }
    config = VllmConfig()
    with set_current_vllm_config(config):
        bound = {
            name: layer.bind_engine(config, name) for name, layer in layers.items()
        }
    for name, layer in layers.items():
        engine = dict(bound[name].named_parameters())
        assert engine.keys() == dict(layer.named_parameters()).keys()
        for key, sharding in layer.parameter_sharding().items():
            full = torch.randn(sharding.shape)
            parts = [full]
            if sharding.dim is not None:
                sizes = [part.size for part in sharding.parts]
                parts = full.split(sizes, sharding.dim)
            for part, tensor in zip(sharding.parts, parts, strict=True):
                shard_id = [] if part.shard_id is None else [part.shard_id]
                loader = getattr(engine[key], "weight_loader", default_loader)
                loader(engine[key], tensor, *shard_id)
            expected = local(full, sharding, context)
            if name in ("embedding", "head"):
                # vLLM pads the shard's rows as well where we do.
                assert engine[key].shape == expected.shape
            assert_equal(f"{name}.{key}", engine[key].data, expected)


def default_loader(parameter, tensor):
    parameter.data.copy_(tensor)


def test_a_layer_of_another_context_is_bound_whole_or_refused(context, vllm_groups):
    config = VllmConfig()
    single = ParallelContext.single()
    with set_current_vllm_config(config):
        layers = (
            ColumnParallelLinear(4, 6, parallel_context=single),
            RowParallelLinear(4, 6, parallel_context=single),
            VocabParallelEmbedding(100, 6, parallel_context=single),
        )
        for index, layer in enumerate(layers):
            engine = layer.bind_engine(config, f"layers.{index}")
            assert engine.tp_size == 1
        other = RowParallelLinear(6, 6, parallel_context=ParallelContext(tp_size=3))
        with pytest.raises(ValueError, match="tp_size=3, but the engine runs with"):
            other.bind_engine(config, "other")


def test_layers_find_the_context_themselves(context, vllm_groups):
    assert ParallelContext.current() == context
    assert ColumnParallelLinear(4, 8).parallel_context == context
