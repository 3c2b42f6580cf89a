# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""How adopted models are sharded across tensor-parallel ranks."""

import copy
import os
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from transformers import AutoModelForCausalLM

from tests.forks import run_python
from tests.models.adopt.families import CONFIGS, make
from tests.models.adopt.inputs import PROMPTS
from tests.models.adopt.plain import NanoConfig, NanoGPT
from tests.models.gpus import skip_without_gpus
from vllm import ModelRegistry, training
from vllm.config import VllmConfig, set_current_vllm_config
from vllm.model_executor.parallel_context import ParallelContext
from vllm.training import parity

CHECKS = Path(__file__).with_name("tensor_parallel_checks.py")
# What differs most: transposed weights; latent attention; experts with biases, sinks.
FEW = ("gpt2", "deepseek_v3", "gpt_oss")
RANKS = [ParallelContext(tp_rank=rank, tp_size=2) for rank in range(2)]


@pytest.fixture(scope="module")
def model():
    return make("qwen3")


def assert_shards(model, **options):
    """The ranks' parts make up the weights; returns the adopted models."""
    ranks = [
        training.adopt(copy.deepcopy(model), parallel_context=rank, **options)
        for rank in RANKS
    ]
    layouts = [training.sharding(each) for each in ranks]
    weights = [each.state_dict() for each in ranks]
    for name, whole in model.state_dict().items():
        made = torch.full_like(whole, torch.nan)
        for layout, own in zip(layouts, weights):
            for shard in layout[name].shards if name in layout else ():
                made[layout[name].source(shard, 0)] = shard.local(own[name])
        assert torch.equal(made, whole) or name not in layouts[0], name
    return ranks


def test_shards_make_up_the_weights(model):
    ranks = assert_shards(model)
    attention = ranks[0].model.layers[0].self_attn
    assert attention.trainable_attention.num_heads == 2
    assert attention.trainable_attention.num_kv_heads == 1
    assert attention.q_norm.sequence_parallel  # its gradient is a sum over the ranks
    sharded = training.sharding(ranks[1])["model.layers.0.mlp.down_proj.weight"]
    assert sharded.shards[0].offsets == (0, 48)


@pytest.mark.parametrize("kind", ["mixtral", "qwen3_moe"])
def test_each_rank_has_a_slice_of_every_expert(kind):
    model = make(kind)
    for part in assert_shards(model):
        experts = part.model.layers[0].mlp.experts
        whole = model.model.layers[0].mlp.experts
        assert experts.gate_up_proj.shape[0] == whole.gate_up_proj.shape[0]
        assert 2 * experts.gate_up_proj.shape[1] == whole.gate_up_proj.shape[1]
        assert 2 * experts.down_proj.shape[2] == whole.down_proj.shape[2]


def test_packed_columns():
    """Gate and up in one layer, each of which is sharded on its own."""
    model = make("phi3")
    plan = {
        "model.layers.*.mlp.gate_up_proj": "packed_colwise",
        "model.layers.*.mlp.down_proj": "rowwise",
    }
    for part in assert_shards(model, tp_plan=plan):
        assert part.model.layers[0].mlp.gate_up_proj.weight.shape == (96, 64)


def test_a_plan_of_ones_own(model):
    plan = {
        "model.layers.*.mlp.gate_proj": "colwise",
        "model.layers.*.mlp.up_proj": "colwise",
        "model.layers.*.mlp.down_proj": "rowwise",
    }
    adopted = training.adopt(
        copy.deepcopy(model), tp_plan=plan, parallel_context=RANKS[0]
    )
    layer = adopted.model.layers[0]
    assert layer.mlp.up_proj.weight.shape == (48, 64)
    assert layer.self_attn.q_proj.weight.shape == (128, 64)
    assert layer.self_attn.trainable_attention.num_heads == 4


def test_a_model_without_a_plan_is_held_whole(caplog_vllm):
    model = NanoGPT(NanoConfig())
    adopted = training.adopt(model, parallel_context=RANKS[0])
    assert "has no tensor-parallel plan" in caplog_vllm.text
    assert adopted.h[0].attn.trainable_attention.num_heads == 2


