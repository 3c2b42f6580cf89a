# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""Where an engine's time goes: a model of `price.py` under torch's profiler.

Prints the wall time of the prefill and of a decode step, and the first rank's kernels
by their time on the GPU (on CPU the ops), for the mode that VLLM_BATCH_INVARIANT says,
or of vLLM's Llama of the same shape:

    VLLM_BATCH_INVARIANT=1 python benchmarks/parity/engine_kernels.py --requests 1 256
    python benchmarks/parity/engine_kernels.py --llama --requests 16 --tp-size 2
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import tempfile
from pathlib import Path
from typing import Any

# One rank runs in this process; workers get functions to run.
os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
os.environ["VLLM_ALLOW_INSECURE_SERIALIZATION"] = "1"
sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "common"))

from generic_model import make_engine
from price import DTYPE, MODELS, ON_CUDA
from served import Load, graphs_of, seconds_of
from torch.profiler import ProfilerActivity, profile
from transformers import LlamaConfig

ACTIVITY = ProfilerActivity.CUDA if ON_CUDA else ProfilerActivity.CPU
LINES = 25
REPETITIONS = 5


def main() -> None:
    """Start one engine and profile each load."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    names = list(MODELS)
    parser.add_argument("--model", choices=names, default=names[0])
    parser.add_argument("--requests", type=int, nargs="+", default=[1, 16, 256])
    parser.add_argument("--prompt", type=int, default=256, help="tokens of each")
    parser.add_argument("--new", type=int, default=64, help="tokens of each")
    parser.add_argument("--tp-size", type=int, default=1)
    parser.add_argument("--llama", action="store_true", help="vLLM's own model")
    args = parser.parse_args()
    model = MODELS[args.model]
    config = model.config
    if args.llama:
        fields = config.to_dict() | {"architectures": ["LlamaForCausalLM"]}
        config = LlamaConfig.from_dict(fields)
    with tempfile.TemporaryDirectory() as directory:
        config.save_pretrained(directory)
        loads = [Load(requests, args.prompt, args.new) for requests in args.requests]
        llm = make_engine(
            directory,
            DTYPE,
            tensor_parallel_size=args.tp_size,
            compilation_config=graphs_of(loads),
            **model.engine_options,
        )
    for whole in loads:
        prefill = whole._replace(new=1)

        def seconds(load: Load) -> float:
            return seconds_of(llm, load, config.vocab_size)

        for load in (whole, whole, prefill):
            seconds(load)
        times = [(seconds(prefill), seconds(whole)) for _ in range(REPETITIONS)]
        first = statistics.median(begun for begun, _ in times) * 1e3
        rest = statistics.median(done - begun for begun, done in times) * 1e3
        step = rest / (whole.new - 1)
        print(f"{whole}: prefill {first:.2f} ms, a decode step {step:.3f} ms")
        for load in (prefill, whole):
            llm.collective_rpc(begin)
            seconds(load)
            rows, *_ = llm.collective_rpc(end)
            print_kernels(load, rows)


def begin(worker: Any) -> None:
    """Profile what a worker does from now on."""
    worker.profiled = profile(activities=[ACTIVITY])
    worker.profiled.start()


def end(worker: Any) -> list[tuple[float, int, str]]:
    """Milliseconds, launches and name of each kernel since `begin`."""
    worker.profiled.stop()
    time = "self_device_time_total" if ON_CUDA else "self_cpu_time_total"
    return [
        (getattr(event, time) / 1e3, event.count, event.key)
        for event in worker.profiled.key_averages()
    ]


def print_kernels(load: Load, rows: list[tuple[float, int, str]]) -> None:
    """The total and the largest."""
    print(f"{load}: {sum(milliseconds for milliseconds, *_ in rows):.2f} ms")
    for milliseconds, launches, name in sorted(rows, reverse=True)[:LINES]:
        print(f"{milliseconds:10.2f} {launches:7d} {name[:100]}")


if __name__ == "__main__":
    main()
