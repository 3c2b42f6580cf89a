# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""The tensor layouts that attention accepts, and the lengths of packed sequences."""

from __future__ import annotations

from numbers import Integral

import torch


def packed_view(
    name: str, tensor: torch.Tensor, num_heads: int, head_size: int
) -> tuple[torch.Tensor, tuple[int, int] | None]:
    """View a tensor of any accepted layout as packed heads.

    Args:
        name: What the tensor is, for errors.
        tensor: One of

            - [num_tokens, num_heads * head_size]
            - [num_tokens, num_heads, head_size]
            - [batch, seq, num_heads * head_size]
            - [batch, seq, num_heads, head_size]

            A tensor of three dims whose last two are (num_heads, head_size) is
            packed; a batch of sequences of one head and one token is therefore
            given with four dims.
        num_heads: Heads of the tensor on this rank.
        head_size: Size of a head.

    Returns:
        The view, shape = [num_tokens, num_heads, head_size], and (batch, seq) where
        the layout is batched.

    Raises:
        ValueError: The shape is none of the above.
    """
    shape, heads = tuple(tensor.shape), (num_heads, head_size)
    if tensor.ndim == 2 and shape[1] == num_heads * head_size:
        return tensor.view(shape[0], *heads), None
    if tensor.ndim == 3 and shape[1:] == heads:
        return tensor, None
    if tensor.ndim == 3 and shape[2] == num_heads * head_size:
        return tensor.view(*shape[:2], *heads).flatten(0, 1), (shape[0], shape[1])
    if tensor.ndim == 4 and shape[2:] == heads:
        return tensor.flatten(0, 1), (shape[0], shape[1])
    raise ValueError(
        f"{name} of shape {shape} does not fit {num_heads} heads of size {head_size} "
        "on this rank; accepted are [num_tokens, num_heads * head_size], "
        "[num_tokens, num_heads, head_size], [batch, seq, num_heads * head_size] and "
        "[batch, seq, num_heads, head_size]."
    )


def sequence_bounds(
    num_tokens: int,
    batch_and_seq: tuple[int, int] | None,
    cu_seqlens: torch.Tensor | None,
    max_seqlen: int | None,
    device: torch.device,
) -> tuple[torch.Tensor, int | None]:
    """Where the sequences that a call consists of begin and end.

    Nothing is read from the device.

    Args:
        num_tokens: Tokens over all sequences.
        batch_and_seq: (batch, seq) of a batched call, else None.
        cu_seqlens: Cumulative lengths of a packed call; None: one sequence.
        max_seqlen: Upper bound of the lengths, if the caller knows one.
        device: Where the tokens are.

    Returns:
        cu_seqlens and max_seqlen as `ops.attention` takes them.

    Raises:
        ValueError: cu_seqlens of batched tensors, or a max_seqlen that a sequence
            exceeds.
    """
    if batch_and_seq is not None:
        if cu_seqlens is not None:
            raise ValueError(
                "cu_seqlens describe packed tokens, but the inputs are batched with "
                f"(batch, seq) = {batch_and_seq}. Leave cu_seqlens out, or flatten "
                "batch and seq into num_tokens."
            )
        batch, seq = batch_and_seq
    elif cu_seqlens is not None:
        return cu_seqlens, max_seqlen
    else:
        batch, seq = 1, num_tokens
    if max_seqlen is not None:
        check_max_seqlen(max_seqlen)
        _check_max_seqlen(max_seqlen, seq)
    if not seq:
        return torch.zeros(batch + 1, dtype=torch.int32, device=device), 0
    bounds = torch.arange(
        0, batch * seq + 1, seq, dtype=torch.int32, device=device
    )  # One kernel.
    return bounds, seq


def check_sequences(cu_seqlens: torch.Tensor, num_tokens: int, max_seqlen: int) -> None:
    """Check the values of cu_seqlens, which have to be on the CPU.

    Raises:
        ValueError: cu_seqlens that do not describe the tokens, or a max_seqlen that a
            sequence exceeds.
    """
    bounds = cu_seqlens.tolist()
    lengths = [stop - start for start, stop in zip(bounds, bounds[1:], strict=False)]
    if bounds[0] != 0 or bounds[-1] != num_tokens or min(lengths, default=0) < 0:
        raise ValueError(
            f"cu_seqlens={_shorten(bounds)} does not describe {num_tokens} tokens; it "
            f"must start at 0, never decrease and end at {num_tokens}."
        )
    _check_max_seqlen(max_seqlen, max(lengths, default=0))


def check_max_seqlen(max_seqlen: int) -> None:
    """Check that it is an integer of the host and a length.

    Raises:
        ValueError: It is not.
    """
    # Where shapes are dynamic it is a SymInt.
    valid = isinstance(max_seqlen, (Integral, torch.SymInt))
    if not valid or isinstance(max_seqlen, bool) or max_seqlen < 0:
        # To show a tensor would wait for its device.
        tensor = isinstance(max_seqlen, torch.Tensor)
        raise ValueError(
            f"max_seqlen={'a tensor' if tensor else repr(max_seqlen)} must be the "
            "longest length as an int, or None."
        )


def _check_max_seqlen(max_seqlen: int, longest: int) -> None:
    if longest > max_seqlen:
        raise ValueError(
            f"max_seqlen={max_seqlen}, but a sequence has {longest} tokens; give the "
            "length of the longest sequence, or leave it out."
        )


def _shorten(values: list[int]) -> str:
    if len(values) <= 12:
        return str(values)
    head, tail = (", ".join(map(str, part)) for part in (values[:6], values[-6:]))
    return f"[{head}, ..., {tail}]"
