# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""Implementation vllm_triton: its accuracy, and that its bits are the engine's.

Run by `test_attention_vllm_triton.py`: on a GPU, or on CPU tensors with
TRITON_INTERPRET=1.
"""

# ruff: noqa: E402
from typing import NamedTuple

import numpy as np
import pytest
import torch
import triton
import triton.language
from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

import vllm.triton_utils

IS_CUDA = torch.cuda.is_available()


def dot(builder, a, b, d, *_):
    """Row by row: a row of numpy's product of matrices depends on where it stands."""
    a, b = a.data.astype(np.float32), b.data.astype(np.float32)
    return TensorHandle(np.stack([row @ b for row in a]) + d.data, d.dtype.scalar)


if not IS_CUDA:
    InterpreterBuilder.create_dot = dot
    # vLLM has placeholders here, which the kernels would import.
    vllm.triton_utils.triton = triton
    vllm.triton_utils.tl = triton.language

from vllm.model_executor import vllm_internals
from vllm.model_executor.layers.training.ops.attention import (
    triton_forward,
    vllm_triton,
)
from vllm.model_executor.layers.training.ops.attention.call import (
    AttentionCall,
    AttentionSpec,
)
from vllm.model_executor.layers.training.ops.attention.reference import (
    attention_reference,
)

DEVICE = "cuda" if IS_CUDA else "cpu"
# The interpreter multiplies bf16 matrices as integers.
DTYPE = torch.bfloat16 if IS_CUDA else torch.float16
# Query heads, key heads, head size.
SHAPES = [(8, 2, 64), (4, 4, 80), (16, 1, 128), (32, 8, 128), (6, 2, 96)]
FEATURES = {
    "plain": {},
    "soft_cap": {"soft_cap": 5.0},
    "sinks": {"sinks": True},
    "window": {"window": 30},
    "all": {"sinks": True, "window": 30, "soft_cap": 5.0},
}
RAGGED = [1, 5, 0, 63, 123]
PAGE_SIZES = (16, 48, 64)
if not IS_CUDA:
    FEATURES = {name: FEATURES[name] for name in ("plain", "window", "all")}
    SHAPES, RAGGED, PAGE_SIZES = [(6, 2, 40)], [1, 0, 9, 70], (16, 48)


class Options(NamedTuple):
    spec: AttentionSpec
    sinks: torch.Tensor | None


@pytest.fixture(autouse=True)
def gpu_to_interpret(monkeypatch):
    if not IS_CUDA:
        monkeypatch.setattr(
            triton_forward, "has_large_shared_memory", lambda device: True
        )


@pytest.fixture(params=SHAPES, ids=str)
def qkv(request):
    """Parts of one tensor, as a projection makes them."""
    heads, kv_heads, head_size = request.param
    generator = torch.Generator().manual_seed(0)
    shape = sum(RAGGED), heads + 2 * kv_heads, head_size
    tensor = torch.randn(shape, generator=generator).to(DEVICE, DTYPE)
    return tensor.split([heads, kv_heads, kv_heads], dim=1)


@pytest.fixture(params=FEATURES)
def options(request, qkv):
    features = FEATURES[request.param]
    _, heads, head_size = qkv[0].shape
    sinks = torch.linspace(-2, 2, heads, device=DEVICE)
    spec = AttentionSpec(
        1.1 * head_size**-0.5,
        sliding_window=features.get("window"),
        logits_soft_cap=features.get("soft_cap"),
    )
    return Options(spec, sinks.to(DTYPE).float() if "sinks" in features else None)


def bounds(lengths):
    return torch.tensor([0, *lengths]).cumsum(0, dtype=torch.int32).to(DEVICE)


def forward(qkv, lengths, options):
    call = AttentionCall(options.spec, bounds(lengths), max(lengths), options.sinks)
    return vllm_triton.forward(*qkv, call)


