# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""Where an engine's time goes: the model of `price.py` under torch's profiler.

Prints the wall time of a decode step and the kernels by their time on the GPU (on CPU
the ops), for the mode that VLLM_BATCH_INVARIANT says, or of vLLM's own Llama of the
same shape:

    VLLM_BATCH_INVARIANT=1 python benchmarks/parity/engine_kernels.py --requests 1 256
    python benchmarks/parity/engine_kernels.py --llama --requests 16
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import tempfile
from pathlib import Path

# The profiler sees this process only.
os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "common"))

from generic_model import make_engine
from price import CONFIG, DTYPE, MEMORY, ON_CUDA
from served import Load, seconds_of
from torch.profiler import ProfilerActivity, profile
from transformers import LlamaConfig

ACTIVITY = ProfilerActivity.CUDA if ON_CUDA else ProfilerActivity.CPU
LINES = 25
REPETITIONS = 5


def main() -> None:
    """Start one engine and profile each load."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--requests", type=int, nargs="+", default=[1, 16, 256])
    parser.add_argument("--prompt", type=int, default=256, help="tokens of each")
    parser.add_argument("--new", type=int, default=64, help="tokens of each")
    parser.add_argument("--llama", action="store_true", help="vLLM's own model")
    args = parser.parse_args()
    config = CONFIG
    if args.llama:
        fields = CONFIG.to_dict() | {"architectures": ["LlamaForCausalLM"]}
        config = LlamaConfig.from_dict(fields)
    with tempfile.TemporaryDirectory() as directory:
        config.save_pretrained(directory)
        llm = make_engine(directory, DTYPE, **MEMORY)
    for requests in args.requests:
        whole = Load(requests, args.prompt, args.new)
        prefill = whole._replace(new=1)

        def seconds(load: Load) -> float:
            return seconds_of(llm, load, CONFIG.vocab_size)

        for load in (whole, whole, prefill):
            seconds(load)
        steps = [seconds(whole) - seconds(prefill) for _ in range(REPETITIONS)]
        milliseconds = statistics.median(steps) / (whole.new - 1) * 1e3
        print(f"{whole}: a decode step takes {milliseconds:.3f} ms")
        for load in (prefill, whole):
            with profile(activities=[ACTIVITY]) as profiled:
                seconds(load)
            print_kernels(load, profiled)


def print_kernels(load: Load, profiled: profile) -> None:
    """The total and the largest, in milliseconds, with the number of launches."""
    name = "self_device_time_total" if ON_CUDA else "self_cpu_time_total"
    rows = [(getattr(event, name) / 1e3, event) for event in profiled.key_averages()]
    rows.sort(key=lambda row: -row[0])
    print(f"{load}: {sum(time for time, _ in rows):.2f} ms")
    for milliseconds, event in rows[:LINES]:
        print(f"{milliseconds:10.2f} {event.count:7d} {event.key[:100]}")


if __name__ == "__main__":
    main()
