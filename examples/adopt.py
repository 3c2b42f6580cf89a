# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""Train and serve a model class of transformers as it is, with the same bits.

A small model of the class is adopted, trained on the sources of Python's standard
library for a minute, saved, and served by `LLM(..., tensor_parallel_size=2)`. The
trainer then scores the tokens that the engine sampled, both in batch-invariant mode, so
the logprobs are equal, bit for bit.

    python examples/adopt.py                        # Qwen3ForCausalLM
    python examples/adopt.py Gemma2ForCausalLM      # or any other class
"""

import argparse
import os
import sys
import time
from pathlib import Path
from typing import Any

import language_model
import torch
import transformers
from torch import nn

from vllm import training
from vllm.model_executor.parallel_context import ParallelContext

TENSOR_PARALLEL_SIZE = 2
PROMPTS = ["def ", "import os\n", "class ", "    return ", "for i in range("]
MAX_TOKENS = 64
# Those of which a class's config has the name are given to it.
SIZES = {
    "vocab_size": language_model.VOCAB_SIZE,
    "max_position_embeddings": 1024,
    "hidden_size": 256,
    "intermediate_size": 512,
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 32,
    "query_pre_attn_scalar": 32,
    "sliding_window": 64,
    # Mixtures of experts.
    "num_experts": 8,
    "num_local_experts": 8,
    "n_routed_experts": 8,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 128,
    "shared_expert_intermediate_size": 128,
    "first_k_dense_replace": 1,
    "n_group": 1,
    "topk_group": 1,
    # Latent attention.
    "q_lora_rank": 64,
    "kv_lora_rank": 32,
    "qk_rope_head_dim": 16,
    "qk_nope_head_dim": 16,
    "v_head_dim": 32,
}
DROPOUTS = ("attention_dropout", "attn_pdrop", "embd_pdrop", "resid_pdrop")


def small_config(kind: type, end: int) -> transformers.PreTrainedConfig:
    """A config of a small model of a class.

    Args:
        kind: The class.
        end: The token that ends a text.
    """
    config_class = kind.config_class
    names = config_class.attribute_map
    default = config_class()
    values: dict[str, Any] = SIZES | dict.fromkeys(DROPOUTS, 0.0)
    values |= {"bos_token_id": end, "eos_token_id": end}
    if getattr(default, "pad_token_id", None) is not None:
        values["pad_token_id"] = end
    if hasattr(default, "kv_lora_rank"):  # each head has keys of its own
        values["num_key_value_heads"] = SIZES["num_attention_heads"]
    if getattr(default, "rope_parameters", None):
        values["rope_parameters"] = unscaled(default.rope_parameters)
    settable = {
        names.get(name, name): value
        for name, value in values.items()
        if hasattr(default, name)
        and not isinstance(getattr(config_class, name, None), property)
    }
    return config_class(**settable)


def unscaled(rope_parameters: dict[str, Any]) -> dict[str, Any]:
    """Of a rotary embedding, or of one for each kind of layer: for short texts."""
    if all(isinstance(value, dict) for value in rope_parameters.values()):
        return {kind: unscaled(value) for kind, value in rope_parameters.items()}
    return {
        "rope_type": "default",
        "rope_theta": rope_parameters.get("rope_theta", 10_000.0),
    }


def steps_in(seconds: float, model: nn.Module, corpus: language_model.Corpus) -> int:
    """How many training steps of a model take that long."""
    batch = language_model.windows(corpus.train, torch.arange(language_model.BATCH))
    for _ in range(2):  # the first time is longer
        begin = time.perf_counter()
        language_model.loss_of(model, batch).backward()
    return max(2, int(seconds / (time.perf_counter() - begin)))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("model_class", nargs="?", default="Qwen3ForCausalLM")
    parser.add_argument("--seconds", type=float, default=60)
    parser.add_argument("--out", type=Path, default=Path("build/adopt"))
    args = parser.parse_args()
    kind = getattr(transformers, args.model_class, None)
    if kind not in transformers.MODEL_FOR_CAUSAL_LM_MAPPING.values():
        parser.error(
            f"{args.model_class} is no class of transformers for causal language "
            "models, such as Qwen3ForCausalLM."
        )

    torch.manual_seed(0)
    tokenizer, corpus = language_model.load()
    config = small_config(kind, tokenizer.eos_token_id)
    # One process, but sums over the input features as the engine's two workers do.
    context = ParallelContext(tp_reduction_shards=TENSOR_PARALLEL_SIZE)
    with training.batch_invariant():  # what cannot be computed in the mode raises
        model = training.adopt(kind(config), parallel_context=context)
    print(model.adoption)
    steps = steps_in(args.seconds, model, corpus)
    _, report = language_model.train(model, corpus, steps)
    print(f"held-out loss {report['loss_held_out']:.3f} nats per token")
    model_dir = args.out / args.model_class
    model.save_pretrained(model_dir)
    tokenizer.save_pretrained(model_dir)

    from vllm import LLM, SamplingParams

    os.environ["VLLM_BATCH_INVARIANT"] = "1"
    llm = LLM(
        model=str(model_dir),
        model_class_overrides={
            args.model_class: "vllm.model_executor.models.builder.adopt:causal_lm"
        },
        tensor_parallel_size=TENSOR_PARALLEL_SIZE,
        dtype="float32",
        enforce_eager=True,
        max_model_len=512,
        disable_log_stats=True,
    )
    sampling = SamplingParams(max_tokens=MAX_TOKENS, temperature=0.8, seed=0)
    for output in llm.generate(PROMPTS[:2], sampling, use_tqdm=False):
        print(f"--- {output.prompt!r}\n{output.prompt}{output.outputs[0].text}")
    prompts = [tokenizer.encode(prompt) for prompt in PROMPTS]
    parity = training.parity.check(llm, model, prompts, max_tokens=MAX_TOKENS)
    print(f"\n{parity}")
    if not parity.all_equal:
        sys.exit("trainer and engine differ")


if __name__ == "__main__":
    main()
