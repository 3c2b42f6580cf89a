# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""A training step of tensor-parallel ranks against one rank's, in turns.

For the one rank's step each process trains a whole model of its own. Writes
`tensor_parallel_step.json`.

    torchrun --nproc-per-node 2 benchmarks/parallel/training_step.py [--out build/bench]
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "common"))

import torch
import torch.distributed as dist
from generic_model import DEMO, WIDTH_OF_8B, count_parameters, loss_of, optimizer_step
from measure import medians, name_of
from record import write_record

from vllm import training
from vllm.model_executor.models.generic_transformer import (
    GenericTransformerConfig,
    GenericTransformerForCausalLM,
)
from vllm.model_executor.parallel_context import ParallelContext

ON_CUDA = torch.cuda.is_available()
DTYPE = torch.bfloat16 if ON_CUDA else torch.float32
# On CUDA eight layers of the width of an 8B model; on CPU the demo's.
CONFIG = GenericTransformerConfig(
    **(
        WIDTH_OF_8B | dict(vocab_size=32000, num_hidden_layers=8)
        if ON_CUDA
        else DEMO | dict(max_position_embeddings=256)
    )
)
# Sequences and tokens of each.
BATCH = (4, 4096) if ON_CUDA else (8, 256)
# How many times as fast two ranks have to be as one.
TARGET = 1.6
ROUNDS = 15


def step(context: ParallelContext) -> Callable[[], None]:
    """Forward, backward and fused AdamW of a model of this context."""
    torch.manual_seed(0)
    with context.device:
        model = GenericTransformerForCausalLM(CONFIG, context).to(DTYPE)
    batch, seq = BATCH
    ids = torch.randint(CONFIG.vocab_size, (batch, seq + 1)).to(context.device)
    return optimizer_step(model, lambda: loss_of(model, ids))


def main() -> None:
    """Measure, print and write on the first rank."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--out", type=Path, default=Path("build/bench"))
    args = parser.parse_args()
    context = training.initialize_parallel(int(os.environ["WORLD_SIZE"]))
    one = ParallelContext.single(context.device)
    steps = {"one": step(one), "all": step(context)}
    times = medians(
        steps, context.device, seconds=0.0, least=ROUNDS, before=dist.barrier
    )
    if context.rank == 0:
        report(context, times, args.out)
    training.destroy_parallel()


def report(context: ParallelContext, times: dict[str, float], out: Path) -> None:
    parameters = count_parameters(CONFIG)
    ratio = times["one"] / times["all"]
    batch, seq = BATCH
    print(
        f"step of {parameters / 1e9:.2f}B parameters, {batch}×{seq} tokens in "
        f"{name_of(DTYPE)}: TP=1 {times['one']:.1f} ms, TP={context.tp_size} "
        f"{times['all']:.1f} ms, {ratio:.2f} times as fast (target for two GPUs "
        f"{TARGET})"
    )
    result = {
        "case": f"{batch}×{seq} tokens, TP={context.tp_size}",
        "unit": "ms",
        "ours": times["all"],
        "peers": {"one rank": times["one"]},
        "ratios": {"one rank": ratio},
        "target": {"one rank": TARGET},
    }
    path = out / "tensor_parallel_step.json"
    write_record(path, context.device, parameters=parameters, results=[result])


if __name__ == "__main__":
    main()
