# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""What batch-invariant mode costs: engine and trainer with it and without.

Engines, each in a process of its own that started with or without
VLLM_BATCH_INVARIANT, serve the same requests; the trainer runs forward and
backward of the same batch in turns in one process. On CUDA the model has 1.7 B
parameters and bf16, on CPU it is the demo's in fp32.

    python benchmarks/parity/price.py [--out build/bench] [--only engine trainer]
"""

from __future__ import annotations

import argparse
import contextlib
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "common"))

import torch
from generic_model import DEMO, count_parameters, loss_of, make_engine
from measure import medians
from record import write_record
from served import Command, Load, answer_loads, compare, graphs_of

from vllm.model_executor.models.generic_transformer import (
    GenericTransformerConfig,
    GenericTransformerForCausalLM,
)

ON_CUDA = torch.cuda.is_available()
DTYPE = torch.bfloat16 if ON_CUDA else torch.float32
CONFIG = GenericTransformerConfig(
    max_position_embeddings=4096,
    **(
        dict(
            vocab_size=151936,
            hidden_size=2048,
            intermediate_size=6144,
            num_hidden_layers=28,
            num_attention_heads=16,
            num_key_value_heads=8,
        )
        if ON_CUDA
        else DEMO
    ),
)
LOADS = (
    [Load(1, 128, 256), Load(16, 256, 256), Load(256, 256, 256)]
    if ON_CUDA
    else [Load(1, 128, 128), Load(16, 128, 64), Load(64, 128, 32)]
)
TARGETS = (
    {"engine": 0.97, "trainer": 0.98}
    if ON_CUDA
    else {
        "engine": 0.75,
        "trainer": 0.9,
    }
)
# Of one of two engines on one GPU.
MEMORY = (
    {"kv_cache_memory_bytes": 18 << 30, "gpu_memory_utilization": 0.4}
    if ON_CUDA
    else {}
)
# Of each load in each mode.
REPETITIONS = 5
# Sequences and tokens of each.
BATCH = (4, 4096) if ON_CUDA else (8, 256)


def engine() -> list[dict[str, object]]:
    """Rows of the engine: tokens per second in the two modes."""
    rows = []
    with tempfile.TemporaryDirectory() as directory:
        CONFIG.save_pretrained(directory)
        engines = [
            Command(("--serve", directory), (("VLLM_BATCH_INVARIANT", mode),))
            for mode in ("0", "1")
        ]
        rates = compare(engines, LOADS, REPETITIONS, at_once=ON_CUDA)
    for load, normal, invariant in zip(LOADS, *rates):
        ratio = invariant / normal
        rows.append(row(f"engine, {load}", "tokens/s", normal, invariant, ratio))
    return rows


def trainer() -> list[dict[str, object]]:
    """One row: milliseconds of forward and backward in the two modes."""
    from vllm.training import batch_invariant

    device = torch.device("cuda" if ON_CUDA else "cpu")
    torch.manual_seed(0)
    with device:
        model = GenericTransformerForCausalLM(CONFIG).to(DTYPE)
    batch, seq = BATCH
    ids = torch.randint(CONFIG.vocab_size, (batch, seq + 1), device=device)

    def step(mode: contextlib.AbstractContextManager[None]) -> None:
        with mode:
            loss_of(model, ids).backward()
        model.zero_grad()

    times = medians(
        {
            "normal": lambda: step(contextlib.nullcontext()),
            "invariant": lambda: step(batch_invariant()),
        },
        device,
        seconds=15.0,
    )
    normal, invariant = times["normal"], times["invariant"]
    case = f"trainer, forward and backward of {batch}×{seq} tokens"
    return [row(case, "ms", normal, invariant, normal / invariant)]


def row(
    case: str, unit: str, normal: float, invariant: float, speed: float
) -> dict[str, object]:
    """One measurement; `speed` is that of the mode over the normal one's."""
    target = TARGETS[case.partition(",")[0]]
    verdict = "met" if speed >= target else "missed"
    print(
        f"{case}: {normal:.4g} -> {invariant:.4g} {unit}, {speed:.3f} of the speed "
        f"(target {target}, {verdict})",
        flush=True,
    )
    return {
        "case": case,
        "unit": unit,
        "normal": normal,
        "batch_invariant": invariant,
        "speed": speed,
        "target": target,
    }


def main() -> None:
    """Measure, print and write `price.json`."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--out", type=Path, default=Path("build/bench"))
    parser.add_argument("--only", nargs="+", choices=TARGETS, default=list(TARGETS))
    parser.add_argument("--serve", metavar="DIR", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.serve:
        options = {"compilation_config": graphs_of(LOADS)} if ON_CUDA else {}
        llm = make_engine(args.serve, DTYPE, **options, **MEMORY)
        answer_loads(llm, CONFIG.vocab_size)
        return
    measures = {"engine": engine, "trainer": trainer}
    rows = [row for name in args.only for row in measures[name]()]
    write_record(
        args.out / "price.json",
        torch.device("cuda" if ON_CUDA else "cpu"),
        parameters=count_parameters(CONFIG),
        rows=rows,
    )


if __name__ == "__main__":
    main()
