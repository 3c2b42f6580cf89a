# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""Built models in a real engine."""

import json
import random

import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from torch import nn
from torch._functorch._aot_autograd import autograd_cache
from transformers import (
    Gemma2Config,
    Gemma2ForCausalLM,
    PreTrainedConfig,
    PreTrainedTokenizerFast,
)

from tests.models.builder.models import (
    GENERIC,
    PLAIN,
    PLAIN_FIELDS,
    BiasedGPT,
    CappedGPT,
    assert_logprobs_agree_in_bf16,
    assert_trainer_agrees,
    build_biased,
    build_capped,
    build_gemma,
    build_generic,
    build_plain,
    build_shifted,
    build_softmax,
    greedy,
    save_generic,
    save_plain,
)
from vllm import ModelRegistry
from vllm.exceptions import VLLMValidationError
from vllm.model_executor.checkpoint.save import checkpoint_tensors
from vllm.model_executor.models.builder import model_builder
from vllm.model_executor.models.builder.head import HeadTap

GEMMA = dict(
    vocab_size=300,
    hidden_size=64,
    intermediate_size=96,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=32,
    max_position_embeddings=256,
    sliding_window=16,
    final_logit_softcapping=2.0,
    attn_logit_softcapping=None,
    initializer_range=0.3,
    pad_token_id=0,
    bos_token_id=1,
    eos_token_id=2,
)
PROMPTS = [[1, 2, 3], list(range(20, 90)), [7], [5, 6] * 20]


def test_a_model_in_plain_pytorch(make_llm, tmp_path):
    model = save_plain(tmp_path)
    ModelRegistry.register_model(PLAIN, build_plain)
    llm = make_llm(tmp_path)
    for token in (-1, 300):
        with pytest.raises(
            VLLMValidationError, match=f"{token} at place 1 .* from 0 to 299 are"
        ):
            greedy(llm, [[1, token]])
    assert_trainer_agrees(model, PROMPTS, greedy(llm, PROMPTS))


def test_a_model_that_says_what_its_head_receives(make_llm, tmp_path):
    plain = save_plain(tmp_path)
    model = CappedGPT(PreTrainedConfig(**PLAIN_FIELDS))
    model.load_state_dict(plain.state_dict())
    ModelRegistry.register_model(PLAIN, build_capped)
    llm = make_llm(tmp_path)
    assert_trainer_agrees(model, PROMPTS, greedy(llm, PROMPTS))
    (worker,) = llm.collective_rpc("call_training", args=("describe",))
    assert worker["head"] is None and worker["batched"] is None


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("tied", [False, True])
def test_the_generic_transformer(make_llm, tmp_path, tied, dtype):
    model = save_generic(tmp_path, tie_word_embeddings=tied)
    ModelRegistry.register_model(GENERIC, build_generic)
    completions = greedy(make_llm(tmp_path, dtype=dtype), PROMPTS)
    if dtype == "float32":
        assert_trainer_agrees(model, PROMPTS, completions)
    else:
        assert_logprobs_agree_in_bf16(model.bfloat16(), PROMPTS, completions)


def test_a_compiled_engine(make_llm, tmp_path):
    model = save_plain(tmp_path)
    ModelRegistry.register_model(PLAIN, build_plain)
    llm = make_llm(tmp_path, enforce_eager=False)
    assert llm.apply_model(lambda served: served.do_not_compile) == [False]
    assert_trainer_agrees(model, PROMPTS, greedy(llm, PROMPTS))


def test_compiled_graphs_have_cache_entries_of_their_own(make_llm, tmp_path):
    """Also those that torch cannot hash, whatever seeds Python's generator has."""
    save_plain(tmp_path)
    ModelRegistry.register_model(PLAIN, build_plain)
    make_llm(tmp_path)
    graph = torch.fx.Graph()
    x = graph.placeholder("x")
    graph.output(graph.call_function(torch.Tensor.split, (x, 2)))
    module = torch.fx.GraphModule({}, graph)
    keys = set()
    with torch._functorch.config.patch(bypass_autograd_cache_key=True):
        for _ in range(2):
            random.seed(0)
            key, _ = autograd_cache.autograd_cache_key(module, [], None)
            keys.add(key)
    assert len(keys) == 2


