# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""Layers over two tensor-parallel ranks against one rank alone.

Run on each of two ranks by `test_tensor_parallel.py`:
`torchrun --nproc-per-node 2 -m pytest tensor_parallel_checks.py`.
"""

import pytest
import torch
import torch.distributed as dist
from torch import nn

from vllm import training
from vllm.config import VllmConfig, set_current_vllm_config
from vllm.model_executor.layers.training import (
    ColumnParallelLinear,
    MergedColumnParallelLinear,
    ParallelLMHead,
    QKVParallelLinear,
    RMSNorm,
    RotaryEmbedding,
    RowParallelLinear,
    SiluAndMul,
    TrainingLayer,
    VLLMFlashAttention,
    VocabParallelEmbedding,
    collectives,
    token_logprobs,
)
from vllm.model_executor.layers.training.logprobs import full_logprobs
from vllm.model_executor.layers.training.ops.logprobs import op as logprobs_op
from vllm.model_executor.layers.training.sharding import local_from_full
from vllm.model_executor.parallel_context import ParallelContext

VOCAB, HIDDEN = 100, 32


@pytest.fixture(scope="session")
def context():
    context = training.initialize_parallel(tensor_parallel_size=2)
    yield context
    training.destroy_parallel()


class Model(nn.Module):
    """One of each layer; the hidden states before the head."""

    def __init__(self, context, num_kv_heads, dtype):
        super().__init__()
        kwargs = {"params_dtype": dtype, "parallel_context": context}
        rotary = RotaryEmbedding(8, max_position_embeddings=64)
        self.embedding = VocabParallelEmbedding(VOCAB, HIDDEN, **kwargs)
        self.norm = RMSNorm(HIDDEN, **kwargs)
        self.attention = VLLMFlashAttention(
            HIDDEN, 4, num_kv_heads, bias=True, rotary=rotary, **kwargs
        )
        self.up = MergedColumnParallelLinear(HIDDEN, [48, 48], **kwargs)
        self.act = SiluAndMul(context)
        self.down = RowParallelLinear(48, HIDDEN, **kwargs)
        self.gathered = ColumnParallelLinear(HIDDEN, 16, gather_output=True, **kwargs)
        self.split = RowParallelLinear(16, HIDDEN, input_is_parallel=False, **kwargs)
        self.head = ParallelLMHead(VOCAB, HIDDEN, True, **kwargs)

    def forward(self, ids, positions, cu_seqlens):
        x = self.embedding(ids)
        x = x + self.attention(self.norm(x), positions, cu_seqlens)
        x = x + self.down(self.act(self.up(x)))
        return x + self.split(self.gathered(x))


def make_model(context, num_kv_heads=2, dtype=torch.float32):
    torch.manual_seed(3)
    return Model(context, num_kv_heads, dtype)


def make_batch():
    generator = torch.Generator().manual_seed(5)
    lengths = [5, 0, 17, 1]
    return (
        torch.randint(VOCAB, (23,), generator=generator),
        torch.cat([torch.arange(length) for length in lengths]),
        torch.tensor([0, *lengths]).cumsum(0, dtype=torch.int32),
        torch.randint(VOCAB, (23,), generator=generator),
        torch.randn(23, generator=generator),
    )


def results(model, *, through_logits):
    """Log-probabilities and the gradient of each parameter."""
    *inputs, targets, grad = make_batch()
    hidden = model(*inputs)
    if through_logits:
        logps = model.head(hidden).log_softmax(-1).gather(1, targets[:, None])[:, 0]
    else:
        logps = token_logprobs(hidden, model.head, targets)
    logps.backward(grad.to(logps.dtype))
    return {"logprobs": logps.detach()} | {
        name: parameter.grad for name, parameter in model.named_parameters()
    }


def shardings_of(model):
    return {
        f"{path}.{name}": sharding
        for path, layer in model.named_modules()
        if isinstance(layer, TrainingLayer)
        for name, sharding in layer.parameter_sharding().items()
    }


@pytest.mark.parametrize("through_logits", [True, False])
@pytest.mark.parametrize("num_kv_heads", [4, 2, 1])
def test_gradients_are_those_of_one_rank(
    context, num_kv_heads, through_logits, assert_as_accurate, monkeypatch
):
    blocks = logprobs_op.Blocks(10 * VOCAB, 3 * VOCAB, 100, 9, 1)
    monkeypatch.setattr(logprobs_op, "CPU_BLOCKS", blocks)
    single = ParallelContext.single()
    actual = make_model(context, num_kv_heads)
    shardings = shardings_of(actual)
    actual = results(actual, through_logits=through_logits)
    plain_model = make_model(single, num_kv_heads)
    plain = results(plain_model, through_logits=through_logits)
    exact_model = make_model(single, num_kv_heads).double()
    exact = results(exact_model, through_logits=through_logits)

    assert actual.keys() == plain.keys() == shardings.keys() | {"logprobs"}
    for name, tensor in actual.items():
        expected = [plain[name], exact[name]]
        if name in shardings:
            rank, size = context.tp_rank, context.tp_size
            sharding = shardings[name]
            expected = [local_from_full(t, sharding, rank, size) for t in expected]
        assert_as_accurate(name, tensor, *expected)


@pytest.mark.parametrize("num_kv_heads", [2, 1])
def test_replicas_have_equal_bits(context, num_kv_heads, assert_equal):
    model = make_model(context, num_kv_heads)
    gradients = results(model, through_logits=False)
    replicated = {
        name: gradients[name]
        for name, sharding in shardings_of(model).items()
        if sharding.dim is None
    }
    assert len(replicated) == 4
    if num_kv_heads == 1:
        start = model.attention.qkv_proj.q_size
        for name in ("weight", "bias"):
            name = f"attention.qkv_proj.{name}"
            replicated[name] = gradients[name][start:].contiguous()
    for name, gradient in replicated.items():
        of_rank_0 = gradient.clone()
        dist.broadcast(of_rank_0, 0, group=context.tp_group)
        assert_equal(name, gradient, of_rank_0)


def test_every_parameter_gets_a_gradient(context):
    model = make_model(context)
    results(model, through_logits=False)
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None and parameter.grad.ne(0).any(), name
    padding = VOCAB - model.head.vocab_start_index
    for layer in (model.embedding, model.head):
        assert layer.weight[padding:].eq(0).all()
        assert layer.weight.grad[padding:].eq(0).all()


def test_forward_runs_in_inference_mode(context, assert_equal):
    *inputs, targets, _ = make_batch()
    model = make_model(context)
    expected = model(*inputs).detach()
    with torch.inference_mode():
        assert_equal("hidden", model(*inputs), expected)
        token_logprobs(expected, model.head, targets)


@pytest.mark.parametrize("many_blocks", [False, True])
def test_entropy_and_full_rows_are_those_of_one_rank(
    context, many_blocks, assert_as_accurate, monkeypatch
):
    if many_blocks:
        blocks = logprobs_op.Blocks(10 * VOCAB, 3 * VOCAB, 100, 9, 1)
        monkeypatch.setattr(logprobs_op, "CPU_BLOCKS", blocks)
    *_, targets, grad = make_batch()
    hidden = torch.randn(23, HIDDEN, generator=torch.Generator().manual_seed(6))

    def results(context, dtype):
        torch.manual_seed(3)
        kwargs = {"params_dtype": torch.float32, "parallel_context": context}
        head = ParallelLMHead(VOCAB, HIDDEN, True, **kwargs).to(dtype)
        inputs = [hidden.to(dtype).requires_grad_(), head.weight, head.bias]
        g = grad.to(dtype)
        logprobs, entropy = token_logprobs(
            inputs[0], head, targets, temperature=0.7, return_entropy=True
        )
        rows = full_logprobs(inputs[0], head, temperature=0.7)
        loss = (g * (logprobs + 2 * entropy)).sum() + (g * rows.square().sum(-1)).sum()
        gradients = torch.autograd.grad(loss, inputs)
        shardings = head.parameter_sharding()
        return (logprobs, entropy, rows, *gradients), shardings

    actual, shardings = results(context, torch.float32)
    single = ParallelContext.single()
    plain, exact = results(single, torch.float32)[0], results(single, torch.float64)[0]
    names = ("logprobs", "entropy", "rows", "hidden", "weight", "bias")
    for name, tensor, *expected in zip(names, actual, plain, exact):
        if name in shardings:
            rank, size = context.tp_rank, context.tp_size
            expected = [
                local_from_full(t, shardings[name], rank, size) for t in expected
            ]
        assert_as_accurate(name, tensor, *expected)


def test_collectives_are_conjugate_pairs(context, assert_equal):
    rank = context.tp_rank
    mine = torch.arange(8.0).view(2, 4) + 10 * rank
    both = [torch.arange(8.0).view(2, 4) + 10 * r for r in range(2)]
    whole = torch.cat(both, -1)

    def check(function, x, output, grad, grad_x):
        x = x.clone().requires_grad_()
        y = function(x, context)
        assert_equal(f"{function.__name__} forward", y, output)
        (actual,) = torch.autograd.grad(y, x, grad)
        assert_equal(f"{function.__name__} backward", actual, grad_x)

    check(collectives.copy_to_group, both[0], both[0], mine, both[0] + both[1])
    check(collectives.reduce_from_group, mine, both[0] + both[1], both[1], both[1])
    check(collectives.gather_from_group, mine, whole, whole, mine)
    check(collectives.split_to_group, whole, mine, mine, whole)
    with pytest.raises(ValueError, match=r"\(2, 3\) is not divisible by tp_size=2"):
        collectives.split_to_group(torch.zeros(2, 3), context)


@pytest.mark.parametrize("num_kv_heads", [2, 1])
def test_vllms_loaders_cut_the_same_shards(context, num_kv_heads, assert_equal):
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
            expected = local_from_full(full, sharding, context.tp_rank, 2)
            if name in ("embedding", "head"):
                # vLLM pads the shard's rows as well where we do.
                assert engine[key].shape == expected.shape
            assert_equal(f"{name}.{key}", engine[key].data, expected)


def default_loader(parameter, tensor):
    parameter.data.copy_(tensor)


def test_a_layer_of_another_context_is_bound_whole_or_refused(context):
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


def test_layers_find_the_context_themselves(context):
    assert ParallelContext.current() == context
    assert ColumnParallelLinear(4, 6).parallel_context == context
