# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""Train a model on several ranks, serve it with as many workers, compare the two.

What the examples have in common. The trainer's ranks are started as torchrun would
start them; the engine starts its own workers. What is compared is fp32 on CPU.
"""

import json
import math
import multiprocessing
import os
import socket
import traceback
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

# On CPU the engine's two workers get one core each.
os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "0|1")
os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
from torch import nn

from vllm import training
from vllm.model_executor.checkpoint.load import load_checkpoint
from vllm.model_executor.checkpoint.save import save_checkpoint
from vllm.model_executor.parallel_context import ParallelContext

TP = 2
FIELDS: dict[str, Any] = {
    "architectures": ["MyModel"],
    "vocab_size": 96,
    "hidden_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
}
PROMPTS = [[1, 2, 3], list(range(20, 60)), [7], [90, 91] * 8]
MAX_TOKENS = 12

# A builder of the model: what the engine is given, and the trainer calls.
Builder = Callable[[Any, ParallelContext], nn.Module]


class TrainerRanks:
    """A trainer's processes. `run(f, ...)` calls `f(context, ...)` in each of them."""

    def __init__(self, size: int = TP) -> None:
        if torch.cuda.is_available():
            raise RuntimeError(
                "The examples compare fp32, which vLLM multiplies in TF32 on CUDA. "
                "Run them with vLLM's build for CPU."
            )
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        spawn = multiprocessing.get_context("spawn")
        self.pipes: list[Connection] = []
        self.processes = []
        for rank in range(size):
            ours, theirs = spawn.Pipe()
            process = spawn.Process(
                target=_serve_rank, args=(rank, size, port, theirs), daemon=True
            )
            process.start()
            theirs.close()
            self.pipes.append(ours)
            self.processes.append(process)

    def run(self, function: Callable, *args: Any) -> list[Any]:
        """The results by rank. The first error ends it, and the use of the ranks."""
        for pipe in self.pipes:
            pipe.send((function, args))
        results: dict[int, Any] = {}
        while len(results) < len(self.pipes):
            pending = {p: r for r, p in enumerate(self.pipes) if r not in results}
            for pipe in wait(list(pending)):
                rank = pending[pipe]  # type: ignore[index]
                try:
                    results[rank], error = self.pipes[rank].recv()
                except (EOFError, OSError):
                    error = "its process ended"
                if error:
                    raise RuntimeError(f"Rank {rank} of the trainer failed: {error}")
        return [results[rank] for rank in range(len(self.pipes))]

    def __enter__(self) -> "TrainerRanks":
        return self

    def __exit__(self, *_: object) -> None:
        for process in self.processes:
            process.terminate()
        for process in self.processes:
            process.join()


def _serve_rank(rank: int, size: int, port: int, pipe: Connection) -> None:
    """A rank: sets what torchrun would set, then does what it is told."""
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(size), "LOCAL_RANK": str(rank)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    torch.set_num_threads(1)
    context = training.initialize_parallel(tensor_parallel_size=size)
    while True:
        try:
            function, args = pipe.recv()
        except EOFError:
            return
        try:
            pipe.send((function(context, *args), None))
        except Exception:
            pipe.send((None, traceback.format_exc()))


def positions_of(ids: torch.Tensor) -> torch.Tensor:
    """The positions of `[batch, seq]` ids."""
    return torch.arange(ids.shape[1], device=ids.device).expand_as(ids)


def build_on(context: ParallelContext, build: Builder) -> nn.Module:
    """The model for `FIELDS`; each rank draws its shards of the same numbers."""
    torch.manual_seed(0)
    with context.device:
        return build(SimpleNamespace(**FIELDS), context)


def train(context: ParallelContext, build: Builder, directory: Path) -> float:
    """A few steps of learning to count and a checkpoint; the last loss, in nats."""
    model = build_on(context, build)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    ids = torch.arange(8 * 33, device=context.device).view(8, 33)
    ids = ids % FIELDS["vocab_size"]
    for _ in range(8):
        loss = -model.token_logprobs(ids).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    save_checkpoint(model, directory)  # whole tensors, whatever the number of ranks
    if context.rank == 0:
        (directory / "config.json").write_text(json.dumps(FIELDS))
    return loss.item()


