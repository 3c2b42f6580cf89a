# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""What batch-invariant mode costs: engine and trainer with it and without.

Engines, each in a process of its own that started with or without
VLLM_BATCH_INVARIANT, serve the same requests; the trainer runs forward and
backward of the same batch in turns in one process. On CUDA the models are in bf16: one
of 1.7B parameters, whose steps may end before the host has prepared the next, and for
the engine one of 8B. On CPU it is the demo's in fp32.

    python benchmarks/parity/price.py [--out build/bench] [--only engine trainer]
    python benchmarks/parity/price.py --model 8B --only engine
"""

from __future__ import annotations

import argparse
import contextlib
import sys
import tempfile
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "common"))

import torch
from generic_model import DEMO, SIZES_OF_8B, count_parameters, loss_of, make_engine
from measure import medians
from record import write_record
from served import (
    Command,
    Load,
    Ratio,
    answer_loads,
    compare,
    graphs_of,
    half_a_gpu,
)

from vllm.model_executor.models.generic_transformer import (
    GenericTransformerConfig,
    GenericTransformerForCausalLM,
)

ON_CUDA = torch.cuda.is_available()
DTYPE = torch.bfloat16 if ON_CUDA else torch.float32


class Model(NamedTuple):
    """What is served and trained.

    Attributes:
        sizes: fields of its config.
        loads: for the engine.
        kv_cache: of an engine, GiB; two share a GPU.
    """

    sizes: dict[str, int]
    loads: list[Load]
    kv_cache: int | None = None

    @property
    def config(self) -> GenericTransformerConfig:
        return GenericTransformerConfig(**self.sizes)

    @property
    def engine_options(self) -> dict[str, Any]:
        return {} if self.kv_cache is None else half_a_gpu(self.kv_cache)


MODELS = (
    {
        "1.7B": Model(
            dict(
                vocab_size=151936,
                hidden_size=2048,
                intermediate_size=6144,
                num_hidden_layers=28,
                num_attention_heads=16,
                num_key_value_heads=8,
                max_position_embeddings=4096,
            ),
            [Load(1, 128, 256), Load(16, 256, 256), Load(256, 256, 256)],
            kv_cache=18,
        ),
        "8B": Model(
            SIZES_OF_8B,
            [Load(1, 128, 128), Load(16, 256, 128), Load(256, 256, 128)],
            kv_cache=13,
        ),
    }
    if ON_CUDA
    else {
        "demo": Model(
            DEMO | dict(max_position_embeddings=4096),
            [Load(1, 128, 128), Load(16, 128, 64), Load(64, 128, 32)],
        )
    }
)
TARGETS = (
    {"engine": 0.97, "trainer": 0.98}
    if ON_CUDA
    else {
        "engine": 0.75,
        "trainer": 0.9,
    }
)
# Of each load in each mode and round.
REPETITIONS = 3
# Sequences and tokens of each.
BATCH = (4, 4096) if ON_CUDA else (8, 256)


def engine(name: str) -> list[dict[str, object]]:
    """Rows of the engine: tokens per second in the two modes."""
    rows, loads = [], MODELS[name].loads
    with tempfile.TemporaryDirectory() as directory:
        MODELS[name].config.save_pretrained(directory)
        arguments = ("--model", name, "--serve", directory)
        engines = [
            Command(arguments, (("VLLM_BATCH_INVARIANT", mode),)) for mode in ("0", "1")
        ]
        rates = compare(engines, loads, REPETITIONS, poll=False)
    for load, normal, mode in zip(loads, *rates):
        ratio = Ratio.of(mode, normal)
        speeds = median(normal), median(mode), ratio.median
        found = row(f"engine, {load}", "tokens/s", *speeds)
        rows.append(found | {"rounds": {"normal mode": ratio.rounds}})
    return rows


def serve(name: str, directory: str) -> None:
    """Answer loads with the model of a directory."""
    model = MODELS[name]
    options = {"compilation_config": graphs_of(model.loads)} if ON_CUDA else {}
    llm = make_engine(directory, DTYPE, **options, **model.engine_options)
    answer_loads(llm, model.config.vocab_size)


def trainer(name: str) -> list[dict[str, object]]:
    """One row: milliseconds of forward and backward in the two modes."""
    from vllm.training import batch_invariant

    device = torch.device("cuda" if ON_CUDA else "cpu")
    torch.manual_seed(0)
    config = MODELS[name].config
    with device:
        model = GenericTransformerForCausalLM(config).to(DTYPE)
    batch, seq = BATCH
    ids = torch.randint(config.vocab_size, (batch, seq + 1), device=device)

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
        "ours": invariant,
        "peers": {"normal mode": normal},
        "ratios": {"normal mode": speed},
        "target": {"normal mode": target},
    }


def main() -> None:
    """Measure, print and write `price_MODEL.json`."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--out", type=Path, default=Path("build/bench"))
    names = list(MODELS)
    parser.add_argument("--model", choices=names, default=names[0])
    parser.add_argument("--only", nargs="+", choices=TARGETS, default=list(TARGETS))
    parser.add_argument("--serve", metavar="DIR", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.serve:
        serve(args.model, args.serve)
        return
    measures = {"engine": engine, "trainer": trainer}
    rows = [row for name in args.only for row in measures[name](args.model)]
    write_record(
        args.out / f"price_{args.model}.json",
        torch.device("cuda" if ON_CUDA else "cpu"),
        model=args.model,
        parameters=count_parameters(MODELS[args.model].config),
        results=rows,
    )


if __name__ == "__main__":
    main()
