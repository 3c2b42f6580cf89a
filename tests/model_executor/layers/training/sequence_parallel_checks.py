# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""Sequence parallelism: bits, layouts, and what becomes of it in the engine.

The gradients are compared in `tensor_parallel_checks.py`. Run on each rank by
`test_tensor_parallel.py`.
"""

from dataclasses import replace

import pytest
import torch
from torch import nn

from tests.model_executor.layers.training.parallel_model import (
    HIDDEN,
    TOKENS,
    VOCAB,
    engine_step,
    local,
    make_batch,
    make_model,
    shardings_of,
)
from vllm.config import VllmConfig, set_current_vllm_config
from vllm.model_executor.layers.training import (
    ColumnParallelLinear,
    LayerNorm,
    ParallelLMHead,
    RMSNorm,
    RowParallelLinear,
    SplitSequence,
    VocabParallelEmbedding,
    token_logprobs,
)
from vllm.model_executor.models.builder.binding import bind_engine_layers
from vllm.model_executor.models.generic_transformer import (
    GenericTransformerConfig,
    GenericTransformerForCausalLM,
)
from vllm.model_executor.parallel_context import ParallelContext
from vllm.training import batch_invariant

pytestmark = pytest.mark.usefixtures("on_the_ranks_device")

ON_CUDA = torch.cuda.is_available()


def slice_of(tensor, context, dim):
    return tensor.chunk(context.tp_size, dim)[context.tp_rank]


# The engine's attention on Hopper GPUs has 16 bits only.
@pytest.mark.parametrize(
    "dtype", [torch.bfloat16] if ON_CUDA else [torch.float32, torch.bfloat16], ids=str
)
@pytest.mark.parametrize("products", [1, 2])
def test_bits_are_those_without_it(context, vllm_groups, products, dtype, assert_equal):
    """In batch-invariant mode, and those of one rank with as many shards."""
    *inputs, targets, _ = make_batch()
    shards = products * context.tp_size
    context = replace(context, tp_reduction_shards=shards)
    single = ParallelContext(device=context.device, tp_reduction_shards=shards)

    def run(context, sequence_parallel):
        model = make_model(
            context, dtype=dtype, head_dim=64, sequence_parallel=sequence_parallel
        )
        with batch_invariant():
            hidden = model(*inputs)
            return hidden, token_logprobs(hidden, model.head, targets)

    hidden, logprobs = run(context, True)
    for other in (run(context, False), run(single, False)):
        assert_equal("hidden states", hidden, slice_of(other[0], context, 0))
        assert_equal("log-probabilities", logprobs, other[1])


class Block(nn.Module):
    def __init__(self, context, sequence_parallel, column=ColumnParallelLinear):
        super().__init__()
        kwargs = {"parallel_context": context, "sequence_parallel": sequence_parallel}
        self.embedding = VocabParallelEmbedding(VOCAB, HIDDEN, **kwargs)
        self.norm = RMSNorm(HIDDEN, **kwargs)
        self.up = column(HIDDEN, 48, **kwargs)
        self.down = RowParallelLinear(48, HIDDEN, **kwargs)
        self.last = LayerNorm(HIDDEN, bias=False, **kwargs)
        self.head = ParallelLMHead(VOCAB, HIDDEN, **kwargs)

    def forward(self, ids):
        x = self.embedding(ids)
        return self.last(x + self.down(self.up(self.norm(x))))


def make_block(*args):
    torch.manual_seed(7)
    return Block(*args)


def as_one_rank(run, context, assert_as_accurate):
    """Require that sequence-parallel ranks compute what one rank does.

    `run(context, sequence_parallel, dtype)` gives tensors by name, of which "hidden" is
    a slice of the tokens and gradients have their parameter's name, and the shardings.
    """
    actual, shardings = run(context, True, torch.float32)
    single = ParallelContext.single()
    plain, _ = run(single, False, torch.float32)
    exact, _ = run(single, False, torch.float64)
    for name, tensor in actual.items():
        expected = [
            local(each[name], shardings.get(name), context) for each in (plain, exact)
        ]
        if name == "hidden":
            expected = [slice_of(each, context, 1) for each in expected]
        assert_as_accurate(name, tensor, *expected)
    return actual


def test_batches_are_cut_along_their_sequences(context, assert_as_accurate):
    generator = torch.Generator().manual_seed(8)
    with torch.device("cpu"):
        ids, targets = torch.randint(VOCAB, (2, 3, 8), generator=generator)
    ids, targets = ids.to(context.device), targets.to(context.device)

    def run(context, sequence_parallel, dtype):
        model = make_block(context, sequence_parallel).to(dtype)
        hidden = model(ids)
        logits = model.head(hidden)
        token_logprobs(hidden, model.head, targets).sum().backward()
        named = model.named_parameters()
        gradients = {name: parameter.grad for name, parameter in named}
        return {"hidden": hidden, "logits": logits} | gradients, shardings_of(model)

    actual = as_one_rank(run, context, assert_as_accurate)
    assert actual["hidden"].shape == (3, 8 // context.tp_size, HIDDEN)
    assert actual["logits"].shape == (3, 8, VOCAB)


def test_the_generic_transformer(context, assert_as_accurate):
    """Its log-probabilities, and the gradient of each parameter."""
    config = GenericTransformerConfig(
        vocab_size=VOCAB,
        hidden_size=HIDDEN,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
    )
    generator = torch.Generator().manual_seed(9)
    with torch.device("cpu"):
        ids = torch.randint(VOCAB, (2, 9), generator=generator).to(context.device)

    def run(context, sequence_parallel, dtype):
        torch.manual_seed(10)
        model = GenericTransformerForCausalLM(
            config, context, sequence_parallel=sequence_parallel
        ).to(dtype)
        hidden = model.model(ids[:, :-1])
        logprobs = token_logprobs(hidden, model.lm_head, ids[:, 1:])
        logprobs.sum().backward()
        gradients = {name: p.grad for name, p in model.named_parameters()}
        outputs = {"hidden": hidden, "logprobs": logprobs}
        return outputs | gradients, shardings_of(model)

    actual = as_one_rank(run, context, assert_as_accurate)
    assert actual["hidden"].shape == (2, 8 // context.tp_size, HIDDEN)


def test_a_slice_of_the_tokens_is_kept_for_the_backward(context):
    kept = []

    def keep(tensor):
        kept.append(tuple(tensor.shape))
        return tensor

    options = {"sequence_parallel": True, "parallel_context": context}
    layer = ColumnParallelLinear(HIDDEN, 16, **options)
    tokens = TOKENS // context.tp_size
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        output = layer(torch.randn(tokens, HIDDEN))
    assert output.shape == (TOKENS, 16 // context.tp_size)
    assert kept == [(tokens, HIDDEN), tuple(layer.weight.shape)]


def test_a_norm_of_a_ranks_own_heads(context):
    """The weight's gradient is the sum over the heads of all ranks."""
    torch.manual_seed(2)
    heads = torch.randn(TOKENS, context.tp_size, 8)
    norm = RMSNorm(8, sequence_parallel=True, parallel_context=context)
    norm(heads[:, context.tp_rank]).square().sum().backward()
    whole = RMSNorm(8, parallel_context=ParallelContext.single())
    whole(heads).square().sum().backward()
    torch.testing.assert_close(norm.weight.grad, whole.weight.grad)