@torch.no_grad()
def score(
    context: ParallelContext,
    build: Builder,
    directory: Path,
    sequences: list[list[int]],
    bitwise: bool,
) -> list[list[float]]:
    """The trainer's logprobs of each sequence's tokens after the first."""
    model = build_on(context, build)
    load_checkpoint(model, directory)
    with training.batch_invariant() if bitwise else nullcontext():
        ids = [torch.tensor([each], device=context.device) for each in sequences]
        return [model.token_logprobs(each)[0].tolist() for each in ids]


@dataclass
class Sample:
    """What the engine sampled for a prompt.

    Attributes:
        ids: token ids, the prompt's and the sampled ones.
        logprobs: of the sampled ones.
    """

    ids: list[int]
    logprobs: list[float]


def sample(directory: Path, build: Builder, **options: Any) -> list[Sample]:
    """Serve the model directory with `TP` workers and sample from it."""
    from vllm import LLM, ModelRegistry, SamplingParams

    ModelRegistry.register_model("MyModel", build)
    defaults = {
        "tensor_parallel_size": TP,
        "dtype": "float32",
        "max_model_len": FIELDS["max_position_embeddings"],
        "enforce_eager": True,
        "skip_tokenizer_init": True,
        "disable_log_stats": True,
    }
    llm = LLM(str(directory), **(defaults | options))
    try:
        outputs = llm.generate(
            [{"prompt_token_ids": ids} for ids in PROMPTS],
            SamplingParams(max_tokens=MAX_TOKENS, logprobs=0, detokenize=False),
            use_tqdm=False,
        )
    finally:
        llm.llm_engine.engine_core.shutdown()
    samples = []
    for output in outputs:
        (completion,) = output.outputs
        tokens = list(completion.token_ids)
        logprobs = [e[t].logprob for t, e in zip(tokens, completion.logprobs)]
        samples.append(Sample([*output.prompt_token_ids, *tokens], logprobs))
    return samples


def tolerance() -> float:
    """How far logprobs may be apart whose fp32 sums were taken in different orders.

    A logit has gone through four products a layer and the head's. Each rounds like a
    random walk over its terms, at most 4 * hidden_size; logits are below 16 in size.
    """
    products = 4 * FIELDS["num_hidden_layers"] + 1
    walk = math.sqrt(4 * FIELDS["hidden_size"])
    return products * walk * torch.finfo(torch.float32).eps * 16


def train_and_serve(
    ranks: TrainerRanks,
    build: Builder,
    directory: Path,
    bitwise: bool = False,
    **options: Any,
) -> None:
    """Train, serve, and compare the logprobs of what the engine sampled.

    Args:
        ranks: the trainer.
        build: the builder that both sides use.
        directory: where the checkpoint goes.
        bitwise: in batch-invariant mode, where the logprobs are equal bit for bit.
        options: of the engine.

    Raises:
        RuntimeError: the logprobs differ.
    """
    losses = ranks.run(train, build, directory)
    print(f"  trained by {TP} ranks, loss {losses[0]:.3f} nats")
    with patch.dict(os.environ, VLLM_BATCH_INVARIANT=str(int(bitwise))):
        samples = sample(directory, build, **options)
    scores = ranks.run(score, build, directory, [s.ids for s in samples], bitwise)
    engine = torch.tensor([x for each in samples for x in each.logprobs])
    for rank, rows in enumerate(scores):
        trainer = torch.tensor([x for row in rows for x in row[-MAX_TOKENS:]])
        difference = (engine - trainer).abs().max().item()
        agree = torch.equal(engine, trainer) if bitwise else difference < tolerance()
        if not agree:
            raise RuntimeError(f"Rank {rank} and engine differ by {difference:.1e}.")
    meaning = "equal bit for bit" if bitwise else f"allowed {tolerance():.1e}"
    print(f"  {len(engine)} tokens sampled by {TP} workers, their logprobs and the")
    print(f"  trainer's: largest difference {difference:.1e} ({meaning})")
