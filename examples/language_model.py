# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""Text, a tokenizer and a training loop for the examples that train language models.

The text is the sources of Python's standard library.
"""

import os
import sysconfig
import time
from dataclasses import dataclass
from pathlib import Path

# The engine's two CPU workers get one core each.
os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "0|1")
os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import nn
from tqdm import tqdm
from transformers import PreTrainedTokenizerFast

from vllm import training

END = "<|endoftext|>"
VOCAB_SIZE, SEQ_LEN, BATCH = 4096, 256, 8


@dataclass
class Corpus:
    """Token ids of the training and of the held-out files, each shape = [n]."""

    train: torch.Tensor
    held_out: torch.Tensor


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


def load() -> tuple[PreTrainedTokenizerFast, Corpus]:
    """A tokenizer of the text, and the text as its tokens."""
    texts = standard_library()
    print(f"{len(texts)} files, {sum(map(len, texts)) / 1e6:.1f} M characters")
    tokenizer = train_tokenizer(texts[1::4])
    corpus = encode(tokenizer, texts)
    print(f"{len(corpus.train)} training and {len(corpus.held_out)} held-out tokens")
    return tokenizer, corpus


def windows(ids: torch.Tensor, starts: torch.Tensor) -> torch.Tensor:
    """Windows of inputs and next tokens, shape = [len(starts), SEQ_LEN + 1]."""
    return ids[starts[:, None] + torch.arange(SEQ_LEN + 1)]


def loss_of(model: nn.Module, batch: torch.Tensor) -> torch.Tensor:
    """Mean negative logprob of the next token, in nats."""
    return -training.token_logprobs(model, batch[:, :-1], batch[:, 1:]).mean()


@torch.no_grad()
def held_out_loss(model: nn.Module, corpus: Corpus) -> float:
    """Loss on 64 windows spread over the held-out files."""
    last = len(corpus.held_out) - SEQ_LEN - 1
    starts = torch.linspace(0, last, 64).long()
    losses = [loss_of(model, windows(corpus.held_out, s)) for s in starts.split(16)]
    return torch.stack(losses).mean().item()


def train(
    model: nn.Module, corpus: Corpus, steps: int
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