def test_the_plan_of_the_user_wins(caplog_vllm):
    adopted = training.adopt(make("gpt2"), tp_plan={}, parallel_context=RANKS[0])
    assert "has no tensor-parallel plan" in caplog_vllm.text
    attention = adopted.transformer.h[0].attn
    assert attention.c_attn.weight.shape == (64, 192) and attention.split_size == 64


def test_queries_keys_and_values_in_one_layer():
    model = make("gpt2")
    for rank, part in enumerate(assert_shards(model)):
        attention = part.transformer.h[0].attn
        assert attention.split_size == 32
        assert attention.trainable_attention.num_heads == 1
        whole = model.transformer.h[0].attn.c_attn.weight.view(64, 3, 2, 32)
        own = attention.c_attn.weight.view(64, 3, 32)
        assert torch.equal(own, whole[:, :, rank])
        mlp = part.transformer.h[0].mlp
        assert mlp.c_fc.weight.shape == (64, 128)
        assert mlp.c_proj.weight.shape == (128, 64)


def test_sinks_and_biases_of_experts():
    model = make("gpt_oss")
    for rank, part in enumerate(assert_shards(model)):
        layer, whole = part.model.layers[0], model.model.layers[0]
        sinks = whole.self_attn.sinks.chunk(2)[rank]
        assert torch.equal(layer.self_attn.sinks, sinks)
        assert torch.equal(layer.self_attn.trainable_attention.sinks, sinks)
        # Gate and up lie side by side for each feature.
        bias = whole.mlp.experts.gate_up_proj_bias.chunk(2, 1)[rank]
        assert torch.equal(layer.mlp.experts.gate_up_proj_bias, bias)
        bias = whole.mlp.experts.down_proj_bias
        assert torch.equal(layer.mlp.experts.down_proj_bias, bias)


def test_latent_attention():
    for part in assert_shards(make("deepseek_v3")):
        attention = part.model.layers[1].self_attn
        assert attention.trainable_attention.num_heads == 2
        assert attention.kv_a_proj_with_mqa.part_sizes == [16, 16]
        assert attention.kv_a_proj_with_mqa.weight.shape == (32, 64)
        assert attention.kv_b_proj.weight.shape == (64, 16)


ATTENTION = {
    "model.layers.*.self_attn.q_proj": "colwise",
    "model.layers.*.self_attn.k_proj": "colwise",
    "model.layers.*.self_attn.v_proj": "colwise",
    "model.layers.*.self_attn.o_proj": "rowwise",
}
LATENT = {
    "model.layers.*.self_attn.q_b_proj": "colwise",
    "model.layers.*.self_attn.kv_b_proj": "colwise",
    "model.layers.*.self_attn.o_proj": "rowwise",
}


@pytest.mark.parametrize(
    ("kind", "plan", "message"),
    [
        ("qwen3", ATTENTION, "0.self_attn.q_norm: uses the parameter .*q_norm.weight"),
        ("deepseek_v3", LATENT, "0.self_attn: uses a result that is the same on all"),
    ],
)
def test_a_part_of_a_gradient_is_refused(kind, plan, message):
    """An engine, which has no gradients, takes such a plan."""
    model = make(kind)
    with pytest.raises(ValueError, match=message):
        training.adopt(copy.deepcopy(model), tp_plan=plan, parallel_context=RANKS[0])
    with set_current_vllm_config(VllmConfig()):
        training.adopt(model, tp_plan=plan, parallel_context=RANKS[0])


class Function(nn.Module):
    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, x):
        return self.function(x)


