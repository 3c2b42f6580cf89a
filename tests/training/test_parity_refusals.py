# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""`parity.check` with engines, and what it refuses."""

import importlib
import json
import sys
from dataclasses import asdict, replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from tests.models.gpus import MEMORY
from vllm import training
from vllm.model_executor.checkpoint.fingerprint import fingerprint
from vllm.model_executor.checkpoint.save import checkpoint_tensors
from vllm.model_executor.determinism import probes
from vllm.model_executor.layers.training import self_check
from vllm.model_executor.layers.training.ops.attention.call import AttentionSpec
from vllm.model_executor.models.builder import worker
from vllm.model_executor.models.generic_transformer import (
    GenericTransformerConfig,
    GenericTransformerForCausalLM,
)
from vllm.model_executor.parallel_context import ParallelContext
from vllm.training import parity
from vllm.training.parity import refusals
from vllm.training.parity.__main__ import main

# The package has functions of these names.
check_module = importlib.import_module("vllm.training.parity.check")

SIZES = {
    "vocab_size": 300,
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "max_position_embeddings": 128,
    "initializer_range": 0.3,
}
PRINT = r"\w+\[64, 64\]:[0-9a-f]{16}"
PROMPTS = [[3, 1, 4], list(range(40)), [7] * 9]
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPE = torch.bfloat16 if DEVICE == "cuda" else torch.float32


def build(config, parallel_context):
    return GenericTransformerForCausalLM(config, parallel_context)


def a_model(**context) -> GenericTransformerForCausalLM:
    torch.manual_seed(0)
    config = GenericTransformerConfig(**SIZES)
    context = ParallelContext(device=DEVICE, **context)
    return GenericTransformerForCausalLM(config, context).to(DEVICE, DTYPE)


@pytest.fixture(scope="module")
def engine(tmp_path_factory):
    """An eager engine in the mode, with the weights of `a_model()`."""
    from vllm import LLM, ModelRegistry
    from vllm.distributed import cleanup_dist_env_and_memory

    directory = tmp_path_factory.mktemp("model")
    a_model().save_pretrained(directory)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("VLLM_BATCH_INVARIANT", "1")
        patch.setattr(ModelRegistry, "models", dict(ModelRegistry.models))
        ModelRegistry.register_model("GenericTransformerForCausalLM", build)
        llm = LLM(
            str(directory),
            dtype=str(DTYPE).removeprefix("torch."),
            max_model_len=128,
            enforce_eager=True,
            max_logprobs=-1,
            disable_log_stats=True,
            skip_tokenizer_init=True,
            **MEMORY,
        )
        yield llm
        llm.llm_engine.engine_core.shutdown()
        cleanup_dist_env_and_memory()


@pytest.mark.parametrize("full", [False, True])
@pytest.mark.parametrize("temperature", [0.0, 0.8])
def test_check(engine, full, temperature):
    report = parity.check(
        engine,
        a_model(),
        PROMPTS,
        max_tokens=8,
        temperature=temperature,
        full_vocab=full,
        localise=True,
    )
    report.raise_if_different()
    assert report.tokens == 24 and report.full_vocab == full
    assert report.weights_compared and "the same" in str(report)


def test_other_weights_are_refused_until_they_are_sent(engine):
    model = a_model()
    name = "model.layers.1.self_attn.v_proj.weight"
    with torch.no_grad():
        dict(checkpoint_tensors(model))[name][3, 5] += 0.5
    message = f"1 of 21 weights differ, first {name}: engine {PRINT}, trainer {PRINT} "
    with pytest.raises(ValueError, match=message):
        parity.check(engine, model, PROMPTS)
    for each in (model, a_model()):
        engine.collective_rpc(
            "reload_weights",
            kwargs={"weights_iterator": list(checkpoint_tensors(each))},
        )
        engine.reset_prefix_cache()
        report = parity.check(engine, each, PROMPTS, max_tokens=4)
        assert report.all_equal and report.weights_compared


