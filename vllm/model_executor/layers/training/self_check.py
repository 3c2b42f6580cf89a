# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""Probing every shape of a model on this machine; see `determinism.probes`."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
from torch import nn

from vllm.logger import init_logger
from vllm.model_executor.determinism.mode import batch_invariant
from vllm.model_executor.determinism.probes import (
    BatchInvarianceError,
    LinearShape,
    probe_linear,
    random_tensor,
    require_equal,
)
from vllm.model_executor.layers.training.attention import TrainableAttention
from vllm.model_executor.layers.training.embedding import ParallelLMHead
from vllm.model_executor.layers.training.linear import ParallelLinear, RowParallelLinear
from vllm.model_executor.layers.training.ops.attention import table, vllm_flash
from vllm.model_executor.layers.training.ops.attention.call import AttentionSpec
from vllm.model_executor.layers.training.ops.attention.op import attention

if TYPE_CHECKING:
    from vllm.config import VllmConfig

logger = init_logger(__name__)

# Tokens of the sequence whose prefixes are attended to.
TOKENS = (1, 2, 9, 33, 130, 257)
# Tokens of a page of the engine's keys.
PAGE_SIZE = 16


@dataclass(frozen=True)
class AttentionShape:
    """Attention with these heads.

    Attributes:
        implementation: Its name in the table of implementations; None: the default.
        deterministic: Gradients are equal bit for bit from run to run.
    """

    num_heads: int
    num_kv_heads: int
    head_size: int
    dtype: torch.dtype
    spec: AttentionSpec
    sinks: bool = False
    alibi: bool = False
    implementation: str | None = None
    deterministic: bool = False

    @classmethod
    def of(cls, layer: TrainableAttention, dtype: torch.dtype) -> AttentionShape:
        """That of a layer whose query, key and value have a dtype."""
        return cls(
            layer.num_heads,
            layer.num_kv_heads,
            layer.head_size,
            dtype,
            layer.spec,
            layer.sinks is not None,
            layer.alibi_slopes is not None,
            layer.implementation,
            layer.deterministic,
        )

    def forward_on(self, device: torch.device) -> str | None:
        """Name of the kernel that computes it in the mode; None if none can."""
        name = self.implementation or table.default_for(
            table.Request.of(
                device,
                self.dtype,
                self.num_heads,
                self.head_size,
                self.spec,
                sinks=self.sinks,
                alibi_slopes=self.alibi,
                deterministic=self.deterministic,
                batch_invariant=True,
            )
        )
        return name and table.IMPLEMENTATIONS[name][0]

    def __str__(self) -> str:
        name = self.implementation or "the default implementation"
        return (
            f"attention of {self.num_heads} query and {self.num_kv_heads} key heads of "
            f"{self.head_size} in {self.dtype} by {name} ({self.spec})"
        )


def self_check(model: nn.Module, *, device: torch.device | str | None = None) -> None:
    """Check that the kernels of a model are batch-invariant on this machine.

    Each shape of GEMM and attention is run on random numbers.

    Args:
        model: The training model. It is neither run nor changed.
        device: The device to check; that of the model's parameters if None.

    Raises:
        BatchInvarianceError: A result depends on the batch. The message names the
            shape.
        ValueError: Batch-invariant mode has no attention kernel for a shape.
    """
    if device is None:
        device = next(model.parameters()).device
    self_check_shapes(linear_shapes(model), attention_shapes(model), device)


def self_check_engine(model: nn.Module, vllm_config: VllmConfig) -> None:
    """`self_check` of a training model that an engine is about to serve.

    Attention that the trainer has no kernel for, such as ALiBi on CUDA, is not probed;
    the log says so, and how a trainer of fewer tensor-parallel ranks is built.

    Args:
        model: As the builder returned it, before its layers become the engine's.
        vllm_config: The engine's config, which may name its attention backend.

    Raises:
        BatchInvarianceError: Names the first shape that depends on the batch.
    """
    _say_how_ranks_add_up(model)
    device = next(model.parameters()).device
    self_check_shapes(linear_shapes(model), (), device)
    backend = vllm_config.attention_config.backend
    for shape in dict.fromkeys(attention_shapes(model)):
        name = "" if backend is None else backend.name
        if name == "TRITON_ATTN":
            shape = replace(shape, implementation="vllm_triton")
        elif device.type == "cuda":
            major, _ = torch.cuda.get_device_capability(device)
            refuse_window(name, major, shape)
            if shape.forward_on(device) != "fa3":
                logger.warning(
                    "Not probed for batch invariance: %s: no trainer has the bits of "
                    "this backend for it; it may have those of "
                    "attention_backend='TRITON_ATTN'.",
                    shape,
                )
                continue
        try:
            self_check_shapes((), [shape], device)
        except ValueError as error:
            logger.warning("Not probed for batch invariance: %s: %s", shape, error)


def _say_how_ranks_add_up(model: nn.Module) -> None:
    for layer in model.modules():
        if isinstance(layer, RowParallelLinear) and layer.tp_size > 1:
            shards = layer.parallel_context.tp_reduction_shards
            logger.warning_once(
                "Row-parallel layers add up %d partial products, over %d "
                "tensor-parallel ranks. A trainer has this engine's bits if it is "
                "built with as many ranks, or with "
                "ParallelContext(tp_reduction_shards=%d).",
                shards,
                layer.tp_size,
                shards,
                scope="global",
            )
            return