def test_a_lazy_builder_in_model_class_overrides(make_llm, tmp_path):
    model = save_plain(tmp_path)
    overrides = {PLAIN: f"{build_plain.__module__}:build_plain"}
    llm = make_llm(tmp_path, model_class_overrides=overrides)
    assert_trainer_agrees(model, PROMPTS, greedy(llm, PROMPTS))


def push(llm, tensors):
    llm.collective_rpc("reload_weights", kwargs={"weights_iterator": list(tensors)})
    llm.reset_prefix_cache()


@torch.no_grad()
def perturb(model):
    for parameter in model.parameters():
        parameter.add_(torch.randn_like(parameter), alpha=0.05)


@pytest.mark.parametrize("tied", [False, True])
def test_weights_are_synchronised(make_llm, tmp_path, tied):
    model = save_generic(tmp_path, tie_word_embeddings=tied)
    ModelRegistry.register_model(GENERIC, build_generic)
    llm = make_llm(tmp_path)
    before = greedy(llm, PROMPTS)
    for _ in range(2):
        perturb(model)
        push(llm, checkpoint_tensors(model))
        after = greedy(llm, PROMPTS)
        assert_trainer_agrees(model, PROMPTS, after)
        assert [c.token_ids for c in before] != [c.token_ids for c in after]
        before = after


def test_whole_modules_are_synchronised(make_llm, tmp_path):
    model = save_generic(tmp_path)
    ModelRegistry.register_model(GENERIC, build_generic)
    llm = make_llm(tmp_path)
    perturb(model.model.layers[1].mlp)
    push(llm, [t for t in checkpoint_tensors(model) if "layers.1.mlp" in t[0]])
    assert_trainer_agrees(model, PROMPTS, greedy(llm, PROMPTS))


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ([("model.norm.weight", torch.zeros(3))], "Wrong shape .1.: model.norm"),
        ([("no.such.weight", torch.zeros(3))], "Not in the model .1.: no.such.weight"),
        (
            [("model.layers.0.self_attn.q_proj.weight", torch.zeros(128, 128))],
            "Missing .2.: model.layers.0.self_attn.k_proj",
        ),
    ],
)
def test_a_refused_synchronisation_changes_nothing(
    make_llm, tmp_path, tensors, message
):
    model = save_generic(tmp_path)
    ModelRegistry.register_model(GENERIC, build_generic)
    llm = make_llm(tmp_path)
    good = [t for t in checkpoint_tensors(model) if "mlp" in t[0]]
    with pytest.raises(ValueError, match=message):
        push(llm, [*((name, 2 * t) for name, t in good), *tensors])
    assert_trainer_agrees(model, PROMPTS, greedy(llm, PROMPTS))
    perturb(model)
    push(llm, checkpoint_tensors(model))
    assert_trainer_agrees(model, PROMPTS, greedy(llm, PROMPTS))


def test_a_module_with_the_engine_interface_is_used_as_it_is(make_llm, tmp_path):
    from vllm.model_executor.models.generic_transformer import (
        GenericTransformerForCausalLMVLLM,
    )

    model = save_generic(tmp_path)
    ModelRegistry.register_model(
        GENERIC,
        lambda vllm_config, prefix: GenericTransformerForCausalLMVLLM(
            vllm_config, prefix
        ),
    )
    llm = make_llm(tmp_path)
    (served,) = llm.apply_model(type)
    assert served is GenericTransformerForCausalLMVLLM
    assert_trainer_agrees(model, PROMPTS, greedy(llm, PROMPTS))


def test_a_head_that_does_more_than_project(make_llm, tmp_path):
    """What follows the projection is part of the head module."""

    class CappedHead(nn.Module):
        def __init__(self, head):
            super().__init__()
            self.projection = head

        def forward(self, hidden_states):
            return 5 * torch.tanh(self.projection(hidden_states) / 5)

    def build(config):
        model = build_generic(config, None)
        model.out = CappedHead(model.lm_head)
        del model.lm_head
        model.forward = lambda ids, positions: model.out(x=model.model(ids, positions))
        model.out.forward = lambda x: CappedHead.forward(model.out, x)
        return model

    model = save_generic(tmp_path)
    state = load_file(tmp_path / "model.safetensors")
    state["out.projection.weight"] = state.pop("lm_head.weight")
    save_file(state, tmp_path / "model.safetensors")
    ModelRegistry.register_model(GENERIC, model_builder(head="out")(build))
    completions = greedy(make_llm(tmp_path), PROMPTS)
    model.lm_head.register_forward_hook(lambda head, args, x: 5 * torch.tanh(x / 5))
    assert_trainer_agrees(model, PROMPTS, completions)


