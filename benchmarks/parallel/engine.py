# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""A tensor-parallel engine of the generic transformer against vLLM's own Llama.

Both have the same shape and random weights, and serve the same requests. On
CUDA the shape is that of an 8B model in bf16, on CPU about the demo's in fp32. Writes
`tensor_parallel_engine.json`.

    python benchmarks/parallel/engine.py [--tp-size 2] [--out build/bench]
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path
from statistics import median

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "common"))

import torch
from generic_model import DEMO, SIZES_OF_8B, make_engine
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
from transformers import LlamaConfig

from vllm.model_executor.models.generic_transformer import GenericTransformerConfig

ON_CUDA = torch.cuda.is_available()
DTYPE = torch.bfloat16 if ON_CUDA else torch.float32
SIZES = (
    SIZES_OF_8B
    if ON_CUDA
    else DEMO | dict(intermediate_size=768, max_position_embeddings=4096)
)
CONFIGS = {"ours": GenericTransformerConfig, "vLLM's": LlamaConfig}
LOADS = (
    [Load(1, 128, 256), Load(16, 256, 128), Load(256, 256, 128)]
    if ON_CUDA
    else [Load(1, 128, 64), Load(16, 128, 32)]
)
REPETITIONS = 3
# Of one of two engines on each GPU.
MEMORY = half_a_gpu(kv_cache=12) if ON_CUDA else {}
TARGET = 0.98


def serve(directory: str, tp_size: int) -> None:
    """Answer loads with the model of a directory."""
    llm = make_engine(
        directory,
        DTYPE,
        tensor_parallel_size=tp_size,
        compilation_config=graphs_of(LOADS),
        **MEMORY,
    )
    answer_loads(llm, SIZES["vocab_size"])


def main() -> None:
    """Measure, print and write."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--tp-size", type=int, default=2)
    parser.add_argument("--out", type=Path, default=Path("build/bench"))
    parser.add_argument("--serve", metavar="DIR", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.serve:
        serve(args.serve, args.tp_size)
        return
    with tempfile.TemporaryDirectory() as folder:
        engines = []
        for name, config in CONFIGS.items():
            directory = Path(folder) / name
            architecture = (
                {} if name == "ours" else {"architectures": ["LlamaForCausalLM"]}
            )
            config(**SIZES, **architecture).save_pretrained(directory)
            arguments = ("--serve", str(directory), "--tp-size", str(args.tp_size))
            engines.append(Command(arguments))
        rates = compare(engines, LOADS, REPETITIONS, poll=True)
    rows = [row(*of_load) for of_load in zip(LOADS, *rates)]
    write_record(
        args.out / "tensor_parallel_engine.json",
        torch.device("cuda" if ON_CUDA else "cpu"),
        sizes=SIZES,
        tp_size=args.tp_size,
        results=rows,
    )


def row(
    load: Load, ours_of_rounds: list[float], vllms_of_rounds: list[float]
) -> dict[str, object]:
    """One measurement, in tokens per second."""
    ours, vllms = median(ours_of_rounds), median(vllms_of_rounds)
    ratio = Ratio.of(ours_of_rounds, vllms_of_rounds)
    verdict = "met" if ratio.median >= TARGET else "missed"
    print(
        f"{load}: vLLM's {vllms:.4g}, ours {ours:.4g} tokens/s, {ratio.median:.3f} of "
        f"the speed (target {TARGET}, {verdict})",
        flush=True,
    )
    return {
        "case": str(load),
        "unit": "tokens/s",
        "ours": ours,
        "peers": {"vLLM's Llama": vllms},
        "ratios": {"vLLM's Llama": ratio.median},
        "target": {"vLLM's Llama": TARGET},
        "rounds": {"vLLM's Llama": ratio.rounds},
    }


if __name__ == "__main__":
    main()
