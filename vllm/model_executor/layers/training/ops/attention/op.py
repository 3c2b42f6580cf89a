# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""Attention over packed sequences: op, backward and public function."""

from __future__ import annotations

import functools
from typing import Any

import torch

from vllm.model_executor.determinism.mode import is_batch_invariant
from vllm.model_executor.layers.training.attention_layout import (
    check_max_seqlen,
    check_sequences,
)
from vllm.model_executor.layers.training.ops.attention.call import (
    FLAT_FIELDS,
    FLAT_SCHEMA,
    AttentionCall,
    AttentionSpec,
)
from vllm.model_executor.layers.training.ops.attention.table import (
    Kernel,
    Request,
    check_name,
    choose,
)
from vllm.model_executor.op_library import (
    SUPPORTED_DTYPES,
    autocast_dtype,
    define_op,
    refuse_second_derivative_of,
)

# What has the derivatives that the op lacks, in every dtype.
_IN_PLAIN_TORCH = (
    "use attention_reference of vllm.model_executor.layers.training.ops.attention."
    "reference, which is plain torch"
)

# Of a call, of which the sinks alone may have one.
_NO_GRADIENTS = AttentionCall.of_flat(*[None] * len(FLAT_FIELDS))

# Called for each forward and backward.
_cached_choice = functools.cache(choose)


def attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    cu_seqlens: torch.Tensor,
    max_seqlen: int | None,
    spec: AttentionSpec,
    *,
    sinks: torch.Tensor | None = None,
    alibi_slopes: torch.Tensor | None = None,
    implementation: str | None = None,
    deterministic: bool = False,
) -> torch.Tensor:
    """Attention within each of several packed sequences, with a backward.

    Under autocast query, key and value are cast to its dtype. In batch-invariant mode
    the output has the bits of the engine in that mode (fp64, for checks, has not).
    Sinks are rounded to the query's dtype, in which a model of that dtype holds them.

    Args:
        query: shape = [num_tokens, num_heads, head_size]
        key: shape = [num_tokens, num_kv_heads, head_size]
        value: like key.
        cu_seqlens: where the sequences begin and end, int32, on the query's device,
            shape = [num_seqs + 1], from 0 to num_tokens. Sequences may be empty. Read
            by the kernel: on CUDA its values are not checked.
        max_seqlen: no sequence is longer; None: num_tokens, which is correct, but
            makes kernels for CUDA do more.
        spec: scale and features.
        sinks: one more score of every query of a head, whose value is zero; floating
            point, shape = [num_heads]. It has a gradient.
        alibi_slopes: of each head, fp32, shape = [num_heads]: a key at distance d is
            scored slope * d less. No gradient.
        implementation: name in the table of implementations; None: its first that can.
        deterministic: gradients are equal bit for bit from run to run, as where
            torch.use_deterministic_algorithms is on.

    Returns:
        shape = [num_tokens, num_heads, head_size], in the query's dtype; contiguous.

    Raises:
        ValueError: shapes, dtypes or devices that do not fit, or an implementation
            that cannot compute this.
    """
    if implementation is not None:
        check_name(implementation)
    query, key, value = _autocast(query, key, value)
    _check(query, key, value, cu_seqlens, max_seqlen, sinks, alibi_slopes)
    query, key, value = (
        t if t.stride(-1) == 1 else t.contiguous() for t in (query, key, value)
    )
    if sinks is not None and query.dtype != torch.float64:
        sinks = sinks.to(query.dtype).float()
    call = AttentionCall(
        spec,
        cu_seqlens.contiguous(),
        query.shape[0] if max_seqlen is None else max_seqlen,
        None if sinks is None else sinks.contiguous(),
        None if alibi_slopes is None else alibi_slopes.contiguous(),
        implementation or "",
        deterministic or torch.are_deterministic_algorithms_enabled(),
        is_batch_invariant() and query.dtype != torch.float64,
    )
    output, _ = _attention(query, key, value, *call.flat())
    return output


