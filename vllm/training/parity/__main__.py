# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""Compare a checkpoint's logprobs in the trainer and in the engine, bit for bit.

    python -m vllm.training.parity MODEL_DIR --builder my_package.model:build

Prints a table and writes report.json and histogram.png. The exit status is 1 if a
logprob differs.
"""

import argparse
import importlib
import json
import os
import sys
from operator import attrgetter
from pathlib import Path
from typing import Any

import matplotlib
import torch
from torch import nn

from vllm import LLM, ModelRegistry
from vllm.model_executor import vllm_internals
from vllm.model_executor.checkpoint.files import whole_file
from vllm.model_executor.checkpoint.load import load_checkpoint
from vllm.model_executor.layers.training.base import skip_init
from vllm.model_executor.models.builder.spec import BuilderSpec
from vllm.model_executor.parallel_context import ParallelContext
from vllm.training.parity import ParityReport, check, self_check

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402

# The trainer needs the rest of the device.
GPU_MEMORY_UTILIZATION = 0.5


def lengths(text: str) -> list[int]:
    """Positive numbers between commas."""
    numbers = [int(part) for part in text.split(",")]
    if min(numbers) < 1:
        raise argparse.ArgumentTypeError(f"{text}: lengths must be at least 1")
    return numbers


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m vllm.training.parity",
        description=(__doc__ or "").partition("\n")[0],
    )
    parser.add_argument("model_dir", type=Path, help="config.json and *.safetensors")
    parser.add_argument(
        "--builder", required=True, help="of trainer and engine, as module:qualname"
    )
    parser.add_argument("--dtype", default="auto", help="default: the checkpoint's")
    parser.add_argument("--prompts", type=int, default=8, help="how many")
    parser.add_argument(
        "--prompt-lengths",
        type=lengths,
        default=[3, 17, 64, 129],
        help="tokens of the prompts in turn, between commas (3,17,64,129)",
    )
    parser.add_argument("--max-tokens", type=int, default=16, help="sampled a prompt")
    parser.add_argument("--tensor-parallel-size", type=int, default=1)
    parser.add_argument(
        "--full-vocab", action="store_true", help="compare the whole vocabulary"
    )
    parser.add_argument("--out", type=Path, default=Path("parity"), metavar="DIR")
    return parser.parse_args()


def start_engine(args: argparse.Namespace) -> LLM:
    """The engine, in batch-invariant mode."""
    # Read when the engine starts, by its workers too.
    os.environ["VLLM_BATCH_INVARIANT"] = "1"
    fields = json.loads((args.model_dir / "config.json").read_text())
    for arch in fields["architectures"]:
        ModelRegistry.register_model(arch, args.builder)
    options: dict[str, Any] = {"max_logprobs": -1} if args.full_vocab else {}
    if vllm_internals.current_platform.is_cuda():
        options["gpu_memory_utilization"] = GPU_MEMORY_UTILIZATION
    return LLM(
        str(args.model_dir),
        dtype=args.dtype,
        tensor_parallel_size=args.tensor_parallel_size,
        max_model_len=max(args.prompt_lengths) + args.max_tokens,
        skip_tokenizer_init=True,
        disable_log_stats=True,
        **options,
    )


def build_trainer(args: argparse.Namespace, llm: LLM) -> nn.Module:
    """The builder's module in this process, with the checkpoint's weights."""
    module, _, name = args.builder.partition(":")
    spec = BuilderSpec.of(attrgetter(name)(importlib.import_module(module)))
    config = llm.llm_engine.vllm_config
    device = torch.device(vllm_internals.current_platform.device_type)
    available = {
        "vllm_config": config,
        "config": config.model_config.hf_config,
        "parallel_context": ParallelContext(
            device=device, tp_reduction_shards=args.tensor_parallel_size
        ),
        "prefix": "",
    }
    before, dtype = torch.get_default_dtype(), config.model_config.dtype
    assert isinstance(dtype, torch.dtype), "the engine has resolved it"
    torch.set_default_dtype(dtype)
    try:
        with device, skip_init():
            model = spec.target(
                **{name: available[value] for name, value in spec.parameters.items()}
            )
    finally:
        torch.set_default_dtype(before)
    load_checkpoint(model, args.model_dir)
    return model


def write_report(out: Path, report: ParityReport) -> None:
    """`report.json` and `histogram.png`, each whole or not at all."""
    out.mkdir(parents=True, exist_ok=True)
    with whole_file(out / "report.json") as path:
        path.write_text(report.to_json() + "\n")
    figure, axes = plt.subplots(figsize=(7, 4), constrained_layout=True)
    finite = report.differences[report.differences.isfinite()]
    axes.hist(finite.numpy(), bins=61, log=True)
    axes.set(
        title=f"{report.equal} of {report.tokens} tokens equal bit for bit",
        xlabel="trainer minus engine, nats",
        ylabel="tokens",
    )
    with whole_file(out / "histogram.png") as path:
        figure.savefig(path, dpi=120)
    plt.close(figure)


def main() -> None:
    args = arguments()
    llm = start_engine(args)
    try:
        model = build_trainer(args, llm)
        self_check(model)
        vocab_size = llm.llm_engine.vllm_config.model_config.get_vocab_size()
        generator = torch.Generator().manual_seed(0)
        sizes = [
            args.prompt_lengths[i % len(args.prompt_lengths)]
            for i in range(args.prompts)
        ]
        prompts = [
            torch.randint(vocab_size, (size,), generator=generator).tolist()
            for size in sizes
        ]
        report = check(
            llm,
            model,
            prompts,
            max_tokens=args.max_tokens,
            full_vocab=args.full_vocab,
        )
    finally:
        llm.llm_engine.engine_core.shutdown(timeout=30)
    print(report)
    write_report(args.out, report)
    print(f"report in {args.out}/report.json and {args.out}/histogram.png")
    if not report.all_equal:
        sys.exit(1)


if __name__ == "__main__":
    main()
