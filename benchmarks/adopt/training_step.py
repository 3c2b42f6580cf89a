# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""A training step of transformers' Llama: adopted, as it is, and with Liger-Kernel.

On CUDA: 4×4096 tokens, 4 layers of 8B width in bf16, fused AdamW. On CPU a small model.
Writes `adopted_training_step.json`.

    python benchmarks/adopt/training_step.py [--out build/bench]
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "common"))

import torch
import torch.nn.functional as F
from generic_model import DEMO, WIDTH_OF_8B, optimizer_step
from measure import medians
from record import write_record
from transformers import LlamaConfig, LlamaForCausalLM

from vllm import training
from vllm.model_executor.layers.training import weighted_nll

ON_CUDA = torch.cuda.is_available()
DEVICE = torch.device("cuda" if ON_CUDA else "cpu")
BATCH, SEQ = (4, 4096) if ON_CUDA else (8, 256)
SIZES = (
    WIDTH_OF_8B | dict(vocab_size=128256, num_hidden_layers=4)
    if ON_CUDA
    else DEMO | dict(intermediate_size=768)
)
PEERS = (
    ("transformers", "transformers + Liger-Kernel") if ON_CUDA else ("transformers",)
)


def step(name: str, ids: torch.Tensor) -> Callable[[], None]:
    """One optimizer step of a variant, ready to be called."""
    torch.manual_seed(0)
    with DEVICE:
        model = LlamaForCausalLM(LlamaConfig(**SIZES, attn_implementation="sdpa"))
    model = model.to(torch.bfloat16 if ON_CUDA else torch.float32).train()
    inputs, targets = ids[:, :-1], ids[:, 1:]
    if name == "adopted":
        begin = time.perf_counter()
        training.adopt(model)
        weights = torch.full(targets.shape, 1 / targets.numel(), device=DEVICE)
        print(f"adopted in {time.perf_counter() - begin:.1f} s", flush=True)

        def loss() -> torch.Tensor:
            hidden_states = model.model(inputs, use_cache=False).last_hidden_state
            return weighted_nll(hidden_states, model.lm_head, targets, weights)[0]

    elif "Liger" in name:
        from liger_kernel.transformers import apply_liger_kernel_to_llama

        apply_liger_kernel_to_llama(model=model, fused_linear_cross_entropy=True)

        def loss() -> torch.Tensor:
            return model(inputs, labels=inputs, use_cache=False).loss

    else:

        def loss() -> torch.Tensor:
            logits = model(inputs, use_cache=False).logits
            return F.cross_entropy(logits.float().flatten(0, 1), targets.flatten())

    return optimizer_step(model, loss)


def main() -> None:
    """Measure, print and write."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--out", type=Path, default=Path("build/bench"))
    args = parser.parse_args()
    ids = torch.randint(SIZES["vocab_size"], (BATCH, SEQ + 1), device=DEVICE)
    times, peaks = {}, {}
    for name in ("adopted", *PEERS):
        if ON_CUDA:
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
        once = step(name, ids)
        times |= medians({name: once}, DEVICE, seconds=5.0)
        if ON_CUDA:
            peaks[name] = torch.cuda.max_memory_allocated() / 2**30
        memory = f", peak {peaks[name]:.1f} GiB" if peaks else ""
        print(f"{name}: {times[name]:.1f} ms{memory}", flush=True)
        del once
    ours = times.pop("adopted")
    write_record(
        args.out / "adopted_training_step.json",
        DEVICE,
        sizes=SIZES,
        peak_memory_gib=peaks,
        results=[
            {
                "group": "A training step of transformers' Llama",
                "case": f"{BATCH}×{SEQ} tokens",
                "unit": "ms",
                "ours": ours,
                "peers": times,
                "ratios": {name: peer / ours for name, peer in times.items()},
                "target": {PEERS[-1]: 1.0},
            }
        ],
    )


if __name__ == "__main__":
    main()
