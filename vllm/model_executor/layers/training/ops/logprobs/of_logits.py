# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""Log-probabilities of tokens and entropies, from logits that are there.

The gradient of the logits is that of `op`:

    dz = (g (onehot(t) - p) - e p (y + H)) / T

Kept for it are the logits, in their dtype, and one lse and H a row; fp32 rows exist a
few at a time.
"""

from __future__ import annotations

from typing import Any

import torch

from vllm.model_executor.determinism.log_softmax import (
    log_softmax,
    logprobs_at,
    tempered,
    uses_samplers_kernels,
)
from vllm.model_executor.layers.training.ops.logprobs.blocks import blocks_for, ranges
from vllm.model_executor.layers.training.ops.logprobs.logits_gradient import (
    ROWS_SCHEMA,
    RowNumbers,
    logits_gradient,
)
from vllm.model_executor.layers.training.ops.logprobs.reference import (
    entropy_reference,
)
from vllm.model_executor.layers.training.ops.logprobs.triton_kernels import (
    entropy_of_rows,
    lse_of_rows,
)
from vllm.model_executor.op_library import (
    define_op,
    has_kernel,
    refuse_second_derivative_of,
)

# What has the derivatives that the ops lack.
IN_PLAIN_TORCH = "take the targets' columns of full_logprobs, which is plain torch"


def score(
    logits: torch.Tensor,
    targets: torch.Tensor,
    temperature: torch.Tensor | None,
    with_entropy: bool,
    for_backward: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Logprobs of the targets, and what the backward takes; without a backward.

    Args:
        logits: shape = [num_tokens, vocab_size], floating point, rows contiguous.
        targets: int64, shape = [num_tokens]
        temperature: shape = [num_tokens]; None for 1.
        with_entropy: compute the entropies.
        for_backward: compute the logarithms of the rows' sums of exponentials.

    Returns:
        Logprobs, entropies and logarithms, each fp32 (fp64 for fp64 logits), shape =
        [num_tokens]; [0] what is not asked for.

    Raises:
        ValueError: on CPU, a target outside the vocabulary.
    """
    num_tokens, vocab_size = logits.shape
    _check_targets(targets, vocab_size)
    logprobs, entropy, lse = new_numbers(logits, num_tokens, with_entropy, for_backward)
    # The sampler's kernels give a token's logprob without those of the vocabulary.
    at_targets_only = uses_samplers_kernels(logits) and not with_entropy
    at_once = blocks_for(logits).log_softmax // vocab_size
    for rows in ranges(num_tokens, num_tokens if at_targets_only else at_once):
        divided = tempered(logits[rows], of_rows(temperature, rows))
        index = targets[rows].unsqueeze(1)
        if at_targets_only:
            logprobs[rows] = logprobs_at(divided, index).squeeze(1)
            if for_backward:
                lse[rows] = lse_of_rows(divided)
            continue
        of_vocab = log_softmax(divided)
        logprobs[rows] = of_vocab.gather(1, index).squeeze(1)
        if with_entropy:
            entropy[rows] = _entropy_of_rows(of_vocab)
        if for_backward:
            lse[rows] = _lse_of_rows(divided, of_vocab)
    return logprobs, entropy, lse


def new_numbers(
    like: torch.Tensor, num_tokens: int, with_entropy: bool, for_backward: bool
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Uninitialised results of `score`."""
    dtype = torch.promote_types(like.dtype, torch.float32)
    logprobs, entropy, lse = (
        like.new_empty(num_tokens if wanted else 0, dtype=dtype)
        for wanted in (True, with_entropy, for_backward)
    )
    return logprobs, entropy, lse


def of_rows(one_a_row: torch.Tensor | None, rows: slice) -> torch.Tensor | None:
    """Those of some rows, where there are any."""
    return None if one_a_row is None else one_a_row[rows]


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
    """On CUDA by an assertion of the device's, without a wait for it."""
    unknown = (targets < 0) | (targets >= vocab_size)
    if targets.device.type == "cuda":
        torch._assert_async(~unknown.any(), "token_logprobs: a target is no token id")
    elif unknown.any():
        raise ValueError(
            f"targets hold {int(targets[unknown][0])}; token ids are 0 to "
            f"{vocab_size - 1}. Leave out tokens without a target, such as padding, or "
            "give them any id and mask their logprobs."
        )


def _fake_score(
    logits: torch.Tensor,
    targets: torch.Tensor,
    temperature: torch.Tensor | None,
    with_entropy: bool,
    for_backward: bool,
) -> tuple[torch.Tensor, ...]:
    return new_numbers(logits, logits.shape[0], with_entropy, for_backward)


def _setup_context(
    ctx: Any, inputs: tuple[Any, ...], output: tuple[torch.Tensor, ...]
) -> None:
    logits, targets, temperature, ctx.with_entropy, _ = inputs
    _, entropy, lse = output
    ctx.save_for_backward(logits, targets, temperature, entropy, lse)
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(lse)


def _differentiate(
    ctx: Any,
    grad: torch.Tensor | None,
    grad_entropy: torch.Tensor | None,
    *unused: None,
) -> tuple[torch.Tensor | None, ...]:
    logits, *saved = ctx.saved_tensors
    # AOTAutograd gives an empty gradient to the empty tensor of no entropy.
    grad_entropy = grad_entropy if ctx.with_entropy else None
    numbers = RowNumbers.of_gradients(saved, grad, grad_entropy)
    return _logits_logprobs_backward(logits, *numbers), None, None, None, None


def _backward(logits: torch.Tensor, *fields: Any) -> torch.Tensor:
    numbers = RowNumbers(*fields)
    num_tokens, vocab_size = logits.shape
    gradient = logits.new_empty(num_tokens, vocab_size)
    for rows in ranges(num_tokens, blocks_for(logits).gradient // vocab_size):
        gradient[rows] = logits_gradient(
            logits[rows], numbers.of_rows(rows), logits.dtype
        )
    return gradient


def _fake_backward(logits: torch.Tensor, *_: Any) -> torch.Tensor:
    return logits.new_empty(logits.shape)


_logits_logprobs_backward = define_op(
    f"logits_logprobs_backward(Tensor logits, {ROWS_SCHEMA}) -> Tensor",
    fake=_fake_backward,
    cpu=_backward,
    cuda=_backward,
    backward=refuse_second_derivative_of("token_logprobs", IN_PLAIN_TORCH),
)
logits_logprobs_op = define_op(
    "logits_logprobs(Tensor logits, Tensor targets, Tensor? temperature, "
    "bool with_entropy, bool for_backward) -> (Tensor, Tensor, Tensor)",
    fake=_fake_score,
    cpu=score,
    cuda=score,
    setup_context=_setup_context,
    backward=_differentiate,
    instead=IN_PLAIN_TORCH,
)