def test_a_difference_is_localised(engine, monkeypatch):
    """Where weights are not known to differ, the layer is found by its output."""
    monkeypatch.setattr(refusals, "_weights", lambda *_: ([], "a test"))
    model = a_model()
    with torch.no_grad():
        model.model.layers[1].mlp.down_proj.weight[3, 3] += 0.5
    report = parity.check(engine, model, PROMPTS, max_tokens=4, localise=True)
    layer = "model.layers.1.mlp.down_proj"
    assert report.first_difference.layer == layer
    assert not report.weights_compared and "not compared (a test)" in str(report)
    assert "next step" in str(report) and "All known settings agree" in str(report)
    with pytest.raises(parity.ParityError, match=f"layer {layer}"):
        report.raise_if_different()
    # The engine is as it was.
    assert parity.check(engine, a_model(), PROMPTS, max_tokens=4).all_equal


def test_a_buffer_that_differs_is_named(engine):
    model = a_model()
    name = next(name for name, _ in model.named_buffers() if "rotary" in name)
    model.get_buffer(name).mul_(1.25)
    report = parity.check(engine, model, PROMPTS, max_tokens=4)
    assert not report.all_equal and report.weights_compared
    assert f"The buffer {name}, which no checkpoint has, differs" in report.next_step


def test_processed_logprobs(engine, monkeypatch):
    """The temperature they hold is the trainer's too."""
    seen = []

    def compare_with(scorer, outputs, full_vocab, temperature):
        seen.append(temperature)
        return original(scorer, outputs, full_vocab, 1.0)

    original = check_module.compare_with
    monkeypatch.setattr(check_module, "compare_with", compare_with)
    for mode in ("raw_logprobs", "processed_logprobs"):
        config = engine.llm_engine.vllm_config.model_config
        monkeypatch.setattr(config, "logprobs_mode", mode)
        for temperature in (0.0, 0.5):
            parity.check(
                engine, a_model(), PROMPTS[:1], max_tokens=1, temperature=temperature
            )
    assert seen == [1.0, 1.0, 1.0, 0.5]


SETTINGS = {
    "quantization": ("model_config", "fp8", "quantization=None"),
    "cache_dtype": ("cache_config", "fp8", 'kv_cache_dtype="auto"'),
    "speculative_config": (
        None,
        SimpleNamespace(method="eagle"),
        "by 'eagle' on .*'ngram' and 'draft_model' on CPU were shown .* without specul",
    ),
    "lora_config": (None, object(), "enable_lora=False"),
    "logprobs_mode": ("model_config", "raw_logits", 'logprobs_mode="raw_logprobs"'),
    "max_logprobs": ("model_config", 20, "max_logprobs=-1"),
    "enforce_eager": ("model_config", False, "enforce_eager=True"),
}


@pytest.mark.parametrize("name", SETTINGS)
def test_engine_settings(engine, name, monkeypatch):
    section, value, advice = SETTINGS[name]
    config = engine.llm_engine.vllm_config
    owner = getattr(config, section) if section else config
    monkeypatch.setattr(owner, name, value)
    monkeypatch.setattr(engine, "generate", None)
    with pytest.raises(ValueError, match=advice):
        parity.check(engine, a_model(), PROMPTS, full_vocab=True, localise=True)


WORKERS = {
    "batch_invariant": (False, "set VLLM_BATCH_INVARIANT=1"),
    "attention": (["FLASHINFER"], "backend FLASHINFER has no counterpart"),
    "device": ("tpu", f"The trainer is on {DEVICE}"),
    "dtype": ("float16", "computes in float16: start the engine with dtype="),
    "tp_reduction_shards": (2, "ParallelContext.tp_reduction_shards=2."),
}


@pytest.mark.parametrize("name", WORKERS)
def test_what_workers_say(engine, name, monkeypatch):
    value, advice = WORKERS[name]
    described = worker.describe

    def describe(self):
        return described(self) | {name: value}

    monkeypatch.setattr(worker, "describe", describe)
    monkeypatch.setattr(engine, "generate", None)
    with pytest.raises(ValueError, match=advice):
        parity.check(engine, a_model(), PROMPTS)