def refuse_window(backend: str, capability: int, shape: AttentionShape) -> None:
    """Refuse FlashAttention 3 with a window, without a probe, which may not show it.

    Args:
        backend: The engine's, as it was asked for; empty: vLLM's default.
        capability: The GPU's major compute capability.
        shape: Of the attention.

    Raises:
        BatchInvarianceError: It is that.
    """
    if backend in ("", "FLASH_ATTN") and capability == 9 and shape.spec.sliding_window:
        raise BatchInvarianceError(
            f"FlashAttention 3 depends on the batch for {shape}: where the keys of a "
            "query begin to be added up depends on where its request was cut. Start "
            "the engine with attention_backend='TRITON_ATTN', and build the trainer's "
            "attention with implementation='vllm_triton'."
        )


def self_check_shapes(
    linears: Iterable[LinearShape],
    attentions: Iterable[AttentionShape],
    device: torch.device | str,
) -> None:
    """Check each of these shapes once, as `self_check` does."""
    device = torch.device(device)
    # The caller's random numbers stay as they are.
    generator = torch.Generator(device).manual_seed(0)
    with torch.no_grad(), batch_invariant():
        for linear_shape in dict.fromkeys(linears):
            probe_linear(linear_shape, device, generator)
        for attention_shape in dict.fromkeys(attentions):
            _probe_attention(attention_shape, device, generator)


def linear_shapes(model: nn.Module) -> Iterator[LinearShape]:
    """Of the products that a training model's layers compute on this rank."""
    for layer in model.modules():
        if not isinstance(layer, ParallelLinear | ParallelLMHead):
            continue
        rows, columns = layer.weight.shape
        if isinstance(layer, RowParallelLinear):
            columns //= layer.num_products
        yield LinearShape(rows, columns, layer.weight.dtype, layer.bias is not None)


def attention_shapes(model: nn.Module) -> Iterator[AttentionShape]:
    """Of a training model's attention, in the dtype of its parameters."""
    dtype = next(model.parameters()).dtype
    for layer in model.modules():
        if isinstance(layer, TrainableAttention):
            yield AttentionShape.of(layer, dtype)


def _probe_attention(
    shape: AttentionShape, device: torch.device, generator: torch.Generator
) -> None:
    """The rows of every prefix, alone and beside others, are those of the whole."""
    length = TOKENS[-1]
    query, key, value = (
        random_tensor((length, heads, shape.head_size), shape.dtype, device, generator)
        for heads in (shape.num_heads, shape.num_kv_heads, shape.num_kv_heads)
    )
    of_heads = torch.linspace(0.1, 0.9, shape.num_heads, device=device)

    def attend(lengths: tuple[int, ...]) -> tuple[torch.Tensor, ...]:
        """Of prefixes of these lengths in one batch."""
        places = torch.cat([torch.arange(n, device=device) for n in lengths])
        bounds = torch.tensor([0, *lengths], device=device)
        output = attention(
            query[places],
            key[places],
            value[places],
            bounds.cumsum(0, dtype=torch.int32),
            max(lengths),
            shape.spec,
            sinks=of_heads if shape.sinks else None,
            alibi_slopes=of_heads if shape.alibi else None,
            implementation=shape.implementation,
            deterministic=shape.deterministic,
        )
        return output.split(list(lengths))

    (whole,) = attend((length,))
    together = attend(TOKENS)
    for count, beside in zip(TOKENS, together, strict=True):
        what = f"{shape}, a prefix of {count} tokens"
        require_equal(f"{what} beside others", beside, whole[:count], length)
        (alone,) = attend((count,))
        require_equal(f"{what} alone", alone, whole[:count], length)
    if shape.forward_on(device) == "fa3":
        sinks = of_heads if shape.sinks else None
        decoded = _decode(shape.spec, query, key, value, sinks)
        last = torch.tensor(TOKENS, device=device) - 1
        what = f"{shape}, decoding from pages of {PAGE_SIZE} tokens"
        require_equal(what, decoded, whole[last], length)


def _decode(
    spec: AttentionSpec,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    sinks: torch.Tensor | None,
) -> torch.Tensor:
    """The last row of every prefix, as the engine's FlashAttention 3 decodes it."""
    lengths = torch.tensor(TOKENS, dtype=torch.int32, device=query.device)
    num_pages = -(-len(key) // PAGE_SIZE)
    padding = (0, 0, 0, 0, 0, num_pages * PAGE_SIZE - len(key))
    key_pages, value_pages = (
        nn.functional.pad(x, padding).unflatten(0, (num_pages, PAGE_SIZE))
        for x in (key, value)
    )
    pages = torch.arange(num_pages, dtype=torch.int32, device=query.device)
    return vllm_flash.decode_from_pages(
        query[lengths.long() - 1],
        key_pages,
        value_pages,
        lengths,
        pages.repeat(len(TOKENS), 1),
        spec,
        sinks,
    )
