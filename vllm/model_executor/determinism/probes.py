# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""Probing on this machine that the result of a row does not depend on the batch.

Batch invariance is a property of kernels on a machine: of the instructions it has, and
of the libraries that choose among kernels by shape. So a shape is tried with random
numbers before the mode is relied on.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from vllm.model_executor.determinism.linear.op import linear

# Numbers of rows, around the sizes at which kernels change their tiles.
ROWS = (1, 2, 3, 7, 8, 16, 33, 64, 255, 1024)
# Of which as many are tried as these numbers of multiply-adds allow for a shape.
BUDGET = {"cpu": 1 << 30, "cuda": 1 << 37}
# Rows of a random weight; more are copies, which are multiplied alike.
DISTINCT_ROWS = 256


class BatchInvarianceError(RuntimeError):
    """A kernel's result depends on the batch on this machine."""


@dataclass(frozen=True)
class LinearShape:
    """A product x W^T + b with W of shape [out_features, in_features]."""

    out_features: int
    in_features: int
    dtype: torch.dtype
    bias: bool = False

    def __str__(self) -> str:
        bias = " and a bias" if self.bias else ""
        return (
            f"the linear of weight [{self.out_features}, {self.in_features}]{bias} in "
            f"{self.dtype}"
        )


def random_tensor(
    shape: tuple[int, ...],
    dtype: torch.dtype,
    device: torch.device,
    generator: torch.Generator,
) -> torch.Tensor:
    """Normal numbers from a generator of the device, in a dtype."""
    return torch.randn(shape, generator=generator, device=device).to(dtype)


def probe_linear(
    shape: LinearShape, device: torch.device, generator: torch.Generator
) -> None:
    """Every product of m rows equals those rows of the product of the most rows."""
    distinct = min(shape.out_features, DISTINCT_ROWS)
    copies = -(-shape.out_features // distinct)
    weight = random_tensor(
        (distinct, shape.in_features), shape.dtype, device, generator
    )
    weight = weight.repeat(copies, 1)[: shape.out_features]
    bias = weight[:, 0].contiguous() if shape.bias else None
    counts = _row_counts(weight.numel(), BUDGET[device.type])
    x = random_tensor((counts[-1], shape.in_features), shape.dtype, device, generator)
    whole = linear(x, weight, bias)
    for count in counts[:-1]:
        # The last ones: a row's place must not matter either.
        part = linear(x[-count:].contiguous(), weight, bias)
        require_equal(f"{shape}, {count} rows", part, whole[-count:], len(x))


def _row_counts(weight_size: int, budget: int) -> list[int]:
    counts = [count for count in ROWS if 3 * count * weight_size <= budget]
    return counts if len(counts) > 2 else list(ROWS[:3])


def require_equal(
    what: str, part: torch.Tensor, expected: torch.Tensor, of: int
) -> None:
    """Compare results that have to have the same bits.

    Args:
        what: What was computed, for the message.
        part: The result of a part of the batch.
        expected: The same rows of the result of the whole batch.
        of: Number of rows of the whole batch.

    Raises:
        BatchInvarianceError: The results differ.
    """
    if torch.equal(part, expected):
        return
    gap = (part.double() - expected.double()).abs().max().item()
    if part.is_cuda:
        machine = torch.cuda.get_device_name(part.device)
    else:
        machine = f"CPU ({torch.backends.cpu.get_cpu_capability()})"
    raise BatchInvarianceError(
        f"Not batch-invariant on {machine}: {what} of {of} differs by up to {gap:.3g} "
        "from the same in the whole batch. Batch-invariant mode cannot be used for "
        "this model on this machine; start without VLLM_BATCH_INVARIANT=1, or choose "
        "another dtype or attention implementation."
    )