def test_what_does_not_fit_is_refused(context):
    kwargs = {"sequence_parallel": True, "parallel_context": context}
    with pytest.raises(ValueError, match="needs input_is_parallel=True and reduce_re"):
        RowParallelLinear(8, 8, input_is_parallel=False, **kwargs)
    with pytest.raises(ValueError, match="needs input_is_parallel=True and reduce_re"):
        RowParallelLinear(8, 8, bias=False, reduce_results=False, **kwargs)
    tokens = context.tp_size + 1
    with pytest.raises(ValueError, match=rf"Dim -2 of shape \({tokens}, 8\).*pad it"):
        SplitSequence(context)(torch.zeros(tokens, 8))
    embedding = VocabParallelEmbedding(VOCAB, 8, **kwargs)
    with pytest.raises(ValueError, match="Dim -2 .*pad it"):
        embedding(torch.zeros(tokens, dtype=torch.long))
    head = ParallelLMHead(VOCAB, 8, **kwargs)
    with pytest.raises(ValueError, match=rf"shape = \({2 * context.tp_size},\)"):
        token_logprobs(torch.zeros(2, 8), head, torch.zeros(2, dtype=torch.long))


class OwnColumn(ColumnParallelLinear):
    """Stays itself in the engine."""

    def forward(self, x):
        return super().forward(x).relu()


def test_the_engine_has_all_tokens(context, vllm_groups):
    """The same definition, bound: a rank's result is that of all tokens."""
    ids = make_batch()[0]
    expected = make_block(ParallelContext.single(), False, OwnColumn)(ids).detach()
    model = make_block(context, True, OwnColumn)
    values = {name: p.detach().clone() for name, p in model.named_parameters()}
    config = VllmConfig()
    with set_current_vllm_config(config):
        bind_engine_layers(model, config, head="head")
    for name, parameter in model.named_parameters():
        parameter.data.copy_(values[name])
    for layer in (model.embedding, model.down, model.head):
        layer.quant_method.process_weights_after_loading(layer)
    assert type(model.up) is OwnColumn and not model.up.sequence_parallel
    # vLLM compiles the mask of its embedding.
    with engine_step(), torch._dynamo.config.patch(disable=True):
        torch.testing.assert_close(model(ids), expected)
