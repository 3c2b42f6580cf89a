# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""Train a language model, serve it with vLLM, and compare their logprobs.

One model definition, `GenericTransformerForCausalLM`, is trained on the sources of
Python's standard library, saved, and served by `LLM(..., tensor_parallel_size=2)`
through a builder that is registered inside `main()`. The trainer then scores the
tokens that the engine sampled: both run in batch-invariant mode, so the logprobs are
equal bit for bit.

    python examples/demo.py         # writes build/demo/report.json and report.png
"""

import argparse
import json
import os
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import language_model
import matplotlib
import torch

from vllm.model_executor.checkpoint.files import whole_file
from vllm.model_executor.layers.training import token_logprobs
from vllm.model_executor.models.generic_transformer import (
    GenericTransformerConfig,
    GenericTransformerForCausalLM,
)
from vllm.model_executor.parallel_context import ParallelContext
from vllm.training import batch_invariant

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402

PROMPTS = ["def ", "import os\n", "class ", "    return ", "for i in range("] * 4
MAX_TOKENS = 64
TENSOR_PARALLEL_SIZE = 2


@dataclass
class Scores:
    """Logprobs of the sampled tokens by engine and trainer, each shape = [n]."""

    engine: torch.Tensor
    trainer: torch.Tensor


def score(
    model: GenericTransformerForCausalLM, sequences: list[tuple[list[int], list[int]]]
) -> torch.Tensor:
    """The trainer's logprobs of the completions, in one packed forward.

    Args:
        model: The trained model.
        sequences: Prompt and completion token ids.

    Returns:
        fp32, shape = [number of completion tokens].
    """
    whole = [prompt + completion for prompt, completion in sequences]
    lengths = torch.tensor([len(ids) for ids in whole])
    cu_seqlens = torch.nn.functional.pad(lengths.cumsum(0), (1, 0)).to(torch.int32)
    ids = torch.tensor([token for ids in whole for token in ids])
    predicting = torch.tensor(
        [
            int(cu_seqlens[i]) + position - 1
            for i, (prompt, completion) in enumerate(sequences)
            for position in range(len(prompt), len(prompt) + len(completion))
        ]
    )
    with torch.no_grad(), batch_invariant():
        hidden_states = model.model(ids, None, cu_seqlens)
        return token_logprobs(
            hidden_states[predicting], model.lm_head, ids[predicting + 1]
        )


def write_report(path: Path, report: dict, losses: list[float], scores: Scores) -> None:
    """`report.json` and `report.png`, each whole or not at all."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 4), constrained_layout=True)
    left.plot(losses)
    left.set(title="training loss", xlabel="step", ylabel="nats per token")
    right.plot([scores.engine.min(), 0], [scores.engine.min(), 0], color="lightgray")
    right.scatter(scores.engine, scores.trainer, s=4)
    right.set(
        title=f"logprob of {len(scores.engine)} sampled tokens",
        xlabel=f"engine, tensor_parallel_size={TENSOR_PARALLEL_SIZE}",
        ylabel="trainer",
    )
    with whole_file(path / "report.png") as part:
        figure.savefig(part, dpi=120)
    with whole_file(path / "report.json") as part:
        part.write_text(json.dumps(report, indent=2) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--out", type=Path, default=Path("build/demo"))
    args = parser.parse_args()
    model_dir = args.out / "model"
    model_dir.mkdir(parents=True, exist_ok=True)

    torch.manual_seed(0)
    tokenizer, corpus = language_model.load()

    config = GenericTransformerConfig(
        vocab_size=language_model.VOCAB_SIZE,
        hidden_size=256,
        num_hidden_layers=4,
        num_attention_heads=8,
        num_key_value_heads=4,
        max_position_embeddings=1024,
        eos_token_id=tokenizer.eos_token_id,
    )
    # One process, but sums over the input features as the engine's two workers do.
    context = ParallelContext(tp_reduction_shards=TENSOR_PARALLEL_SIZE)
    model = GenericTransformerForCausalLM(config, context)
    losses, train_report = language_model.train(model, corpus, args.steps)
    print(f"held-out loss {train_report['loss_held_out']:.3f} nats per token")
    model.save_pretrained(model_dir)
    tokenizer.save_pretrained(model_dir)

    from vllm import LLM, ModelRegistry, SamplingParams

    def build(config, parallel_context):  # vLLM calls this in each of its workers
        return GenericTransformerForCausalLM(config, parallel_context)

    ModelRegistry.register_model("GenericTransformerForCausalLM", build)
    os.environ["VLLM_BATCH_INVARIANT"] = "1"
    llm = LLM(
        model=str(model_dir),
        tensor_parallel_size=TENSOR_PARALLEL_SIZE,
        dtype="float32",
        max_model_len=1024,
        disable_log_stats=True,
    )
    sampling = SamplingParams(
        max_tokens=MAX_TOKENS, temperature=0.8, seed=0, logprobs=0
    )
    begin = time.perf_counter()
    outputs = llm.generate(PROMPTS, sampling)
    seconds = time.perf_counter() - begin
    llm.llm_engine.engine_core.shutdown(timeout=30)

    completions = [output.outputs[0] for output in outputs]
    engine = torch.tensor(
        [
            logprobs[token].logprob
            for completion in completions
            for token, logprobs in zip(completion.token_ids, completion.logprobs)
        ]
    )
    trainer = score(
        model,
        [
            (list(output.prompt_token_ids), list(completion.token_ids))
            for output, completion in zip(outputs, completions)
        ],
    )
    difference = (engine - trainer).abs().max().item()
    equal = int((engine == trainer).sum())
    report = {
        "train": train_report,
        "serve": {
            "tensor_parallel_size": TENSOR_PARALLEL_SIZE,
            "tokens": len(engine),
            "tokens_per_s": len(engine) / seconds,
        },
        "parity": {
            "tokens": len(engine),
            "equal": equal,
            "max_abs_diff": difference,
        },
    }
    write_report(args.out, report, losses, Scores(engine, trainer))
    for output, completion in zip(outputs[:3], completions):
        print(f"--- {output.prompt!r}\n{output.prompt}{completion.text}")
    print("\ntokens   equal bit for bit   max |difference|")
    print(f"{len(engine):6}   {equal:17}   {difference:16.2e}")
    print(f"report in {args.out}/report.json and {args.out}/report.png")
    if equal != len(engine):
        sys.exit("trainer and engine differ")


if __name__ == "__main__":
    main()