def test_parameter_names_are_those_of_the_built_module(make_llm, tmp_path):
    model = save_generic(tmp_path)
    ModelRegistry.register_model(GENERIC, build_generic)
    llm = make_llm(tmp_path)
    (served,) = llm.apply_model(lambda m: [name for name, _ in m.named_parameters()])
    assert served == [name for name, _ in model.named_parameters()]


def test_what_follows_the_head_is_applied_where_tokens_are_sampled(make_llm, tmp_path):
    plain = save_plain(tmp_path)
    model = BiasedGPT(PreTrainedConfig(**PLAIN_FIELDS))
    model.load_state_dict(plain.state_dict())
    ModelRegistry.register_model(PLAIN, build_biased)
    llm = make_llm(tmp_path, enforce_eager=False)
    assert_trainer_agrees(
        lambda ids, places: model(ids, pos=places)[0], PROMPTS, greedy(llm, PROMPTS)
    )


def test_a_transformers_model_but_for_attention(make_llm, tmp_path):
    """A capped head, tied to the embedding; `forward` as transformers wrote it."""
    torch.manual_seed(0)
    model = Gemma2ForCausalLM(Gemma2Config(**GEMMA)).eval()
    model.save_pretrained(tmp_path)
    ModelRegistry.register_model("Gemma2ForCausalLM", build_gemma)
    llm = make_llm(tmp_path, enforce_eager=False)
    (name,) = llm.apply_model(lambda served: type(served.module).__name__)
    assert name == "Gemma2ForCausalLM"
    assert_trainer_agrees(
        lambda ids, places: model(ids).logits, PROMPTS, greedy(llm, PROMPTS)
    )


def test_what_cannot_be_repeated_after_the_head_is_refused(make_llm, tmp_path):
    save_plain(tmp_path)
    ModelRegistry.register_model(PLAIN, build_softmax)
    with pytest.raises(TypeError, match="head 'to_vocab', or a function of each logit"):
        make_llm(tmp_path)


def test_a_model_that_mixes_tokens_is_refused_before_the_first_step(make_llm, tmp_path):
    save_plain(tmp_path)
    ModelRegistry.register_model(PLAIN, build_shifted)
    with pytest.raises(
        ValueError, match=r"'blocks.1' \(ShiftedBlock\) mixes tokens outside"
    ):
        make_llm(tmp_path, enable_prefix_caching=False, max_num_batched_tokens=64)


def test_embeddings_are_what_the_head_would_receive(make_llm, tmp_path):
    model = save_plain(tmp_path)
    # vLLM's pooling wants a tokenizer, also for token ids.
    tokenizer = Tokenizer(WordLevel({"a": 0}, unk_token="a"))
    PreTrainedTokenizerFast(tokenizer_object=tokenizer).save_pretrained(tmp_path)
    ModelRegistry.register_model(PLAIN, build_plain)
    llm = make_llm(tmp_path, runner="pooling", skip_tokenizer_init=False)
    prompts = [{"prompt_token_ids": ids} for ids in PROMPTS]
    outputs = llm.embed(prompts, use_tqdm=False)
    with HeadTap(model.to_vocab).installed(), torch.no_grad():
        for ids, output in zip(PROMPTS, outputs, strict=True):
            states = model(torch.tensor([ids]), torch.arange(len(ids))[None])[0, -1]
            expected = nn.functional.normalize(states, dim=0)
            embedding = torch.tensor(output.outputs.embedding)
            torch.testing.assert_close(embedding, expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"enable_lora": True}, "Merge the adapter into the weights"),
        ({"runner": "pooling", "convert": "classify"}, "convert='embed'"),
    ],
)
def test_what_vllm_cannot_add_to_a_built_model(make_llm, tmp_path, options, message):
    save_plain(tmp_path)
    ModelRegistry.register_model(PLAIN, build_plain)
    with pytest.raises(NotImplementedError, match=message) as error:
        make_llm(tmp_path, **options)
    assert "built by tests.models.builder.models.build_plain" in str(error.value)


