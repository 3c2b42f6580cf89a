# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""Gated MLPs in the trainer, and linear layers of one input as one in the engine."""

import copy
import gc
from contextlib import nullcontext
from unittest.mock import Mock

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from transformers import AutoModelForCausalLM

from tests.models.adopt.families import make
from vllm import ModelRegistry, training
from vllm.config import VllmConfig, set_current_vllm_config
from vllm.model_executor import vllm_internals
from vllm.model_executor.checkpoint.layout import CheckpointLayout
from vllm.model_executor.layers.training import GeluAndMul, SiluAndMul
from vllm.model_executor.models.builder.binding import bind_engine_layers
from vllm.model_executor.models.builder.loader import EngineLoader
from vllm.model_executor.models.builder.merged_linears import merge_linears

VOCAB, WIDTH, HEADS = 96, 64, 2
# fp32 sums in another order, through two layers.
TOLERANCE = dict(rtol=1e-4, atol=1e-5)


class Attention(nn.Module):
    def __init__(self, bias=True):
        super().__init__()
        self.q, self.k, self.v = (nn.Linear(WIDTH, WIDTH, bias) for _ in range(3))
        self.out = nn.Linear(WIDTH, WIDTH, bias)

    def project(self, x):
        return self.q(x), self.k(x), self.v(x)

    def heads(self, x):
        return x.view(*x.shape[:2], HEADS, -1).transpose(1, 2)

    def forward(self, x):
        q, k, v = map(self.heads, self.project(x))
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.out(y.transpose(1, 2).flatten(2))


class Gated(nn.Module):
    """`up` comes before `gate`, in the class and in the call."""

    def __init__(self, act=F.silu, bias=False):
        super().__init__()
        self.w_up, self.w_gate = (nn.Linear(WIDTH, 96, bias) for _ in range(2))
        self.w_down = nn.Linear(96, WIDTH, bias)
        self.act = act

    def forward(self, x):
        up = self.w_up(x)
        return self.w_down(self.act(self.w_gate(x)) * up)


class Model(nn.Module):
    def __init__(self, attention=Attention, mlp=Gated):
        super().__init__()
        torch.manual_seed(0)
        self.tokens = nn.Embedding(VOCAB, WIDTH)
        self.attention, self.mlp = attention(), mlp()
        self.lm_head = nn.Linear(WIDTH, VOCAB, bias=False)

    def forward(self, input_ids, position_ids=None, use_cache=None):
        x = self.tokens(input_ids)
        x = x + self.attention(x)
        return self.lm_head(x + self.mlp(x))


IDS = torch.arange(14).view(2, 7)


def adopted(*args, **options):
    return training.adopt(Model(*args, **options))


@pytest.fixture(autouse=True)
def nothing_left():
    """A module and its parts that refer to it are freed here, not in a later probe.

    What vLLM would compile for a module of its own takes too long.
    """
    with torch._dynamo.config.patch(disable=True):
        yield
    gc.collect()


@pytest.fixture(scope="module")
def vllm_config():
    training.initialize_parallel()
    config = VllmConfig()
    # What vLLM's attention asks of a model config.
    config.model_config = Mock(dtype=torch.float32, is_mm_prefix_lm=False)
    with set_current_vllm_config(config):
        yield config
    training.destroy_parallel()


def engine_of(model, vllm_config, packed=True, merged=True):
    """The model as an engine has it, with the same weights, and its loader."""
    engine = copy.deepcopy(model).requires_grad_(False)
    dtype = model.lm_head.weight.dtype
    vllm_config.model_config.dtype = dtype
    vllm_config.compilation_config.static_forward_context.clear()
    if merged:
        merge_linears(engine)
    layout = CheckpointLayout.of(engine)
    default = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        bind_engine_layers(engine, vllm_config, head="lm_head")
    finally:
        torch.set_default_dtype(default)
    loader = EngineLoader(engine, layout, None)
    loader.load(model.state_dict().items())
    if packed:
        pack(engine)
    return engine, loader


def pack(engine):
    for module in engine.modules():
        if isinstance(module, vllm_internals.ColumnParallelLinear):
            module.quant_method.process_weights_after_loading(module)


# --- gated MLPs


class Packed(nn.Module):
    def __init__(self):
        super().__init__()
        self.both, self.down = nn.Linear(WIDTH, 192), nn.Linear(96, WIDTH)
        self.act = nn.GELU()

    def forward(self, x):
        gate, up = self.both(x).chunk(2, -1)
        return self.down(up * self.act(gate))