ALL = {
    "norm": lambda x: F.rms_norm(x, x.shape[-1:]),
    "written norm": lambda x: x * x.pow(2).mean(-1, keepdim=True).rsqrt(),
    "softmax": lambda x: x.softmax(-1),
    "largest": lambda x: x / x.amax(-1, keepdim=True),
    "sum of heads": lambda x: x + x.unflatten(-1, (4, -1)).sum(-2).repeat(1, 1, 4),
    "order": lambda x: x.flip(-1) + x,
}
OF_EACH_HEAD = {
    "norm": lambda x: F.rms_norm(h := x.unflatten(-1, (4, -1)), h.shape[-1:]).flatten(
        2
    ),
    "without epsilon": lambda x: (
        (h := x.unflatten(-1, (4, -1))) / h.std(-1, keepdim=True)
    ).flatten(2),
    "loop": lambda x: torch.cat([h.softmax(-1) for h in x.chunk(4, -1)], -1),
    "in place": lambda x: torch.zeros_like(x).copy_(x).mul_(2),
    "over tokens": lambda x: x - x.mean(1, keepdim=True),
}


def with_functions(place, function):
    """A model that calls a function of split features, and its plan."""
    model = make("qwen3")
    plan = dict(model._tp_plan)
    if place == "mlp":
        for layer in model.model.layers:
            layer.mlp.down_proj = nn.Sequential(Function(function), layer.mlp.down_proj)
        plan["model.layers.*.mlp.down_proj.1"] = plan.pop(
            "model.layers.*.mlp.down_proj"
        )
    elif place == "attention":
        for layer in model.model.layers:
            attention = layer.self_attn
            attention.o_proj = nn.Sequential(Function(function), attention.o_proj)
        plan["model.layers.*.self_attn.o_proj.1"] = plan.pop(
            "model.layers.*.self_attn.o_proj"
        )
    else:
        for layer in model.model.layers:
            layer.self_attn.q_norm = Function(
                lambda x: function(x.flatten(2)).view_as(x)
            )
    return model, plan


ACROSS = r"layers\.0\..*: calls .* across features of which a rank has a part"


@pytest.mark.parametrize("place", ["mlp", "attention", "q_norm"])
@pytest.mark.parametrize("name", ALL)
def test_a_function_across_ranks_is_refused(name, place):
    """Each rank would compute it from its own part."""
    model, plan = with_functions(place, ALL[name])
    with pytest.raises(ValueError, match=ACROSS):
        training.adopt(model, tp_plan=plan, parallel_context=RANKS[0])


def test_a_function_across_ranks_is_refused_in_an_engine():
    model, plan = with_functions("q_norm", ALL["norm"])
    with (
        set_current_vllm_config(VllmConfig()),
        pytest.raises(ValueError, match=ACROSS),
    ):
        training.adopt(model, tp_plan=plan, parallel_context=RANKS[0])


@pytest.mark.parametrize("place", ["mlp", "attention", "q_norm"])
@pytest.mark.parametrize("name", OF_EACH_HEAD)
def test_a_function_of_each_head_is_accepted(name, place):
    model, plan = with_functions(place, OF_EACH_HEAD[name])
    training.adopt(model, tp_plan=plan, parallel_context=RANKS[0])


EXPERTS = "model.layers.*.mlp.experts"


