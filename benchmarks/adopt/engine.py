# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""An adopted transformers model in the engine against vLLM's own class.

Both have random weights of one config and serve the same requests, outside
batch-invariant mode or in it. On CUDA the shape is that of an 8B model in bf16, on CPU
about the demo's in fp32. Writes `adopted_engine.json`.

    python benchmarks/adopt/engine.py [--mode] [--model Llama Qwen3] [--rounds 4]
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path
from statistics import median

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "common"))

import torch
import transformers
from generic_model import DEMO, SIZES_OF_8B
from measure import name_of
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

ON_CUDA = torch.cuda.is_available()
DTYPE = torch.bfloat16 if ON_CUDA else torch.float32
SIZES = (
    SIZES_OF_8B
    if ON_CUDA
    else DEMO | dict(intermediate_size=768, max_position_embeddings=4096)
)
LOADS = (
    [Load(1, 128, 256), Load(16, 256, 128), Load(256, 256, 128)]
    if ON_CUDA
    else [Load(1, 128, 64), Load(16, 128, 32)]
)
REPETITIONS = 3
MEMORY = half_a_gpu(kv_cache=24) if ON_CUDA else {}
# Of vLLM's speed, outside the mode and in it.
TARGETS = {False: 0.97, True: 0.95}


def serve(directory: str, adopted: bool) -> None:
    """Answer loads with the model of a directory."""
    from vllm import LLM, ModelRegistry, training

    config = transformers.AutoConfig.from_pretrained(directory)
    if adopted:
        ModelRegistry.register_model(
            config.architectures[0],
            lambda config: training.adopt(
                transformers.AutoModelForCausalLM.from_config(config)
            ),
        )
    llm = LLM(
        directory,
        load_format="dummy",
        skip_tokenizer_init=True,
        dtype=name_of(DTYPE),
        max_model_len=2048,
        enable_prefix_caching=False,
        compilation_config=graphs_of(LOADS),
        **MEMORY,
    )
    answer_loads(llm, SIZES["vocab_size"])


def main() -> None:
    """Measure, print and write."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--model", nargs="+", default=["Llama", "Qwen3"])
    parser.add_argument("--mode", action="store_true", help="batch-invariant mode")
    parser.add_argument("--rounds", type=int, default=4, help="starts of each engine")
    parser.add_argument("--out", type=Path, default=Path("build/bench"))
    parser.add_argument("--serve", metavar="DIR", help=argparse.SUPPRESS)
    parser.add_argument("--adopted", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.serve:
        serve(args.serve, args.adopted)
        return
    environment = (("VLLM_BATCH_INVARIANT", str(int(args.mode))),)
    rows = []
    for model in args.model:
        with tempfile.TemporaryDirectory() as directory:
            config = getattr(transformers, f"{model}Config")(
                **SIZES, architectures=[f"{model}ForCausalLM"]
            )
            config.save_pretrained(directory)
            serving = ("--serve", directory)
            engines = [
                Command((*serving, "--adopted"), environment),
                Command(serving, environment),
            ]
            rates = compare(engines, LOADS, REPETITIONS, False, args.rounds)
        rows += [row(model, args.mode, *of_load) for of_load in zip(LOADS, *rates)]
    write_record(
        args.out / "adopted_engine.json",
        torch.device("cuda" if ON_CUDA else "cpu"),
        sizes=SIZES,
        batch_invariant=args.mode,
        results=rows,
    )


def row(
    model: str, mode: bool, load: Load, adopted: list[float], vllms: list[float]
) -> dict[str, object]:
    """One measurement, in tokens per second."""
    ratio = Ratio.of(adopted, vllms)
    target = TARGETS[mode]
    verdict = "met" if ratio.median >= target else "missed"
    where = "in the mode" if mode else "outside the mode"
    print(
        f"{model} {where}, {load}: vLLM's {median(vllms):.4g}, adopted "
        f"{median(adopted):.4g} tokens/s, {ratio.median:.3f} of the speed (target "
        f"{target}, {verdict})",
        flush=True,
    )
    return {
        "group": "An adopted model in the engine",
        "case": f"{model} {where}, {load}",
        "unit": "tokens/s",
        "ours": median(adopted),
        "peers": {"vLLM's class": median(vllms)},
        "ratios": {"vLLM's class": ratio.median},
        "target": {"vLLM's class": target},
        "rounds": {"vLLM's class": ratio.rounds},
    }


if __name__ == "__main__":
    main()