class TanhGELU(nn.Module):
    def forward(self, x):
        return F.gelu(x, approximate="tanh")


MLPS = {
    "silu": (Gated, SiluAndMul),
    "gelu": (lambda: Gated(nn.GELU(), bias=True), GeluAndMul),
    "gelu_tanh": (lambda: Gated(TanhGELU()), GeluAndMul),
    "packed": (Packed, GeluAndMul),
}


@pytest.mark.parametrize("name", MLPS)
def test_a_gated_mlp_computes_the_same(name):
    make, kind = MLPS[name]
    plain = Model(mlp=make).double()
    model = training.adopt(copy.deepcopy(plain))
    layer = model.mlp.gated_activation
    assert type(layer) is kind
    assert getattr(layer, "approximate", "none") == (
        "tanh" if name == "gelu_tanh" else "none"
    )
    assert type(layer).__name__ in model.adoption
    assert list(model.state_dict()) == list(plain.state_dict())
    for dtype, tolerance in ((torch.float64, {}), (torch.float32, TOLERANCE)):
        plain, model = plain.to(dtype), model.to(dtype)
        outputs = plain(IDS), model(IDS)
        torch.testing.assert_close(*outputs, **tolerance)
        for each in outputs:
            each.square().sum().backward()
        for (path, a), (_, b) in zip(
            plain.named_parameters(), model.named_parameters(), strict=True
        ):
            tolerance = tolerance and {"rtol": 1e-4, "atol": 1e-4}
            torch.testing.assert_close(a.grad, b.grad, **tolerance, msg=path)
        plain.zero_grad(), model.zero_grad()


def test_the_activation_is_one_op_in_the_trainer():
    model = adopted()
    x = torch.randn(3, 5, WIDTH, requires_grad=True)
    gate, up = model.mlp.w_gate(x), model.mlp.w_up(x)
    expected = model.mlp.w_down(SiluAndMul()(torch.cat((gate, up), -1)))
    assert torch.equal(model.mlp(x), expected)
    names = set()
    pending = [model.mlp(x).grad_fn]
    while pending:
        node = pending.pop()
        names.add(node.name())
        pending += [each for each, _ in node.next_functions if each is not None]
    assert any("activation_and_mul" in name for name in names)
    assert not names & {"CatBackward0", "SiluBackward0", "MulBackward0"}


class WithDropout(Gated):
    def forward(self, x):
        return F.dropout(super().forward(x), 0.1, self.training)


class Clamped(Gated):
    def forward(self, x):
        gate = self.w_gate(x).clamp(max=7)
        return self.w_down(self.act(gate) * self.w_up(x))


class Rounded(Gated):
    """Rounds the gate twice in bf16."""

    def forward(self, x):
        gate = self.w_gate(x)
        return self.w_down(gate * torch.sigmoid(gate) * self.w_up(x))


@pytest.mark.parametrize("kind", [WithDropout, Clamped, Rounded])
def test_an_mlp_that_computes_something_else_is_left(kind):
    model = adopted(mlp=kind)
    assert "gated_activation" not in model.mlp._modules


def test_an_mlp_with_a_hook_is_left():
    model = Model()
    model.mlp.register_forward_hook(lambda module, args, output: 2 * output)
    assert "gated_activation" not in training.adopt(model).mlp._modules


# --- linear layers of one input


def test_names_of_a_checkpoint_stay(vllm_config):
    model = adopted()
    engine, loader = engine_of(model, vllm_config)
    assert type(engine.attention.q_k_v) is vllm_internals.MergedColumnParallelLinear
    assert type(engine.mlp.w_gate_w_up) is vllm_internals.MergedColumnParallelLinear
    assert type(engine.mlp.gated_activation) is vllm_internals.SiluAndMul
    assert {*loader.layout.tensors} == {*model.state_dict()}
    shards = [s for p in loader.layout.parameters.values() for s in p.shards]
    assert {shard.tensor for shard in shards} == {*model.state_dict()}
    note = "the engine multiplies by q, k, v at once"
    assert model.adoption.count(note) == 3


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("in_mode", [False, True], ids=["normal", "invariant"])
@pytest.mark.parametrize("merged", [True, False], ids=["merged", "apart"])
def test_the_engine_has_the_trainers_products(dtype, in_mode, merged, vllm_config):
    model = training.adopt(Model().to(dtype))
    with training.batch_invariant() if in_mode else nullcontext():
        engine, _ = engine_of(model, vllm_config, merged=merged)
        for rows in (1, 2, 33):
            x = torch.randn(1, rows, WIDTH).to(dtype)
            with torch.inference_mode():
                expected = (*model.attention.project(x), model.mlp(x))
                actual = (*engine.attention.project(x), engine.mlp(x))
            for a, b in zip(actual, expected, strict=True):
                if in_mode:
                    assert torch.equal(a, b)
                else:  # vLLM's activation rounds once more, which moves sums as far.
                    error = 4 * torch.finfo(dtype).eps * b.abs().max()
                    assert (a - b).abs().max() <= error
    if merged:
        product = engine.attention.q.product
        assert product.left == () and product.x is None