@pytest.mark.parametrize(
    ("kind", "plan", "tp_size", "message"),
    [
        ("qwen3", None, 4, "2 key/value heads cannot be sharded across 4 ranks"),
        ("qwen3", {"model.layers.*.mlp.up_proj": "diagonal"}, 2, "'diagonal'"),
        ("qwen3", {"layers.*.mlp.up_proj": "colwise"}, 2, "has no such module"),
        ("qwen3", {"model.layers.*.mlp": "colwise"}, 2, "no training layer that can"),
        ("qwen3", {"model.layers.*.mlp": "moe_tp_experts"}, 2, "experts interface"),
        (
            "qwen3",
            {"model.layers.*.mlp.up_proj": "packed_rowwise"},
            2,
            "0.mlp.up_proj: A linear layer has no .* 'packed_rowwise'",
        ),
        (
            "qwen3",
            {"model.layers.*.mlp.up_proj.weight": "colwise"},
            2,
            "parameter model.layers.0.mlp.up_proj.weight .*given to modules",
        ),
        ("mixtral", {EXPERTS: "moe_tp_experts"}, 64, "0.mlp.experts: 96 intermediate"),
        (
            "mixtral",
            {EXPERTS: "moe_tp_experts", f"{EXPERTS}.gate_up_proj": "colwise"},
            2,
            "gate_up_proj the style 'colwise'. .* is 'packed_colwise'",
        ),
        (
            "mixtral",
            {f"{EXPERTS}.gate_up_proj": "packed_colwise"},
            2,
            "parameter .*gate_up_proj .* with the style 'moe_tp_experts'",
        ),
        (
            "phi3",
            {"model.layers.*.mlp.gate_up_proj": "qkv_colwise"},
            2,
            "gate_up_proj: .* for a layer of a module that calls attention",
        ),
        (
            "gpt2",
            {"transformer.h.*.attn.c_proj": "qkv_colwise"},
            2,
            r"queries, keys and values of 64 \+ 64 \+ 64 features.* has 64 output",
        ),
        (
            "gpt2",
            {"transformer.h.*.mlp.c_fc": "colwise_gather_output"},
            2,
            "linear layer with a transposed weight has no .* 'colwise_gather_output'",
        ),
        (
            "gpt2",
            {"transformer.h.*.attn.num_heads": "per_rank"},
            64,
            "attn.num_heads is 2, which 64 ranks do not divide",
        ),
        ("gpt2", {"transformer.h.*.attn.config": "per_rank"}, 2, "has no such module"),
        (
            "qwen3",
            {"model.layers.*.self_attn.k_proj": "mla_kv_a_proj"},
            2,
            "k_proj: .* needs qk_rope_head_dim",
        ),
        (
            "gpt_oss",
            {"model.layers.*.self_attn.sinks": "colwise"},
            2,
            "sinks the style 'colwise'. Styles are given to modules",
        ),
        (
            "phi3",
            {"model.layers.*.mlp.gate_up_proj": "colwise"},
            2,
            "gate and up in one layer.* Use 'packed_colwise'",
        ),
    ],
)
def test_what_cannot_be_sharded_is_refused(kind, plan, tp_size, message):
    context = ParallelContext(tp_size=tp_size)
    model = make(kind)
    names = [*model.state_dict()]
    with pytest.raises(ValueError, match=message):
        training.adopt(model, tp_plan=plan, parallel_context=context)
    assert not hasattr(model, "adoption") and [*model.state_dict()] == names
    assert any(type(module) is nn.Linear for module in model.modules())


def test_two_ranks_are_one(tmp_path, request):
    """Bits, gradients, and checkpoints."""
    skip_without_gpus(2)
    every = request.config.getoption("--all-models", default=False)
    families = sorted(CONFIGS) if every else FEW
    command = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", 2]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    result = run_python(
        [*command, CHECKS, tmp_path, *families], timeout=600, env=environment
    )
    report = result.stdout + result.stderr
    assert result.returncode == 0, report
    assert report.count("all checks passed") == 2, report


def build(config):
    return training.adopt(AutoModelForCausalLM.from_config(config))


def test_an_engine_of_two_ranks(make_llm, tmp_path, monkeypatch, sharded_and_dtype):
    """It has the bits of a trainer of one rank with its number of shards."""
    skip_without_gpus(2)
    family, dtype = sharded_and_dtype
    monkeypatch.setenv("VLLM_BATCH_INVARIANT", "1")
    original = make(family, getattr(torch, dtype))
    original.save_pretrained(tmp_path)
    ModelRegistry.register_model(type(original).__name__, build)
    llm = make_llm(tmp_path, dtype=dtype, max_model_len=64, tensor_parallel_size=2)
    reduced = ParallelContext(tp_reduction_shards=2)
    trainer = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=dtype).eval()
    trainer = training.adopt(trainer, parallel_context=reduced)
    report = parity.check(llm, trainer, PROMPTS, max_tokens=12)
    assert report.all_equal, report