def _autocast(*tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Cast as torch.autocast casts the inputs of torch's own attention."""
    dtype = autocast_dtype(tensors[0])
    if dtype is None:
        return tensors
    return tuple(t if t.dtype == torch.float64 else t.to(dtype) for t in tensors)


def _check(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    cu_seqlens: torch.Tensor,
    max_seqlen: int | None,
    sinks: torch.Tensor | None,
    alibi_slopes: torch.Tensor | None,
) -> None:
    if query.dtype not in SUPPORTED_DTYPES:
        raise ValueError(
            f"Attention got {query.dtype}; it runs in torch.float32, torch.bfloat16 "
            "or torch.float16 (torch.float64 for checks). Cast the inputs."
        )
    for name, tensor in (("key", key), ("value", value)):
        if (tensor.dtype, tensor.device) != (query.dtype, query.device):
            raise ValueError(
                f"The query is {query.dtype} on {query.device}, but the {name} is "
                f"{tensor.dtype} on {tensor.device}; all three must agree."
            )
    if (
        query.ndim != 3
        or key.ndim != 3
        or key.shape != value.shape
        or key.shape[::2] != query.shape[::2]
        or not key.shape[1]
        or query.shape[1] % key.shape[1]
    ):
        raise ValueError(
            f"query, key and value have shapes {tuple(query.shape)}, "
            f"{tuple(key.shape)} and {tuple(value.shape)}; they must be [num_tokens, "
            "num_heads, head_size] and twice [num_tokens, num_kv_heads, head_size], "
            "with num_heads a multiple of num_kv_heads."
        )
    if (
        not isinstance(cu_seqlens, torch.Tensor)
        or cu_seqlens.dtype != torch.int32
        or cu_seqlens.ndim != 1
        or cu_seqlens.shape[0] < (2 if query.shape[0] else 1)
        or cu_seqlens.device != query.device
    ):
        given = (
            f"{cu_seqlens.dtype} of shape {tuple(cu_seqlens.shape)} on "
            f"{cu_seqlens.device}"
            if isinstance(cu_seqlens, torch.Tensor)
            else type(cu_seqlens).__name__
        )
        raise ValueError(
            f"cu_seqlens is {given}; it must be a torch.int32 tensor of shape "
            f"[num_seqs + 1] on {query.device}, for lengths l: torch.tensor([0, *l])"
            ".cumsum(0, dtype=torch.int32)."
        )
    if max_seqlen is not None:
        check_max_seqlen(max_seqlen)
    of_heads = {"sinks": sinks, "alibi_slopes": alibi_slopes}
    for name, each in of_heads.items():
        if each is None:
            continue
        if each.shape != query.shape[1:2] or each.device != query.device:
            raise ValueError(
                f"{name} has shape {tuple(each.shape)} on {each.device}; it must "
                f"have one element for each of the {query.shape[1]} heads, on "
                f"{query.device}."
            )
    if alibi_slopes is not None and alibi_slopes.dtype != torch.float32:
        raise ValueError(f"alibi_slopes is {alibi_slopes.dtype}; use torch.float32.")


def _choose(query: torch.Tensor, call: AttentionCall) -> tuple[Kernel, Kernel]:
    request = Request.of(
        query.device,
        query.dtype,
        query.shape[1],
        query.shape[2],
        call.spec,
        sinks=call.sinks is not None,
        alibi_slopes=call.alibi_slopes is not None,
        deterministic=call.deterministic,
        batch_invariant=call.batch_invariant,
    )
    return _cached_choice(request, call.implementation)


def _forward(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *fields: Any
) -> tuple[torch.Tensor, torch.Tensor]:
    call = AttentionCall.of_flat(*fields)
    if not query.is_cuda:
        check_sequences(call.cu_seqlens, query.shape[0], call.max_seqlen)
    kernel, _ = _choose(query, call)
    if not query.numel():
        return _fake(query)
    return kernel.function(query, key, value, call)


def _backward(
    grad_output: torch.Tensor,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    output: torch.Tensor,
    lse: torch.Tensor,
    *fields: Any,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    call = AttentionCall.of_flat(*fields)
    _, kernel = _choose(query, call)
    if not query.numel():
        return _fake_backward(grad_output, query, key, value)
    return kernel.function(grad_output, query, key, value, output, lse, call)


def _fake(query: torch.Tensor, *_: Any) -> tuple[torch.Tensor, torch.Tensor]:
    lse_dtype = torch.promote_types(query.dtype, torch.float32)
    lse = query.new_empty(query.shape[1], query.shape[0], dtype=lse_dtype)
    return query.new_empty(query.shape), lse


def _fake_backward(
    grad_output: torch.Tensor,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    *_: Any,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    return (
        query.new_empty(query.shape),
        key.new_empty(key.shape),
        value.new_empty(value.shape),
    )


def _setup_context(
    ctx: Any, inputs: tuple[Any, ...], output: tuple[torch.Tensor, torch.Tensor]
) -> None:
    query, key, value, *fields = inputs
    call = AttentionCall.of_flat(*fields)
    ctx.mark_non_differentiable(output[1])
    # No zeros for the gradient of lse.
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(query, key, value, *output, *call.tensors)
    ctx.call = call.with_tensors(None, None, None)


def _differentiate(ctx: Any, grad: torch.Tensor | None, _: None) -> tuple[Any, ...]:
    grads: tuple[torch.Tensor | None, ...] = (None,) * 3
    grad_sinks = None
    if grad is not None:
        query, key, value, output, lse, *tensors = ctx.saved_tensors
        call = ctx.call.with_tensors(*tensors)
        if any(ctx.needs_input_grad[:3]):
            grads = _attention_backward(
                grad.contiguous(), query, key, value, output, lse, *call.flat()
            )
        if AttentionCall.of_flat(*ctx.needs_input_grad[3:]).sinks:
            grad_sinks = _sinks_gradient(grad, output, lse, call.sinks)
    return *grads, *_NO_GRADIENTS._replace(sinks=grad_sinks).flat()


def _sinks_gradient(
    grad_output: torch.Tensor,
    output: torch.Tensor,
    lse: torch.Tensor,
    sinks: torch.Tensor,
) -> torch.Tensor:
    """A sink's weight is exp(sink - lse) and its value zero: with delta the row sums
    of dO * O, its gradient is minus the sum of weight * delta over the tokens.

    Returns:
        shape = [num_heads], dtype of sinks.
    """
    delta = (grad_output.to(lse.dtype) * output).sum(-1)
    weights = torch.exp(sinks.unsqueeze(1) - lse)
    return -(weights * delta.t()).sum(1).to(sinks.dtype)


_attention_backward = define_op(
    "attention_backward(Tensor grad_output, Tensor query, Tensor key, Tensor value, "
    f"Tensor output, Tensor lse, {FLAT_SCHEMA}) -> (Tensor, Tensor, Tensor)",
    fake=_fake_backward,
    cpu=_backward,
    cuda=_backward,
    backward=refuse_second_derivative_of("attention", _IN_PLAIN_TORCH),
)
_attention = define_op(
    f"attention(Tensor query, Tensor key, Tensor value, {FLAT_SCHEMA}) "
    "-> (Tensor output, Tensor lse)",
    fake=_fake,
    cpu=_forward,
    cuda=_forward,
    setup_context=_setup_context,
    backward=_differentiate,
    instead=_IN_PLAIN_TORCH,
)