def test_a_trainers_head_is_called(engine):
    """One that is changed is not taken for its weight."""
    model = a_model()
    forward = model.lm_head.forward
    model.lm_head.forward = lambda x: forward(x) * 1.5
    report = parity.check(engine, model, PROMPTS, max_tokens=2)
    assert report.weights_compared and report.equal == 0


def test_the_engines_head_is_the_trainers(engine, monkeypatch):
    """Unless the trainer has no module of that path, or another is named."""
    described = worker.describe
    for head, found in [("model.layers.0.self_attn.o_proj", False), ("absent", True)]:
        say = lambda self, head=head: described(self) | {"head": head}  # noqa: E731
        monkeypatch.setattr(worker, "describe", say)
        if found:
            assert parity.check(engine, a_model(), PROMPTS, max_tokens=1).all_equal
        else:
            with pytest.raises(TypeError, match="output of its head .*o_proj"):
                parity.check(engine, a_model(), PROMPTS, max_tokens=1)
        report = parity.check(engine, a_model(), PROMPTS, max_tokens=1, head="lm_head")
        assert report.all_equal
    with pytest.raises(ValueError, match="names the head 'output', but the module"):
        parity.check(engine, a_model(), PROMPTS, head="output")


def test_a_trainer_may_want_batches_where_the_engine_does_not(engine):
    class Batched(GenericTransformerForCausalLM):
        def forward(self, input_ids, positions):
            assert input_ids.ndim == 2
            return super().forward(input_ids, positions)

    model = a_model()
    model.__class__ = Batched
    assert parity.check(engine, model, PROMPTS, max_tokens=1).all_equal


BAD_PROMPTS = [
    ([[1.5]], r"prompts\[0\] is \[1.5\]; give a text, or token ids"),
    ([["a"]], "give a text, or token ids"),
    ([[True]], "give a text, or token ids"),
    ([torch.ones(3)], "give a text, or token ids"),
    ([torch.tensor(3)], "give a text, or token ids"),
    ([1, 2, 3], r"prompts\[0\] is 1; give"),
    ("a text", "prompts is 'a text'; give a list of prompts"),
    (["a text"], r"prompts\[0\] is a text, and the engine has no tokenizer"),
    ([[1, 2], []], r"prompts\[1\] is empty"),
    ([[1, 2], [1] * 128], r"prompts\[1\] has 128 tokens; .* at most 127"),
    ([[1, 300]], r"prompts\[0\] holds the token 300; .* are 0 to 299"),
    ([[-1]], "holds the token -1"),
]


