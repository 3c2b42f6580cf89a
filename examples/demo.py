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
import sysconfig
import time
from dataclasses import dataclass
from pathlib import Path

# The engine's two CPU workers get one core each.
os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "0|1")
os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import matplotlib
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from tqdm import tqdm
from transformers import PreTrainedTokenizerFast

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

END = "<|endoftext|>"
VOCAB_SIZE, SEQ_LEN, BATCH = 4096, 256, 8
PROMPTS = ["def ", "import os\n", "class ", "    return ", "for i in range("] * 4
MAX_TOKENS = 64
TENSOR_PARALLEL_SIZE = 2


@dataclass
class Corpus:
    """Token ids of the training and of the held-out files, each shape = [n]."""

    train: torch.Tensor
    held_out: torch.Tensor


@dataclass
class Scores:
    """Logprobs of the sampled tokens by engine and trainer, each shape = [n]."""

    engine: torch.Tensor
    trainer: torch.Tensor


def standard_library() -> list[str]:
    """The standard library's own sources, without its tests."""
    root = Path(sysconfig.get_paths()["stdlib"])
    skipped = {"test", "tests", "site-packages", "idlelib", "lib2to3", "encodings"}
    files = [p for p in sorted(root.rglob("*.py")) if not skipped & set(p.parts)]
    return [path.read_text(encoding="utf-8", errors="ignore") for path in files]


def train_tokenizer(texts: list[str]) -> PreTrainedTokenizerFast:
    """A byte-level byte-pair tokenizer of `VOCAB_SIZE` tokens."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE,
        special_tokens=[END],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=END)


def encode(tokenizer: PreTrainedTokenizerFast, texts: list[str]) -> Corpus:
    """Every 20th file is held out, from the tokenizer too."""
    encodings = tokenizer.backend_tokenizer.encode_batch(texts)
    end = tokenizer.eos_token_id
    parts: tuple[list[int], list[int]] = ([], [])
    for number, encoding in enumerate(encodings):
        parts[number % 20 == 0].extend([*encoding.ids, end])
    return Corpus(torch.tensor(parts[0]), torch.tensor(parts[1]))


def windows(ids: torch.Tensor, starts: torch.Tensor) -> torch.Tensor:
    """Windows of inputs and next tokens, shape = [len(starts), SEQ_LEN + 1]."""
    return ids[starts[:, None] + torch.arange(SEQ_LEN + 1)]


def loss_of(model: GenericTransformerForCausalLM, batch: torch.Tensor) -> torch.Tensor:
    """Mean negative logprob of the next token, in nats."""
    hidden_states = model.model(batch[:, :-1])
    return -token_logprobs(hidden_states, model.lm_head, batch[:, 1:]).mean()


@torch.no_grad()
def held_out_loss(model: GenericTransformerForCausalLM, corpus: Corpus) -> float:
    """Loss on 64 windows spread over the held-out files."""
    last = len(corpus.held_out) - SEQ_LEN - 1
    starts = torch.linspace(0, last, 64).long()
    losses = [loss_of(model, windows(corpus.held_out, s)) for s in starts.split(16)]
    return torch.stack(losses).mean().item()


def train(
    model: GenericTransformerForCausalLM, corpus: Corpus, steps: int
) -> tuple[list[float], dict[str, float]]:
    """AdamW with a one-cycle schedule; the losses and the report's `train` entry."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, weight_decay=0.1)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, total_steps=steps)
    generator = torch.Generator().manual_seed(0)
    losses: list[float] = []
    begin = time.perf_counter()
    with tqdm(total=steps, desc="train", unit="step") as bar:
        for _ in range(steps):
            last = len(corpus.train) - SEQ_LEN - 1
            starts = torch.randint(last, (BATCH,), generator=generator)
            loss = loss_of(model, windows(corpus.train, starts))
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            losses.append(loss.item())
            speed = len(losses) * BATCH * SEQ_LEN / (time.perf_counter() - begin)
            bar.set_postfix(loss=f"{losses[-1]:.3f}", tokens_per_s=f"{speed:.0f}")
            bar.update()
    report = {
        "steps": steps,
        "loss_first": losses[0],
        "loss_last": losses[-1],
        "loss_held_out": held_out_loss(model, corpus),
        "tokens_per_s": speed,
    }
    return losses, report


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
    texts = standard_library()
    print(f"{len(texts)} files, {sum(map(len, texts)) / 1e6:.1f} M characters")
    tokenizer = train_tokenizer(texts[1::4])
    corpus = encode(tokenizer, texts)
    print(f"{len(corpus.train)} training and {len(corpus.held_out)} held-out tokens")

    config = GenericTransformerConfig(
        vocab_size=VOCAB_SIZE,
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
    losses, train_report = train(model, corpus, args.steps)
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
