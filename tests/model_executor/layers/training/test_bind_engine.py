# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""What the layers become inside the engine."""

from unittest.mock import Mock

import pytest
import torch
from torch import nn

from vllm import training
from vllm.config import VllmConfig, set_current_vllm_config
from vllm.ir.op import enable_torch_wrap
from vllm.model_executor import vllm_internals
from vllm.model_executor.layers.training import (
    ColumnParallelLinear,
    Gelu,
    GeluAndMul,
    LayerNorm,
    MergedColumnParallelLinear,
    ParallelLMHead,
    QKVParallelLinear,
    RMSNorm,
    RotaryEmbedding,
    RowParallelLinear,
    SiluAndMul,
    TrainableAttention,
    VLLMFlashAttention,
    VocabParallelEmbedding,
)

LINEARS = {
    vllm_internals.ColumnParallelLinear: lambda: ColumnParallelLinear(12, 8),
    vllm_internals.RowParallelLinear: lambda: RowParallelLinear(12, 8, bias=False),
    vllm_internals.MergedColumnParallelLinear: lambda: MergedColumnParallelLinear(
        12, [8, 4], return_bias=True
    ),
    vllm_internals.QKVParallelLinear: lambda: QKVParallelLinear(12, 4, 4, 2),
}


@pytest.fixture(scope="module")
def vllm_config():
    training.initialize_parallel()
    config = VllmConfig()
    # What vLLM's attention asks of a model config.
    config.model_config = Mock(dtype=torch.float32, is_mm_prefix_lm=False)
    with set_current_vllm_config(config):
        yield config
    training.destroy_parallel()


@pytest.mark.parametrize("kind", list(LINEARS), ids=lambda kind: kind.__name__)
def test_linears_become_vllms(kind, vllm_config):
    layer = LINEARS[kind]()
    engine = layer.bind_engine(vllm_config, "model.layers.0.proj")
    assert type(engine) is kind and engine.prefix == "model.layers.0.proj"
    shapes = {name: p.shape for name, p in layer.named_parameters()}
    assert {name: p.shape for name, p in engine.named_parameters()} == shapes
    for name, parameter in layer.named_parameters():
        engine.get_parameter(name).data.copy_(parameter.data)
    engine.quant_method.process_weights_after_loading(engine)
    x = torch.randn(5, 12)
    with torch.inference_mode():
        actual, expected = engine(x), layer(x)
    assert isinstance(actual, tuple) == isinstance(expected, tuple)
    torch.testing.assert_close(actual, expected)


def test_embedding_and_head_become_vllms(vllm_config):
    embedding = VocabParallelEmbedding(100, 12)
    engine = embedding.bind_engine(vllm_config, "embed_tokens")
    assert type(engine) is vllm_internals.VocabParallelEmbedding
    engine.weight.weight_loader(engine.weight, embedding.weight.detach())
    ids = torch.randint(100, (7,))
    with torch.inference_mode():
        assert torch.equal(engine(ids), embedding(ids))

    head = ParallelLMHead(100, 12, True)
    engine = head.bind_engine(vllm_config, "lm_head")
    assert type(engine) is vllm_internals.ParallelLMHead
    for name, parameter in head.named_parameters():
        target = engine.get_parameter(name)
        target.weight_loader(target, parameter.detach())
        assert torch.equal(target[:100], parameter) and target[100:].eq(0).all()


@pytest.mark.parametrize("shape", [(5, 8), (5, 3, 8)], ids=str)
@pytest.mark.parametrize("with_residual", [False, True], ids=["alone", "residual"])
def test_norms_become_vllms_ops(with_residual, shape, vllm_config):
    layer = RMSNorm(8)
    nn.init.uniform_(layer.weight)
    inputs = [torch.randn(shape) for _ in range(1 + with_residual)]
    engine = layer.bind_engine(vllm_config, "norm")
    assert engine.weight is layer.weight
    before = [x.clone() for x in inputs]
    graphs = []

    def record(graph, _):
        graphs.append(graph)
        return graph.forward

    # As in an engine that compiles; an eager one turns it off for its process.
    with torch.inference_mode(), enable_torch_wrap(True):
        for norm in (engine, torch.compile(engine, backend=record)):
            torch.testing.assert_close(norm(*inputs), layer(*inputs))
            assert all(map(torch.equal, inputs, before))
    ops = torch.ops.vllm_ir
    (graph,) = graphs
    assert (ops.fused_add_rms_norm if with_residual else ops.rms_norm).default in {
        getattr(node.target, "default", node.target) for node in graph.graph.nodes
    }