def decode(query, key, value, options, page_size):
    """A sequence's last output as the engine computes it in a step of one token.

    Its pages lie in a cache in disorder, with NaN in what is not filled.
    """
    spec, window = options.spec, options.spec.sliding_window
    length, kv_heads, head_size = key.shape
    pages = -(-length // page_size)
    cache = key.new_full((pages + 3, kv_heads, page_size, 2 * head_size), torch.nan)
    order = (torch.arange(pages, device=DEVICE) * 2 + 1) % (pages + pages % 2 + 1)
    slots = torch.arange(length, device=DEVICE)
    page, offset = order[slots // page_size], slots % page_size
    cache[page, :, offset] = torch.cat((key, value), -1)
    # Past its pages a request's row of the engine's table has page 0.
    table = torch.nn.functional.pad(order.int(), (0, 4)).unsqueeze(0)
    key_cache, value_cache = cache.transpose(1, 2).split(head_size, -1)
    output = query.new_empty(1, *query.shape[1:])
    vllm_internals.triton_attention()(
        q=query[-1:],
        k=key_cache,
        v=value_cache,
        out=output,
        cu_seqlens_q=bounds([1]),
        max_seqlen_q=1,
        seqused_k=torch.tensor([length], dtype=torch.int32, device=DEVICE),
        max_seqlen_k=length,
        softmax_scale=spec.scale,
        causal=True,
        window_size=(window - 1, 0) if window else (-1, -1),
        block_table=table,
        softcap=spec.logits_soft_cap or 0.0,
        q_descale=None,
        k_descale=torch.ones(1, kv_heads, device=DEVICE),
        v_descale=torch.ones(1, kv_heads, device=DEVICE),
        sinks=vllm_triton.sinks_for(window, options.sinks, query.shape[1], DEVICE),
    )
    return output[0]


def test_output_and_lse_are_accurate(qkv, options, assert_as_accurate):
    def reference(dtype):
        return attention_reference(
            *(t.to(dtype) for t in qkv),
            bounds(RAGGED),
            options.sinks,
            scale=options.spec.scale,
            window=options.spec.sliding_window,
            soft_cap=options.spec.logits_soft_cap,
        )

    output, lse = forward(qkv, RAGGED, options)
    exact, exact_lse = reference(torch.float64)
    assert_as_accurate("output", output, reference(DTYPE)[0], exact)
    # Scores are products of 16-bit numbers, summed in fp32.
    torch.testing.assert_close(lse.double(), exact_lse, rtol=1e-5, atol=1e-5)


def test_rows_are_those_of_decode_steps(qkv, options, assert_equal):
    """Of the engine, in pages of several sizes."""
    sequence = [t[-RAGGED[-1] :] for t in qkv]
    whole, _ = forward(sequence, RAGGED[-1:], options)
    for length in (1, 2, 31, 32, 33, 64, 67, RAGGED[-1]):
        prefix = [t[:length] for t in sequence]
        for page_size in PAGE_SIZES:
            step = decode(*prefix, options, page_size)
            assert_equal(f"output {length - 1}", step, whole[length - 1])


def test_a_window_that_hides_the_first_tile_of_a_block(qkv, options, assert_equal):
    """From some of its queries, whose scores are all negative."""
    query, key, value = (t[-RAGGED[-1] :].clone() for t in qkv)
    query[..., 0], key[..., 0] = 8, -8
    whole, _ = forward((query, key, value), RAGGED[-1:], options)
    for length in range(60, RAGGED[-1] + 1):
        prefix = [t[:length] for t in (query, key, value)]
        step = decode(*prefix, options, PAGE_SIZES[0])
        assert_equal(f"output {length - 1}", step, whole[length - 1])


def test_rows_of_a_prefix_are_those_of_the_whole(qkv, options, assert_equal):
    sequence = [t[-RAGGED[-1] :] for t in qkv]
    whole, _ = forward(sequence, RAGGED[-1:], options)
    for length in (1, 17, 32, 45):
        prefix, _ = forward([t[:length] for t in sequence], [length], options)
        assert_equal(f"prefix of {length}", prefix, whole[:length])


def test_a_sequence_does_not_depend_on_its_neighbours(qkv, options, assert_equal):
    packed = forward(qkv, RAGGED, options)
    parts = zip(*(t.split(RAGGED) for t in qkv), strict=True)
    alone = [
        forward(part, [length], options)
        for length, part in zip(RAGGED, parts, strict=True)
        if length
    ]
    outputs, lses = zip(*alone, strict=True)
    assert_equal("output", packed[0], torch.cat(outputs))
    assert_equal("lse", packed[1], torch.cat(lses, 1))