def test_a_merged_layer_is_where_its_layers_were(vllm_config):
    """The first parameter of a model may be one: it tells where the model is."""
    mlp = adopted(mlp=Twice).mlp
    merge_linears(mlp)
    assert [name for name, _ in mlp.named_parameters()] == [
        "inner.a_b.weight",
        "inner.a_b.bias",
    ]
    assert {p.device.type for p in mlp.parameters()} == {"cpu"}


def test_calls_out_of_turn_are_refused(vllm_config):
    attention = engine_of(adopted(), vllm_config)[0].attention
    x, other = torch.randn(2, 1, 3, WIDTH).unbind()
    for calls in (
        [(attention.k, x)],
        [(attention.q, x), (attention.v, x)],
        [(attention.q, x), (attention.k, other)],
        [(attention.q, x), (attention.k, x.clone())],
        [(attention.q, x), (attention.k, x), (attention.k, x)],
        [(attention.q, x), (attention.k, x), (attention.v, x), (attention.v, x)],
    ):
        *before, (last, argument) = calls
        for layer, tensor in before:
            layer(tensor)
        with pytest.raises(RuntimeError, match=r"Attention\.[kv] was called out of"):
            last(argument)
    expected = attention.project(x)
    attention.q(other)  # What is left of a forward that failed does no harm.
    assert all(map(torch.equal, attention.project(x), expected))


class OtherInputs(Attention):
    def project(self, x):
        return self.q(x), self.k(x), self.v(x + 0)


class ChangedInput(Attention):
    def project(self, x):
        x = x.clone()
        return self.q(x), self.k(x.mul_(2)), self.v(x)


class CalledTwice(Attention):
    def project(self, x):
        return self.q(x) + self.q(2 * x), self.k(x), self.v(x)


class ReadsWeight(Attention):
    def project(self, x):
        return self.q(x), self.k(x.to(self.k.weight.dtype)), self.v(x)


class Tied(Attention):
    def __init__(self):
        super().__init__()
        self.v.weight = self.k.weight


class OtherBias(Attention):
    def __init__(self):
        super().__init__()
        self.v = nn.Linear(WIDTH, WIDTH, bias=False)


@pytest.mark.parametrize(
    ("kind", "merged"),
    [
        (OtherInputs, ["q_k"]),
        (ChangedInput, ["k_v"]),
        (CalledTwice, ["k_v"]),
        (ReadsWeight, ["q_v"]),
        (Tied, []),
        (OtherBias, []),
    ],
)
def test_what_is_merged(kind, merged, vllm_config):
    model = adopted(attention=kind)
    engine, _ = engine_of(model, vllm_config)
    found = [name for name in engine.attention._modules if "_" in name]
    assert [name for name in found if not name.startswith("trainable")] == merged
    x = torch.randn(1, 5, WIDTH)
    with torch.inference_mode():
        expected = model.attention.project(x)
        for a, b in zip(engine.attention.project(x), expected, strict=True):
            torch.testing.assert_close(a, b)