GATED = {
    vllm_internals.SiluAndMul: SiluAndMul(),
    vllm_internals.GeluAndMul: GeluAndMul("tanh"),
}


@pytest.mark.parametrize("kind", list(GATED), ids=lambda kind: kind.__name__)
def test_gated_activations_become_vllms(kind, vllm_config):
    engine = GATED[kind].bind_engine(vllm_config, "act")
    assert type(engine) is kind
    x = torch.randn(5, 3, 16)
    torch.testing.assert_close(engine(x), GATED[kind](x))


def test_batch_invariant_norms_and_activations_stay_themselves(vllm_config):
    with training.batch_invariant():
        for layer in (RMSNorm(8), *GATED.values()):
            assert layer.bind_engine(vllm_config, "layer") is layer


def test_the_other_layers_stay_themselves(vllm_config):
    for layer in (LayerNorm(8), Gelu(), RotaryEmbedding(8), VLLMFlashAttention(8, 2)):
        assert layer.bind_engine(vllm_config, "layer") is layer


def test_attention_gets_vllms_under_its_name(vllm_config, monkeypatch):
    monkeypatch.setattr(vllm_config.cache_config, "sliding_window", 99)
    layers = {
        "layers.0.attn": TrainableAttention(4, 32, 0.5, 2, sliding_window=7),
        "layers.1.attn": TrainableAttention(4, 32, logits_soft_cap=3.0),
    }
    for name, layer in layers.items():
        assert layer.bind_engine(vllm_config, name) is layer
        engine = layer.engine
        context = vllm_config.compilation_config.static_forward_context
        assert context[name] is engine and type(engine) is vllm_internals.Attention
        assert (engine.num_heads, engine.num_kv_heads) == (4, layer.num_kv_heads)
        assert engine.sliding_window == layer.spec.sliding_window
        assert engine.impl.scale == layer.spec.scale
        assert engine.impl.logits_soft_cap == (layer.spec.logits_soft_cap or 0)
        assert not list(layer.parameters())


class Recorder(nn.Module):
    """In the place of vLLM's attention: returns the queries it was given."""

    def forward(self, query, key, value):
        self.shapes = [tuple(t.shape) for t in (query, key, value)]
        return query


@pytest.mark.parametrize(
    "shape", [(6, 4, 16), (6, 64), (2, 3, 4, 16), (2, 3, 64)], ids=str
)
def test_the_engine_gets_flat_tokens_and_the_caller_its_layout(shape, vllm_config):
    layer = TrainableAttention(4, 16, num_kv_heads=2)
    layer.engine = Recorder()
    query = torch.randn(shape)
    key = torch.randn(*shape[:-1], 32) if shape[-1] == 64 else query[..., :2, :]
    assert torch.equal(layer(query, key, key), query)
    assert layer.engine.shapes == [(6, 64), (6, 32), (6, 32)]


def test_what_the_engine_cannot_serve_is_refused(vllm_config):
    with pytest.raises(
        ValueError, match="a.b: TrainableAttention.*build it with causa"
    ):
        TrainableAttention(4, 32, causal=False).bind_engine(vllm_config, "a.b")
    if torch.cuda.is_available():
        both = {"sinks": True, "alibi_slopes": [0.5] * 4}
        with pytest.raises(ValueError, match="by a constant, which sinks would see"):
            TrainableAttention(4, 32, **both).bind_engine(vllm_config, "a.c")
    else:
        with pytest.raises(ValueError, match="has no kernel for head_size=20"):
            TrainableAttention(4, 20).bind_engine(vllm_config, "a.c")
