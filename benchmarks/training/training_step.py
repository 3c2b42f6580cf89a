# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""A training step of the demo's model against the same model in torch.nn.

Each variant's memory is measured in a process of its own:
`python training_step.py ours float32` prints by how many MiB steps let it grow.
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "common"))

import torch
from generic_model import DEMO, loss_of, optimizer_step
from measure import Result, dtypes_of_products, medians, name_of
from torch_model import TorchModel

from vllm.model_executor.models.generic_transformer import (
    GenericTransformerConfig,
    GenericTransformerForCausalLM,
)

GROUP = "A training step"
PEER = "torch.nn and SDPA"
# The demo's sizes on CPU, and a model that fills a GPU.
CPU = (8, 256, DEMO)
CUDA = (
    4,
    4096,
    dict(
        vocab_size=32000,
        hidden_size=2048,
        num_hidden_layers=16,
        num_attention_heads=16,
        num_key_value_heads=8,
    ),
)


def run(device: torch.device) -> Iterator[Result]:
    """Time and peak memory of forward, backward and fused AdamW."""
    cuda = device.type == "cuda"
    for dtype in dtypes_of_products(device):
        steps = {name: step(name, device, dtype) for name in ("ours", PEER)}
        times = medians(steps, device, seconds=10.0)
        batch, seq, _ = CUDA if cuda else CPU
        case = f"{batch}×{seq} tokens, {name_of(dtype)}"
        ours = times.pop("ours")
        rate = f"{batch * seq / ours * 1e3:.0f} tokens/s"
        target = {} if cuda else {PEER: 1.2}
        yield Result(GROUP, case, "ms", ours, times, target, rate)
        if not cuda:
            peaks = {name: _peak_memory(name, dtype) for name in ("ours", PEER)}
            ours = peaks.pop("ours")
            yield Result(GROUP, case, "MiB", ours, peaks, {PEER: 1.0})


def step(name: str, device: torch.device, dtype: torch.dtype) -> Callable[[], object]:
    """One optimizer step of a variant, ready to be called."""
    batch, seq, sizes = CUDA if device.type == "cuda" else CPU
    config = GenericTransformerConfig(**sizes, max_position_embeddings=max(seq, 512))
    torch.manual_seed(0)
    if name == "ours":
        model = GenericTransformerForCausalLM(config).to(device, dtype)
        loss = partial(loss_of, model)
    else:
        model = TorchModel(config).to(device, dtype)
        loss = model.loss
    ids = torch.randint(config.vocab_size, (batch, seq + 1), device=device)
    return optimizer_step(model, lambda: loss(ids))


def _peak_memory(name: str, dtype: torch.dtype) -> float:
    """MiB that gradients, optimizer state and a few steps add to a process."""
    command = [sys.executable, __file__, name, name_of(dtype)]
    result = subprocess.run(
        command, check=True, capture_output=True, text=True, cwd=Path(__file__).parent
    )
    return float(result.stdout.split()[-1])


def _main(name: str, dtype: str) -> None:
    once = step(name, torch.device("cpu"), getattr(torch, dtype))
    # From here on, not from what importing took.
    Path("/proc/self/clear_refs").write_text("5")
    before = _status("VmRSS")
    for _ in range(5):
        once()
    print(_status("VmHWM") - before)


def _status(name: str) -> float:
    """A size of this process, in MiB: its resident set, or the peak of that."""
    lines = Path("/proc/self/status").read_text().splitlines()
    (line,) = (line for line in lines if line.startswith(f"{name}:"))
    return int(line.split()[1]) / 1024


if __name__ == "__main__":
    _main(*sys.argv[1:])