class Viewed(Attention):
    """Views rows and heads as one dim, which columns of a wider matrix do not allow."""

    def heads(self, x):
        return (
            x.view(x.shape[0], -1, WIDTH // HEADS)
            .view(*x.shape[:2], HEADS, -1)
            .transpose(1, 2)
        )


def test_views_of_the_results(vllm_config):
    for kind, contiguous in ((Attention, False), (Viewed, True)):
        engine, _ = engine_of(adopted(attention=kind), vllm_config)
        q = engine.attention.project(torch.randn(1, 5, WIDTH))[0]
        assert q.is_contiguous() == contiguous
        assert engine.attention.heads(q).shape == (1, HEADS, 5, WIDTH // HEADS)


class Twice(nn.Module):
    """Calls one module twice, each time with a tensor of its own."""

    def __init__(self):
        super().__init__()
        self.inner = Bilinear()

    def forward(self, x):
        return self.inner(self.inner(x))


class Bilinear(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, x):
        return self.a(x) * self.b(x)


def test_a_module_that_is_called_twice(vllm_config):
    model = adopted(mlp=Twice)
    engine, _ = engine_of(model, vllm_config)
    assert "a_b" in engine.mlp.inner._modules
    x = torch.randn(1, 5, WIDTH)
    with torch.inference_mode():
        torch.testing.assert_close(engine.mlp(x), model.mlp(x))


def test_new_weights(vllm_config):
    # Packed weights are loaded inside vLLM's reloading alone.
    model = adopted()
    engine, loader = engine_of(model, vllm_config, packed=False)
    new = adopted()
    for parameter in new.parameters():
        parameter.data.mul_(2)
    given = dict(new.state_dict())
    q = [(name, given[name]) for name in ("attention.q.weight", "attention.q.bias")]
    before = {name: p.clone() for name, p in engine.named_parameters()}
    with pytest.raises(ValueError, match=r"Missing \(4\): attention.k.bias; attention"):
        loader.load(q)
    assert all(torch.equal(p, before[name]) for name, p in engine.named_parameters())
    loader.load(pair for pair in given.items() if pair[0].startswith("attention."))
    pack(engine)
    x = torch.randn(1, 5, WIDTH)
    with torch.inference_mode():
        for a, b in zip(
            engine.attention.project(x), new.attention.project(x), strict=True
        ):
            torch.testing.assert_close(a, b)
        torch.testing.assert_close(engine.mlp(x), model.mlp(x))


@pytest.mark.parametrize("in_mode", [False, True], ids=["normal", "invariant"])
def test_a_compiled_forward_returns_nothing_else(in_mode, vllm_config):
    with training.batch_invariant() if in_mode else nullcontext():
        engine, _ = engine_of(adopted(), vllm_config)
        outputs = []

        def backend(graph, inputs):
            outputs.append(len(graph.graph.output_node().args[0]))
            # Compiling takes long, so it is done once, for a forward of one kernel.
            return graph if in_mode else torch._inductor.compile(graph, inputs)

        def forward(x):
            q, k, v = engine.attention.project(x)
            return q * k * v + (engine.mlp(x) if in_mode else 0)

        torch._dynamo.reset()
        torch._dynamo.config.disable = False
        compiled = torch.compile(forward, fullgraph=True, backend=backend)
        for rows in (5, 9, 9):
            x = torch.randn(1, rows, WIDTH)
            with torch.inference_mode():
                torch.testing.assert_close(compiled(x), forward(x))
            assert engine.attention.q.product.x is None
            assert engine.attention.q.product.left == ()
        assert set(outputs) == {1}


def test_an_engine_has_the_trainers_bits_after_a_push(make_llm, tmp_path, monkeypatch):
    monkeypatch.setenv("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
    model = make("llama")
    model.save_pretrained(tmp_path)

    def build(config):
        return training.adopt(AutoModelForCausalLM.from_config(config))

    prompts = [[3, 5, 7, 9], [4, 9, 11, 2, 8, 7, 100]]
    with training.batch_invariant():
        ModelRegistry.register_model("LlamaForCausalLM", build)
        llm = make_llm(tmp_path, gpu_memory_utilization=0.3, max_model_len=64)
        trainer = training.adopt(model)
        merged = "q_proj_k_proj_v_proj"
        assert llm.apply_model(
            lambda engine: hasattr(engine.model.layers[0].self_attn, merged)
        ) == [True]
        training.parity.check(llm, trainer, prompts).raise_if_different()

        def push(part):
            tensors = [t for t in training.checkpoint_tensors(trainer) if part in t[0]]
            options = {"weights_iterator": tensors}
            llm.collective_rpc("reload_weights", kwargs=options)
            llm.reset_prefix_cache()

        with pytest.raises(ValueError, match="Missing .2.: .*k_proj.weight; .*v_proj"):
            push("layers.0.self_attn.q_proj")
        training.parity.check(llm, trainer, prompts).raise_if_different()
        for parameter in trainer.model.layers.parameters():
            parameter.data.mul_(1.1)
        push("layers.")
        training.parity.check(llm, trainer, prompts).raise_if_different()
