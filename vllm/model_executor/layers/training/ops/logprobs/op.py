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

from typing import Any

import torch
import torch.nn.functional as F
from torch.distributed.distributed_c10d import _resolve_process_group

from vllm.model_executor.layers.training.communication import all_gather
from vllm.model_executor.layers.training.ops.library import (
    define_op,
    has_kernel,
    refuse_second_derivative,
)
from vllm.model_executor.layers.training.ops.linear.op import linear
from vllm.model_executor.layers.training.ops.logprobs.blocks import Blocks, ranges
from vllm.model_executor.layers.training.ops.logprobs.log_softmax import (
    log_softmax,
    logprobs_at,
    tempered,
    uses_samplers_kernels,
)
from vllm.model_executor.layers.training.ops.logprobs.logits_gradient import (
    logits_gradient,
)
from vllm.model_executor.layers.training.ops.logprobs.reference import (
    entropy_reference,
)
from vllm.model_executor.layers.training.ops.logprobs.triton_kernels import (
    entropy_of_rows,
    lse_of_rows,
)

# CPU: products of a few MiB are efficient, and what passes between elementwise steps
# stays in the cache. CUDA: large products; 192 MiB of bf16 logits.
CPU_BLOCKS = Blocks(1 << 24, 1 << 19, 1 << 22, 2048, 16)
CUDA_BLOCKS = Blocks(3 << 25, 1 << 25, 1 << 26, 8192, 256)


def _blocks(tensor: torch.Tensor) -> Blocks:
    return CUDA_BLOCKS if tensor.device.type == "cuda" else CPU_BLOCKS


def _accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)


def _product_dtype(hidden: torch.Tensor) -> torch.dtype:
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


def _gather_vocab(logits: torch.Tensor, tp_group: str) -> torch.Tensor:
    """The ranks' columns side by side."""
    if not tp_group:
        return logits
    group = _resolve_process_group(tp_group)  # type: ignore[arg-type]
    return all_gather(logits, group, -1)


def _entropy_of_rows(logprobs: torch.Tensor) -> torch.Tensor:
    if logprobs.device.type == "cuda" and has_kernel(logprobs):
        return entropy_of_rows(logprobs)
    return entropy_reference(logprobs)


def _lse_of_rows(logits: torch.Tensor, logprobs: torch.Tensor) -> torch.Tensor:
    if logits.device.type == "cuda" and has_kernel(logits):
        return lse_of_rows(logits)
    # From the most likely token, whose log-probability is never -inf.
    return logits.amax(1) - logprobs.amax(1)


def _check_targets(targets: torch.Tensor, vocab_size: int) -> None:
    """On CPU; on CUDA torch's gather asserts it, without a wait for the device."""
    if targets.device.type != "cpu" or not targets.numel():
        return
    low, high = targets.min().item(), targets.max().item()
    if low < 0 or high >= vocab_size:
        raise ValueError(
            f"targets go from {low} to {high}; token ids are 0 to {vocab_size - 1}. "
            "Leave out tokens without a target."
        )


def _forward(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    targets: torch.Tensor,
    temperature: float,
    vocab_size: int,
    vocab_start: int,
    tp_group: str,
    with_entropy: bool,
    for_backward: bool,
) -> tuple[torch.Tensor, ...]:
    _check_targets(targets, vocab_size)
    logprobs, entropy, lse = _new_numbers(hidden, with_entropy, for_backward)
    keeps_logits = for_backward and _fits_one_block(hidden, vocab_size)
    kept = hidden.new_empty(0, len(weight))
    blocks = _blocks(hidden)
    # The sampler's kernels give a token's logprob without those of the vocabulary.
    at_targets_only = uses_samplers_kernels(hidden) and not with_entropy
    for rows in ranges(len(hidden), blocks.tokens_in_forward(vocab_size)):
        local = linear(hidden[rows], weight, bias)
        if keeps_logits:
            kept = local
        all_logits = _gather_vocab(local, tp_group)[:, :vocab_size]
        at_once = len(local) if at_targets_only else blocks.log_softmax // vocab_size
        for some in ranges(len(local), at_once):
            logits = tempered(all_logits[some], temperature)
            here = slice(rows.start + some.start, rows.start + some.stop)
            index = targets[here].unsqueeze(1)
            if at_targets_only:
                logprobs[here] = logprobs_at(logits, index).squeeze(1)
                if for_backward:
                    lse[here] = lse_of_rows(logits)
                continue
            of_vocab = log_softmax(logits)
            logprobs[here] = of_vocab.gather(1, index).squeeze(1)
            if with_entropy:
                entropy[here] = _entropy_of_rows(of_vocab)
            if for_backward:
                lse[here] = _lse_of_rows(logits, of_vocab)
    return logprobs, entropy, lse, kept