def test_prompts_are_checked_before_the_engine_gets_them(engine, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(engine, "generate", None)
        for prompts, message in BAD_PROMPTS:
            with pytest.raises((TypeError, ValueError), match=message):
                parity.check(engine, a_model(), prompts)
    ids = [3, 1, 4]
    prompts = [
        torch.tensor(ids),
        np.array(ids, np.uint16),
        tuple(ids),
        [*np.array(ids)],
    ]
    reports = parity.check(engine, a_model(), prompts, max_tokens=2)
    assert reports.all_equal and reports.tokens == 8


def test_another_attention_kernel(engine):
    model = a_model()
    for block in model.model.layers:
        block.self_attn.attn.implementation = "reference"
    with pytest.raises(ValueError, match="computes with 'reference'.*implementation="):
        parity.check(engine, model, PROMPTS)


def test_no_prompts_and_no_such_function(engine):
    with pytest.raises(ValueError, match="prompts is empty"):
        parity.check(engine, a_model(), [])
    with pytest.raises(ValueError, match="no function 'forward'; it has describe"):
        engine.collective_rpc("call_training", args=("forward",))


def test_an_engine_says_how_it_is_sharded(engine):
    (described,) = engine.collective_rpc("call_training", args=("sharding",))
    own = training.sharding(a_model())
    assert described == {name: asdict(held) for name, held in own.items()}


def test_weights_that_cannot_be_compared():
    model = a_model()
    known = {"weights": None, "weights_missing": []}
    assert "load_weights of its own" in refusals._weights(model, [known])[1]
    known = {"weights": {}, "weights_missing": ["a", "b"]}
    assert refusals._weights(model, [known])[1].endswith("never loaded a, b")
    others = {"weights": {}, "weights_missing": [*"bcdefg"]}
    note = refusals._weights(model, [known, others])[1]
    assert note.endswith("never loaded a, b, c, d, e and 2 more")


def stages_of(prints: dict[str, str]) -> list[dict]:
    """Two tensor-parallel ranks of two pipeline stages; one tensor is on both."""
    names, shared = list(prints), "model.embed_tokens.weight"
    return [
        {
            "tp_rank": tp_rank,
            "pp_rank": pp_rank,
            "weights": {name: prints[name] for name in {shared, *names[pp_rank::2]}},
            "weights_missing": [],
        }
        for pp_rank in range(2)
        for tp_rank in range(2)
    ]


def test_weights_of_pipeline_stages_are_compared_as_a_whole():
    model = a_model()
    prints = {name: fingerprint(tensor) for name, tensor in checkpoint_tensors(model)}
    assert refusals._weights(model, stages_of(prints)) == ([], "")
    stages = stages_of(prints)
    stages[3]["weights"]["model.embed_tokens.weight"] = "other"
    (reason,) = refusals._weights(model, stages)[0]
    assert (
        "1 of 21 weights differ, first model.embed_tokens.weight: engine other on "
        "pipeline stage 1, tensor-parallel rank 1, trainer" in reason
    )
    stages = stages_of(prints)
    for stage in stages[::2]:  # of rank 0
        stage["weights"].pop("lm_head.weight", None)
    stages[1]["weights"]["a.weight"] = stages[1]["weights"]["b.weight"] = "other"
    lacking, extra = refusals._weights(model, stages)[0]
    assert "The engine lacks 1 weights that the other has: lm_head.weight." in lacking
    assert "The trainer lacks 2 weights that the other has: a.weight, b.w" in extra


def test_what_is_no_engine_and_no_model(engine):
    server = SimpleNamespace(generate=None)
    for llm in (server, "a directory", type(engine), a_model()):
        with pytest.raises(TypeError, match=r"must be a vllm.LLM.*parity.compare"):
            parity.check(llm, a_model(), PROMPTS)
    for model in ("a directory", GenericTransformerForCausalLM, {}, engine):
        with pytest.raises(TypeError, match="as model; give the training model, a t"):
            parity.check(engine, model, PROMPTS)
    with pytest.raises(ValueError, match="Identity has no parameters to compare"):
        parity.check(engine, torch.nn.Identity(), PROMPTS)
    with (
        torch.autocast(DEVICE, torch.bfloat16),
        pytest.raises(ValueError, match="autocast is on, .* outside of it"),
    ):
        parity.check(engine, a_model(), PROMPTS)


def test_a_model_of_another_config(engine):
    config = GenericTransformerConfig(**SIZES | {"num_hidden_layers": 3})
    other = GenericTransformerForCausalLM(config, ParallelContext(device=DEVICE))
    with pytest.raises(ValueError, match="lacks 9 weights .* and 4 more. Build both"):
        parity.check(engine, other.to(DEVICE, DTYPE), PROMPTS)
    config = GenericTransformerConfig(**SIZES | {"intermediate_size": 40})
    other = GenericTransformerForCausalLM(config, ParallelContext(device=DEVICE))
    with pytest.raises(ValueError, match="of 21 weights differ.*one builder, one conf"):
        parity.check(engine, other.to(DEVICE, DTYPE), PROMPTS)


def test_speculation():
    """On CPU some methods keep the bits of raw logprobs."""

    def reasons(method, device="cpu", mode="raw_logprobs"):
        config = SimpleNamespace(
            speculative_config=SimpleNamespace(method=method),
            device_config=SimpleNamespace(device_type=device),
            model_config=SimpleNamespace(logprobs_mode=mode),
        )
        return list(refusals._speculation(config))

    for method in ("ngram", "draft_model"):
        assert not reasons(method)
        (reason,) = reasons(method, "cuda")
        assert f"by '{method}' on cuda. Only 'ngram' and 'draft_model' on" in reason
        (reason,) = reasons(method, mode="processed_logprobs")
        assert 'logprobs_mode="raw_logprobs"' in reason
    assert "by 'eagle' on cpu" in reasons("eagle")[0]


def test_the_setting_of_reduction_shards_is_named():
    def reason(own, engine, ranks):
        described = {"tp_reduction_shards": engine, "tp_size": ranks}
        model = a_model(tp_reduction_shards=own)
        return " ".join(refusals._reduction_shards(model, described))

    assert not reason(1, 1, 1) and not reason(2, 2, 2) and not reason(2, 2, 1)
    two_ranks = reason(1, 2, 2)
    assert "the trainer's model.layers.0.self_attn.o_proj adds up 1: " in two_ranks
    assert two_ranks.endswith("such as ParallelContext(tp_reduction_shards=2).")
    assert reason(2, 1, 1).endswith('additional_config={"tp_reduction_shards": 2}.')


def test_a_report_of_differences_says_what_to_do_next():
    difference = parity.Difference(0, 0, 4, 9, -1.0, -2.0)
    report = parity.ParityReport(2, 1, 1.0, 0.1, False, difference)
    assert "next step" in str(report) and "tp_reduction_shards=n" in str(report)
    with pytest.raises(parity.ParityError, match=r"-2.0. parity.check\(llm, model"):
        report.raise_if_different()
    assert "next step" not in str(parity.ParityReport(2, 2, 0.0, 0.0, False, None))
    ours, plain = a_model(), torch.nn.Sequential(torch.nn.Linear(2, 2))
    of_two_ranks = {"tp_reduction_shards": 2, "buffers": {}}
    step = refusals._next_step(plain, of_two_ranks, False)
    assert step.startswith("0 is a torch.nn.Linear, whose rows may depend on the batch")
    step = refusals._next_step(torch.nn.LayerNorm(2), of_two_ranks, False)
    assert "2 tensor-parallel ranks and the trainer no RowParallelLinear" in step
    assert "localise=True" in refusals._next_step(ours, of_two_ranks, False)
    assert "localise=True" not in refusals._next_step(ours, of_two_ranks, True)


def test_a_sharded_trainer_is_told_how_all_its_ranks_compare():
    sharded = a_model()
    sharded.lm_head.tp_size = 2
    (reason,) = refusals._trainer(sharded, {})
    assert "call parity.compare(model, outputs) on each" in reason


def test_self_check():
    model = a_model()
    self_check.self_check(model)
    linears = set(self_check.linear_shapes(model))
    assert probes.LinearShape(300, 64, DTYPE) in linears
    assert probes.LinearShape(64, 64, DTYPE) in linears
    halves = set(self_check.linear_shapes(a_model(tp_reduction_shards=2)))
    assert probes.LinearShape(64, 32, DTYPE) in halves


def test_an_engine_of_two_ranks_says_how_a_trainer_of_one_is_built(monkeypatch):
    said = []
    logger = SimpleNamespace(
        warning_once=lambda text, *args, scope: said.append(text % args)
    )
    monkeypatch.setattr(self_check, "logger", logger)
    monkeypatch.setattr(self_check, "self_check_shapes", lambda *_: None)
    config = SimpleNamespace(attention_config=SimpleNamespace(backend=None))
    self_check.self_check_engine(a_model(), config)
    assert not said
    self_check.self_check_engine(a_model(tp_size=2), config)
    (text,) = said
    assert "add up 2 partial products" in text
    assert (
        "built with as many ranks, or with ParallelContext(tp_reduction_shards=2)"
        in text
    )


def test_self_check_names_the_linear(monkeypatch):
    original = probes.linear

    def linear(x, weight, bias):
        return original(x, weight, bias) * (1 if len(x) != 7 else 1.5)

    monkeypatch.setattr(probes, "linear", linear)
    shape = probes.LinearShape(40, 32, DTYPE, True)
    with pytest.raises(parity.BatchInvarianceError) as error:
        parity.self_check_shapes([shape], [], DEVICE)
    for text in ("[40, 32] and a bias", str(DTYPE), "7 rows", "VLLM_BATCH_INVARIANT"):
        assert text in str(error.value)


def test_flash_attention_3_is_refused_with_a_window():
    def shape(window):
        spec = AttentionSpec(0.125, sliding_window=window)
        return self_check.AttentionShape(8, 2, 64, torch.bfloat16, spec)

    for backend in ("", "FLASH_ATTN"):
        with pytest.raises(probes.BatchInvarianceError, match="3 depends on the b"):
            self_check.refuse_window(backend, 9, shape(33))
    self_check.refuse_window("FLASH_ATTN", 9, shape(None))
    self_check.refuse_window("FLASH_ATTN", 8, shape(33))
    self_check.refuse_window("TRITON_ATTN", 9, shape(33))


@pytest.mark.parametrize("sinks", [False, True])
@pytest.mark.parametrize("window", [None, 20])
def test_self_check_names_the_attention(monkeypatch, sinks, window):
    spec = AttentionSpec(0.125, sliding_window=window)
    shape = parity.AttentionShape(4, 2, 64, DTYPE, spec, sinks)
    parity.self_check_shapes([], [shape], DEVICE)
    original = self_check.attention

    def attention(query, *args, **options):
        return original(query, *args, **options) * (1 if len(query) != 33 else 1.5)

    monkeypatch.setattr(self_check, "attention", attention)
    with pytest.raises(parity.BatchInvarianceError, match="33 tokens alone of 257"):
        parity.self_check_shapes([], [replace(shape, sinks=False)], DEVICE)


def test_the_command(tmp_path, monkeypatch, capsys):
    """Its table, its files, and its exit status when a logprob differs."""
    from vllm.training.parity import __main__ as command

    builder = f"{build.__module__}:build"
    monkeypatch.setitem(sys.modules, build.__module__, sys.modules[__name__])
    argv = ["parity", str(tmp_path), "--builder", builder, "--prompts", "2"]
    argv += ["--prompt-lengths", "3,5", "--out", str(tmp_path / "out")]
    monkeypatch.setattr(sys, "argv", argv)
    model = a_model()
    model.save_pretrained(tmp_path)
    shut = []
    config = SimpleNamespace(
        hf_config=model.config, dtype=DTYPE, get_vocab_size=lambda: 300
    )
    core = SimpleNamespace(shutdown=lambda timeout: shut.append(timeout))
    vllm_config = SimpleNamespace(model_config=config)
    llm_engine = SimpleNamespace(vllm_config=vllm_config, engine_core=core)
    llm = SimpleNamespace(llm_engine=llm_engine)
    monkeypatch.setattr(command, "start_engine", lambda args: llm)
    difference = parity.Difference(0, 0, 4, 9, -1.0, -2.0)
    reports = [
        parity.ParityReport(2, 2, 0.0, 0.0, False, None, True, "", torch.zeros(2)),
        parity.ParityReport(
            2, 1, 1.0, 0.1, False, difference, True, "", torch.tensor([0.0, -1.0])
        ),
    ]

    def check(llm, trainer, prompts, **options):
        assert [len(prompt) for prompt in prompts] == [3, 5]
        for name, parameter in trainer.named_parameters():
            assert torch.equal(parameter, model.get_parameter(name)), name
        return reports.pop(0)

    monkeypatch.setattr(command, "check", check)
    main()
    assert "equal bit for bit     2" in capsys.readouterr().out
    with pytest.raises(SystemExit) as error:
        main()
    assert error.value.code == 1 and len(shut) == 2
    assert json.loads((tmp_path / "out/report.json").read_text())["equal"] == 1
    assert (tmp_path / "out/histogram.png").read_bytes().startswith(b"\x89PNG")