@pytest.mark.parametrize(
    ("build", "error", "message"),
    [
        (lambda config: None, TypeError, "returned NoneType, but it must return"),
        (lambda config: 1 // 0, ZeroDivisionError, "division"),
        (
            model_builder(head="head")(lambda config: build_plain(config)),
            ValueError,
            "names the head 'head', but the module has no such submodule",
        ),
        (
            lambda config: nn.MultiheadAttention(2, 1),
            TypeError,
            "cannot be called with token ids and positions: missing .* 'value'",
        ),
    ],
)
def test_builders_that_fail(make_llm, tmp_path, build, error, message):
    save_plain(tmp_path)
    ModelRegistry.register_model(PLAIN, build)
    with pytest.raises(error, match=message) as raised:
        make_llm(tmp_path)
    if error is ZeroDivisionError:
        assert "<lambda> ran." in raised.value.__notes__[0]


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"hidden_size": None}, "config.json lacks hidden_size"),
        ({"hidden_size": None, "vocab_size": None}, "lacks hidden_size, vocab_size"),
        ({"num_hidden_layers": "two"}, "'num_hidden_layers': 'two'.*whole numbers"),
        ({"num_attention_heads": 3}, "64 is not divisible by num_attention_heads 3"),
        ({"num_key_value_heads": 4}, "2 is not a multiple of num_key_value_heads 4"),
    ],
)
def test_configs_that_do_not_do(make_llm, tmp_path, fields, message):
    save_plain(tmp_path)
    path = tmp_path / "config.json"
    merged = json.loads(path.read_text()) | fields
    path.write_text(json.dumps({k: v for k, v in merged.items() if v is not None}))
    ModelRegistry.register_model(PLAIN, build_plain)
    with pytest.raises(ValueError, match=message):
        make_llm(tmp_path)


def test_a_checkpoint_that_does_not_fit_is_named_whole(make_llm, tmp_path):
    save_generic(tmp_path)
    path = tmp_path / "model.safetensors"
    tensors = load_file(path)
    del tensors["model.layers.0.self_attn.k_proj.weight"], tensors["model.norm.weight"]
    tensors["model.layers.1.mlp.up_proj.weight"] = torch.zeros(3, 3)
    tensors["model.layers.7.mlp.up_proj.weight"] = torch.zeros(3)
    save_file(tensors, path)
    ModelRegistry.register_model(GENERIC, build_generic)
    with pytest.raises(ValueError) as error:
        make_llm(tmp_path)
    message = str(error.value)
    assert (
        "Missing (2): model.layers.0.self_attn.k_proj.weight; model.norm.weight."
        in message
    )
    assert "Not in the model (1): model.layers.7.mlp.up_proj.weight." in message
    assert (
        "model.layers.1.mlp.up_proj.weight is [3, 3], the model needs [384" in message
    )


def test_a_lazy_builder_that_does_not_import(make_llm, tmp_path):
    save_plain(tmp_path)
    with pytest.raises(ValueError, match="'no_module:build', which does not load: Mod"):
        make_llm(tmp_path, model_class_overrides={PLAIN: "no_module:build"})


def test_heads_that_the_ranks_do_not_divide(make_llm, tmp_path):
    save_generic(tmp_path, num_attention_heads=3, num_key_value_heads=3, head_dim=32)
    ModelRegistry.register_model(GENERIC, build_generic)
    with pytest.raises(ValueError, match="attention heads .3. must be divisible by"):
        make_llm(tmp_path, tensor_parallel_size=2)


def test_a_head_size_without_a_kernel(make_llm, tmp_path):
    if torch.cuda.is_available():
        pytest.skip("of CPUs: vLLM's FlexAttention for CUDA takes any head size")
    save_generic(tmp_path, head_dim=16)
    ModelRegistry.register_model(GENERIC, build_generic)
    with pytest.raises(ValueError, match="attn.*head_size=16; it has .*64"):
        make_llm(tmp_path)
