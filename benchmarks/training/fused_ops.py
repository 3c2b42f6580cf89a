# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""Norms, activations and rotary, forward and backward, against torch and Liger."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import liger
import torch
import torch.nn.functional as F
from measure import Result, as_graph, forward_backward, medians, name_of

from vllm.model_executor.layers.training import (
    GeluAndMul,
    LayerNorm,
    RMSNorm,
    RotaryEmbedding,
    SiluAndMul,
)


@dataclass
class Case:
    """One op on one size.

    Attributes:
        name: the op.
        size: for the table.
        ours: the function.
        eager: the same in plain torch.
        inputs: its arguments, those to differentiate requiring a gradient.
        passes: how many tensors of the first input's size forward and backward have
            to read or write.
        liger: Liger-Kernel's function, if it has the op.
        liger_inputs: its arguments where they differ.
    """

    name: str
    size: str
    ours: Callable[..., object]
    eager: Callable[..., object]
    inputs: list[torch.Tensor]
    passes: float
    liger: Callable[..., object] | None = None
    liger_inputs: list[torch.Tensor] | None = None


def run(device: torch.device) -> Iterator[Result]:
    """All ops at the sizes of a training step."""
    cuda = device.type == "cuda"
    dtypes = (torch.bfloat16,) if cuda else (torch.float32, torch.bfloat16)
    for dtype in dtypes:
        for rows, hidden in ((16384, 4096),) if cuda else ((2048, 1024),):
            for case in _cases(device, dtype, rows, hidden):
                yield _on_cuda(case) if cuda else _on_cpu(case)


def _on_cpu(case: Case) -> Result:
    variants = {
        "ours": forward_backward(case.ours, *case.inputs),
        "eager torch": forward_backward(case.eager, *case.inputs),
    }
    times = medians(variants, torch.device("cpu"), seconds=2.0)
    # torch's own kernel is what LayerNorm runs.
    target = {} if case.name == "LayerNorm" else {"eager torch": 1.5}
    return Result(
        "Fused ops, forward and backward",
        f"{case.name}, {case.size}",
        "ms",
        times.pop("ours"),
        times,
        target,
    )


def _on_cuda(case: Case) -> Result:
    first = case.inputs[0]
    num_bytes = int(case.passes * first.numel()) * first.element_size()
    variants = {
        "ours": forward_backward(case.ours, *case.inputs),
        "a copy of as many bytes": _copies(num_bytes),
        "eager torch": forward_backward(case.eager, *case.inputs),
    }
    target = {"a copy of as many bytes": 0.85}
    if case.liger is not None:
        inputs = case.liger_inputs or case.inputs
        variants["Liger-Kernel"] = forward_backward(case.liger, *inputs)
        target["Liger-Kernel"] = 1.0
    # In a graph, as they are too short for Python to launch in time.
    graphs = {name: as_graph(function) for name, function in variants.items()}
    times = medians(graphs, first.device, seconds=1.5, least=50)
    ours = times.pop("ours")
    rate = num_bytes / ours / 1e9
    return Result(
        "Fused ops, forward and backward",
        f"{case.name}, {case.size}",
        "ms",
        ours,
        times,
        {} if case.name == "LayerNorm" else target,
        f"{rate:.2f} TB/s",
    )


def _copies(num_bytes: int) -> Callable[[], object]:
    """Reads half of the bytes and writes the others, 64 MiB at a time.

    By a kernel: a copy of one whole buffer may go to the copy engine, which is slower.
    """
    source = torch.randn(num_bytes // 8, device="cuda")
    pairs = list(zip(source.split(1 << 24), torch.empty_like(source).split(1 << 24)))

    def copy() -> None:
        for part, target in pairs:
            torch.mul(part, 1.0, out=target)

    return copy


def _cases(
    device: torch.device, dtype: torch.dtype, rows: int, hidden: int
) -> Iterator[Case]:
    def tensor(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, device=device, dtype=dtype).requires_grad_()

    size = f"[{rows}, {hidden}] {name_of(dtype)}"
    norm = RMSNorm(hidden, params_dtype=dtype).to(device)
    weight = norm.weight
    yield Case(
        "RMSNorm",
        size,
        lambda x, _: norm(x),
        lambda x, w: F.rms_norm(x, (hidden,), w, 1e-6),
        [tensor(rows, hidden), weight],
        5,
        liger.rms_norm,
    )
    yield Case(
        "RMSNorm with residual",
        size,
        lambda x, residual, _: norm(x, residual),
        _eager_add_rms_norm,
        [tensor(rows, hidden), tensor(rows, hidden), weight],
        8,
        liger.fused_add_rms_norm,
    )
    layer_norm = LayerNorm(hidden, params_dtype=dtype).to(device)
    yield Case(
        "LayerNorm",
        size,
        lambda x, *_: layer_norm(x),
        lambda x, w, b: F.layer_norm(x, (hidden,), w, b),
        [tensor(rows, hidden), layer_norm.weight, layer_norm.bias],
        5,
        liger.layer_norm,
    )
    gated = tensor(rows, 2 * hidden)
    halves = [half.detach().clone().requires_grad_() for half in gated.chunk(2, -1)]
    yield Case(
        "SiluAndMul",
        size,
        SiluAndMul(),
        lambda x: F.silu(x[:, :hidden]) * x[:, hidden:],
        [gated],
        4,
        liger.silu_and_mul,
        halves,
    )
    yield Case(
        "GeluAndMul",
        size,
        GeluAndMul(approximate="tanh"),
        lambda x: F.gelu(x[:, :hidden], approximate="tanh") * x[:, hidden:],
        [gated],
        4,
        liger.gelu_and_mul,
        halves,
    )
    head_size = 128
    heads, kv_heads = hidden // head_size, max(1, hidden // head_size // 4)
    rotary = RotaryEmbedding(head_size, max_position_embeddings=rows).to(device)
    positions = torch.arange(rows, device=device)
    q, k = tensor(rows, heads, head_size), tensor(rows, kv_heads, head_size)
    cos, sin = rotary.cos_sin_cache.to(dtype).chunk(2, dim=-1)
    cos, sin = (torch.cat((table, table), -1) for table in (cos, sin))
    yield Case(
        "Rotary",
        f"{rows} tokens, {heads}/{kv_heads} heads of {head_size} {size.split()[-1]}",
        lambda q, k: rotary(positions, q, k),
        lambda q, k: (_eager_rotate(q, cos, sin), _eager_rotate(k, cos, sin)),
        [q, k],
        4 * (1 + kv_heads / heads),
        lambda q, k: liger.rotary(q, k, cos, sin),
    )


def _eager_add_rms_norm(
    x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    total = x + residual
    return F.rms_norm(total, total.shape[-1:], weight, 1e-6), total


def _eager_rotate(
    x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor
) -> torch.Tensor:
    first, second = x.chunk(2, dim=-1)
    return x * cos[:, None] + torch.cat((-second, first), dim=-1) * sin[:, None]
