# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""Log-probabilities of tokens and entropies, in blocks of tokens and vocabulary.

With z = (h W^T + b) / T, y = z - lse(z), p = exp(y) and the entropy H = -sum p y:

    dz = g (onehot(t) - p) - e p (y + H)
    dh = dz W / T,  dW = dz^T h / T,  db = sum over tokens dz / T

for the gradients g of y[t] and e of H. The forward takes a block of tokens at a time,
because the bits of a row's log-softmax are those of torch's on the whole row. The
backward takes a block of the vocabulary at a time, so that dW is written once and
rounded once, and dh is added up in fp32. Between them are kept lse, H, and the logits
themselves if they are no more than one block of the forward's; others are computed
again.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch.distributed.distributed_c10d import _resolve_process_group

from vllm.model_executor.determinism.linear.op import linear
from vllm.model_executor.layers.training.communication import all_gather
from vllm.model_executor.layers.training.ops.logprobs.blocks import blocks_for, ranges
from vllm.model_executor.layers.training.ops.logprobs.logits_gradient import (
    ROWS_SCHEMA,
    RowNumbers,
    logits_gradient,
)
from vllm.model_executor.layers.training.ops.logprobs.of_logits import (
    IN_PLAIN_TORCH,
    new_numbers,
    of_rows,
    score,
)
from vllm.model_executor.op_library import (
    define_op,
    refuse_second_derivative_of,
)


def _accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)


def product_dtype(hidden: torch.Tensor) -> torch.dtype:
    """In which dtype the backward's matrix products take their inputs.

    A CPU without instructions for a 16-bit dtype multiplies it many times slower than
    fp32.
    """
    if hidden.device.type == "cpu" and hidden.dtype in (torch.bfloat16, torch.float16):
        mkldnn = torch.ops.mkldnn
        if hidden.dtype == torch.bfloat16:
            supported = mkldnn._is_mkldnn_bf16_supported()
        else:
            supported = mkldnn._is_mkldnn_fp16_supported()
        return hidden.dtype if supported else torch.float32
    return hidden.dtype


def gather_vocab(logits: torch.Tensor, tp_group: str) -> torch.Tensor:
    """The ranks' columns side by side."""
    if not tp_group:
        return logits
    group = _resolve_process_group(tp_group)  # type: ignore[arg-type]
    return all_gather(logits, group, -1)


def _forward(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    targets: torch.Tensor,
    temperature: torch.Tensor | None,
    vocab_size: int,
    vocab_start: int,
    tp_group: str,
    with_entropy: bool,
    for_backward: bool,
) -> tuple[torch.Tensor, ...]:
    numbers = new_numbers(hidden, len(hidden), with_entropy, for_backward)
    keeps_logits = for_backward and _fits_one_block(hidden, vocab_size)
    kept = hidden.new_empty(0, len(weight))
    for rows in ranges(len(hidden), blocks_for(hidden).tokens_in_forward(vocab_size)):
        local = linear(hidden[rows], weight, bias)
        if keeps_logits:
            kept = local
        scored = score(
            gather_vocab(local, tp_group)[:, :vocab_size],
            targets[rows],
            of_rows(temperature, rows),
            with_entropy,
            for_backward,
        )
        for whole, part in zip(numbers, scored):
            whole[rows] = part
    return *numbers, kept


def _fits_one_block(hidden: torch.Tensor, vocab_size: int) -> bool:
    return hidden.shape[0] <= blocks_for(hidden).tokens_in_forward(vocab_size)


def _fake_forward(
    hidden: torch.Tensor, weight: torch.Tensor, *rest: Any
) -> tuple[torch.Tensor, ...]:
    vocab_size, with_entropy, for_backward = rest[3], rest[-2], rest[-1]
    keeps_logits = for_backward and _fits_one_block(hidden, vocab_size)
    kept = hidden.new_empty(hidden.shape[0] if keeps_logits else 0, weight.shape[0])
    numbers = new_numbers(hidden, hidden.shape[0], with_entropy, for_backward)
    return *numbers, kept