def _new_numbers(
    hidden: torch.Tensor, with_entropy: bool, for_backward: bool
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """One a token: logprobs, and entropy and lse or empty tensors."""
    num_tokens, dtype = hidden.shape[0], _accumulation_dtype(hidden.dtype)
    logprobs, entropy, lse = (
        hidden.new_empty(num_tokens if wanted else 0, dtype=dtype)
        for wanted in (True, with_entropy, for_backward)
    )
    return logprobs, entropy, lse


def _fits_one_block(hidden: torch.Tensor, vocab_size: int) -> bool:
    return hidden.shape[0] <= _blocks(hidden).tokens_in_forward(vocab_size)


def _fake_forward(
    hidden: torch.Tensor, weight: torch.Tensor, *rest: Any
) -> tuple[torch.Tensor, ...]:
    vocab_size, with_entropy, for_backward = rest[3], rest[-2], rest[-1]
    keeps_logits = for_backward and _fits_one_block(hidden, vocab_size)
    kept = hidden.new_empty(hidden.shape[0] if keeps_logits else 0, weight.shape[0])
    return *_new_numbers(hidden, with_entropy, for_backward), kept


def _backward(
    grad: torch.Tensor,
    grad_entropy: torch.Tensor | None,
    hidden: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    targets: torch.Tensor,
    entropy: torch.Tensor,
    lse: torch.Tensor,
    kept: torch.Tensor,
    temperature: float,
    vocab_size: int,
    vocab_start: int,
    need_hidden: bool,
    need_weight: bool,
    need_bias: bool,
) -> tuple[torch.Tensor, ...]:
    gradients = _new_gradients(
        hidden, weight, bias, need_hidden, need_weight, need_bias
    )
    grad_hidden, grad_weight, grad_bias = gradients
    # Rows of padding have no logits, and zeros for a gradient.
    count = max(0, min(len(weight), vocab_size - vocab_start))
    grad_weight[count:] = 0
    grad_bias[count:] = 0
    if not (len(hidden) and count):
        return tuple(gradient.zero_() for gradient in gradients)

    blocks, dtype = _blocks(hidden), _product_dtype(hidden)
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
        sum_bias = lse.new_zeros(len(w))
        for rows in all_rows:
            logits = kept[rows, columns] if len(kept) else F.linear(hidden[rows], w, b)
            dz = logits_gradient(
                logits,
                lse[rows],
                targets[rows] - (vocab_start + columns.start),
                grad[rows],
                None if grad_entropy is None else entropy[rows],
                None if grad_entropy is None else grad_entropy[rows],
                temperature,
                dtype,
            )
            del logits
            if need_hidden:
                _add_product(sum_hidden[rows], dz, w_factors, columns.start > 0)
            if need_weight:
                _add_product(sum_weight, dz.t(), factors[rows], rows.start > 0)
            if need_bias:
                sum_bias += dz.sum(0, dtype=lse.dtype)
            del dz
        if need_weight and sum_weight.dtype != grad_weight.dtype:
            grad_weight[columns] = sum_weight
        if need_bias:
            grad_bias[columns] = sum_bias
    return sum_hidden.to(hidden.dtype), grad_weight, grad_bias


def _new_gradients(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    need_hidden: bool,
    need_weight: bool,
    need_bias: bool,
) -> tuple[torch.Tensor, ...]:
    """Contiguous, and empty where no gradient is needed."""
    sizes = (hidden.shape, weight.shape, () if bias is None else bias.shape)
    needs = (need_hidden, need_weight, need_bias)
    return tuple(
        hidden.new_empty(size if need else (0,)) for size, need in zip(sizes, needs)
    )


def _new_sum(result: torch.Tensor, dtype: torch.dtype, terms: int) -> torch.Tensor:
    """Where to add up matrix products: the result itself if that rounds once."""
    if terms == 1 and result.dtype == dtype:
        return result
    wide = _accumulation_dtype(dtype)
    return result if result.dtype == wide else torch.empty_like(result, dtype=wide)


def _add_product(
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


def _fake_backward(
    grad: torch.Tensor,
    grad_entropy: torch.Tensor | None,
    hidden: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    *rest: Any,
) -> tuple[torch.Tensor, ...]:
    return _new_gradients(hidden, weight, bias, *rest[-3:])


def _setup_context(
    ctx: Any, inputs: tuple[Any, ...], output: tuple[torch.Tensor, ...]
) -> None:
    hidden, weight, bias, targets, temperature, vocab_size, vocab_start = inputs[:7]
    _, entropy, lse, kept = output
    ctx.save_for_backward(hidden, weight, bias, targets, entropy, lse, kept)
    ctx.numbers = temperature, vocab_size, vocab_start
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
    *saved, entropy, lse, kept = ctx.saved_tensors
    temperature = ctx.numbers[0]
    grad = torch.zeros_like(lse) if grad is None else grad / temperature
    if grad_entropy is not None and ctx.with_entropy:
        grad_entropy = (grad_entropy / temperature).contiguous()
    else:
        # AOTAutograd gives an empty gradient to the empty tensor of no entropy.
        grad_entropy = None
    needs = ctx.needs_input_grad[:3]
    gradients = _token_logprobs_backward(
        grad.contiguous(),
        grad_entropy,
        *saved,
        entropy,
        lse,
        kept,
        *ctx.numbers,
        *needs,
    )
    used = [gradient if need else None for gradient, need in zip(gradients, needs)]
    return (*used, *[None] * 7)


_token_logprobs_backward = define_op(
    "token_logprobs_backward(Tensor grad, Tensor? grad_entropy, Tensor hidden, "
    "Tensor weight, Tensor? bias, Tensor targets, Tensor entropy, Tensor lse, "
    "Tensor kept, float temperature, int vocab_size, int vocab_start, "
    "bool need_hidden, bool need_weight, bool need_bias) -> (Tensor, Tensor, Tensor)",
    fake=_fake_backward,
    cpu=_backward,
    cuda=_backward,
    backward=refuse_second_derivative,
)
token_logprobs_op = define_op(
    "token_logprobs(Tensor hidden, Tensor weight, Tensor? bias, Tensor targets, "
    "float temperature, int vocab_size, int vocab_start, str tp_group, "
    "bool with_entropy, bool for_backward) -> (Tensor, Tensor, Tensor, Tensor)",
    fake=_fake_forward,
    cpu=_forward,
    cuda=_forward,
    setup_context=_setup_context,
    backward=_differentiate,
)