def _backward(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    needs: Sequence[bool],
    kept: torch.Tensor,
    vocab_size: int,
    vocab_start: int,
    *fields: Any,
) -> tuple[torch.Tensor, ...]:
    numbers = RowNumbers(*fields)
    need_hidden, need_weight, need_bias = needs
    gradients = new_gradients(hidden, weight, bias, needs)
    grad_hidden, grad_weight, grad_bias = gradients
    # Rows of padding have no logits, and zeros for a gradient.
    count = max(0, min(len(weight), vocab_size - vocab_start))
    grad_weight[count:] = 0
    grad_bias[count:] = 0
    if not (len(hidden) and count):
        return tuple(gradient.zero_() for gradient in gradients)

    blocks, dtype = blocks_for(hidden), product_dtype(hidden)
    at_once = min(len(hidden), blocks.tokens)
    all_columns = list(ranges(count, blocks.columns_in_backward(at_once)))
    all_rows = list(ranges(len(hidden), at_once))
    factors = hidden.to(dtype)
    sum_hidden = _new_sum(grad_hidden, dtype, len(all_columns))
    for columns in all_columns:
        w = weight[columns]
        b = None if bias is None else bias[columns]
        w_factors = w.to(dtype)
        sum_weight = _new_sum(grad_weight[columns], dtype, len(all_rows))
        sum_bias = numbers.lse.new_zeros(len(w))
        for rows in all_rows:
            logits = kept[rows, columns] if len(kept) else F.linear(hidden[rows], w, b)
            block = numbers.of_rows(rows)
            in_columns = block.targets - (vocab_start + columns.start)
            dz = logits_gradient(logits, block._replace(targets=in_columns), dtype)
            del logits
            if need_hidden:
                add_product(sum_hidden[rows], dz, w_factors, columns.start > 0)
            if need_weight:
                add_product(sum_weight, dz.t(), factors[rows], rows.start > 0)
            if need_bias:
                sum_bias += dz.sum(0, dtype=sum_bias.dtype)
            del dz
        if need_weight and sum_weight.dtype != grad_weight.dtype:
            grad_weight[columns] = sum_weight
        if need_bias:
            grad_bias[columns] = sum_bias
    return sum_hidden.to(hidden.dtype), grad_weight, grad_bias


def new_gradients(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    needs: Sequence[bool],
    *_: Any,
) -> tuple[torch.Tensor, ...]:
    """Contiguous, and empty where no gradient is needed."""
    sizes = (hidden.shape, weight.shape, () if bias is None else bias.shape)
    return tuple(
        hidden.new_empty(size if need else (0,)) for size, need in zip(sizes, needs)
    )


def _new_sum(result: torch.Tensor, dtype: torch.dtype, terms: int) -> torch.Tensor:
    """Where to add up matrix products: the result itself if that rounds once."""
    if terms == 1 and result.dtype == dtype:
        return result
    wide = _accumulation_dtype(dtype)
    return result if result.dtype == wide else torch.empty_like(result, dtype=wide)


def add_product(
    total: torch.Tensor, a: torch.Tensor, b: torch.Tensor, accumulate: bool
) -> None:
    """total = a @ b, or total += a @ b."""
    beta = 1 if accumulate else 0
    if total.dtype == a.dtype:
        total.addmm_(a, b, beta=beta)
    elif a.device.type == "cuda":
        torch.addmm(total, a, b, out_dtype=total.dtype, beta=beta, out=total)
    elif accumulate:
        total += a @ b
    else:
        total.copy_(a @ b)


def _setup_context(
    ctx: Any, inputs: tuple[Any, ...], output: tuple[torch.Tensor, ...]
) -> None:
    hidden, weight, bias, targets, temperature, vocab_size, vocab_start = inputs[:7]
    _, entropy, lse, kept = output
    ctx.save_for_backward(
        hidden, weight, bias, kept, targets, temperature, entropy, lse
    )
    ctx.vocabulary = vocab_size, vocab_start
    ctx.with_entropy = inputs[8]
    # The gradients of lse and of the kept logits are not wanted as zeros.
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(lse, kept)


def _differentiate(
    ctx: Any,
    grad: torch.Tensor | None,
    grad_entropy: torch.Tensor | None,
    *unused: None,
) -> tuple[torch.Tensor | None, ...]:
    hidden, weight, bias, kept, *saved = ctx.saved_tensors
    # AOTAutograd gives an empty gradient to the empty tensor of no entropy.
    grad_entropy = grad_entropy if ctx.with_entropy else None
    numbers = RowNumbers.of_gradients(saved, grad, grad_entropy)
    needs = ctx.needs_input_grad[:3]
    gradients = _token_logprobs_backward(
        hidden, weight, bias, needs, kept, *ctx.vocabulary, *numbers
    )
    used = [gradient if need else None for gradient, need in zip(gradients, needs)]
    return (*used, *[None] * 7)


_token_logprobs_backward = define_op(
    "token_logprobs_backward(Tensor hidden, Tensor weight, Tensor? bias, "
    "bool[3] needs, Tensor kept, int vocab_size, int vocab_start, "
    f"{ROWS_SCHEMA}) -> (Tensor, Tensor, Tensor)",
    fake=new_gradients,
    cpu=_backward,
    cuda=_backward,
    backward=refuse_second_derivative_of("token_logprobs", IN_PLAIN_TORCH),
)
token_logprobs_op = define_op(
    "token_logprobs(Tensor hidden, Tensor weight, Tensor? bias, Tensor targets, "
    "Tensor? temperature, int vocab_size, int vocab_start, str tp_group, "
    "bool with_entropy, bool for_backward) -> (Tensor, Tensor, Tensor, Tensor)",
    fake=_fake_forward,
    cpu=_forward,
    cuda=_forward,
    setup_context=_setup_context,
    backward=_differentiate,
    instead=IN_PLAIN_TORCH,
)
