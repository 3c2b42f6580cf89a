# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""Attention of transformers' models, as an implementation that their configs name.

transformers looks up the function that computes attention, and the function that makes
its mask, under the name in `config._attn_implementation`. Three names are used:

- `IN_TRAINER`: the module's `AdoptedAttention` computes attention within each
  sequence. The mask function finds the sequences in padded and packed tokens.
- `IN_ENGINE`: the same without a mask function, because the engine knows which tokens
  form a request.
- `_RECORDER`, inside `recorded`: calls are recorded and nothing is computed. Its mask
  function returns what transformers says of the mask, since some models tell a window
  to the mask alone.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from vllm.model_executor.models.builder.adopt.attention import (
    IN_ENGINE,
    IN_TRAINER,
    AdoptedAttention,
    AttentionSite,
)

_RECORDER = "training_layers_recorder"

Record = Callable[[nn.Module, AttentionSite], AdoptedAttention | None]

_PAST_ONLY = (
    "The engine keeps keys and values of the past only; bidirectional attention cannot "
    "be served."
)
# What transformers' layers pass on to attention and no implementation computes with.
_WITHOUT_MEANING = {
    "cache_position",
    "cu_seq_lens_k",
    "cu_seq_lens_q",
    "max_length_k",
    "max_length_q",
    "num_items_in_batch",
    "output_attentions",
    "output_hidden_states",
    "output_router_logits",
    "past_key_value",
    "past_key_values",
    "position_ids",
    "return_dict",
    "use_cache",
}


def read_call(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: torch.Tensor | None = None,
    is_causal: bool | None = None,
    **others: Any,
) -> AttentionSite:
    """What a transformers module asks of attention, from the arguments of its call.

    Raises:
        ValueError: Something that cannot be trained and served, by name.
    """
    if is_causal is None:
        is_causal = getattr(module, "is_causal", True)
    if not is_causal:
        raise ValueError(f"attention is called with is_causal=False. {_PAST_ONLY}")
    if dropout and module.training:
        raise ValueError(
            f"attention is called with dropout={dropout} while training; no kernel "
            "has dropout. Set attention_dropout (or attn_pdrop) to 0 in the config."
        )
    unknown = [
        name
        for name, given in others.items()
        if name not in _WITHOUT_MEANING and given is not None and given is not False
    ]
    if unknown:
        raise ValueError(
            f"attention is called with {', '.join(sorted(unknown))}, which has no "
            "meaning for TrainableAttention."
        )
    sinks = None
    if s_aux is not None:
        names = [n for n, p in module._parameters.items() if p is s_aux]
        if not names:
            raise ValueError(
                "attention is called with sinks (s_aux) that are no parameter of the "
                "calling module."
            )
        (sinks,) = names
    return AttentionSite.of(
        query,
        key,
        value,
        scaling,
        sliding_window=sliding_window,
        logits_soft_cap=softcap,
        sinks=sinks,
    )


def adopted_attention(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    cu_seq_lens_q: torch.Tensor | None = None,
    max_length_q: int | None = None,
    **arguments: Any,
) -> tuple[torch.Tensor, None]:
    """Attention as transformers' modules call it.

    Args:
        module: The calling module, which `adopt` gave an `AdoptedAttention`.
        query: shape = [batch, num_heads, seq, head_size].
        key: shape = [batch, num_kv_heads, seq, head_size].
        value: shape = [batch, num_kv_heads, seq, value_size].
        attention_mask: What `sequence_starts` returned.
        cu_seq_lens_q: Where packed sequences begin and end; one row of tokens.
        max_length_q: Length of the longest.
        **arguments: See `read_call`.

    Returns:
        shape = [batch, seq, num_heads, value_size], and no attention weights.

    Raises:
        ValueError: It asks for something else than when it was adopted, or for
            something that cannot be computed.
    """
    layer = getattr(module, "trainable_attention", None)
    if not isinstance(layer, AdoptedAttention):
        raise ValueError(
            f"{type(module).__name__} calls attention and was not adopted: its forward "
            "did not reach this call when the model was. Adopt the whole model."
        )
    site = read_call(module, query, key, value, **arguments)
    if site.sliding_window is None:  # which the mask alone may say
        site = site._replace(sliding_window=layer.site.sliding_window)
    if site != layer.site:
        raise ValueError(
            f"{type(module).__name__} calls attention with {site}; when the model was "
            f"adopted it was {layer.site}. Each call has to ask for the same."
        )
    cu_seqlens = cu_seq_lens_q
    if cu_seqlens is not None and query.shape[0] != 1:
        raise ValueError(
            f"cu_seq_lens_q is for one row of packed tokens, not {query.shape[0]}."
        )
    if attention_mask is None:
        pass
    elif torch.compiler.is_compiling() and attention_mask.shape == (
        query.shape[0],
        query.shape[2],
    ):
        if cu_seqlens is None:
            _assert_one_sequence_a_row(attention_mask)
    else:
        if attention_mask.ndim != 1 or attention_mask.dtype != torch.int32:
            raise ValueError(
                f"attention got a mask of shape {tuple(attention_mask.shape)}. Give "
                "the model a mask of shape [batch, seq], or position_ids that begin "
                "again at each packed sequence."
            )
        if layer.is_in_engine:
            raise ValueError(
                "attention got a mask in the engine, where the engine alone says "
                "which tokens form a request."
            )
        cu_seqlens = attention_mask
    return layer.attend(query, key, value, cu_seqlens, max_length_q), None


def _assert_one_sequence_a_row(starts: torch.Tensor) -> None:
    torch._assert_async(
        ~starts[:, 1:].any(),
        "Under torch.compile, packed sequences and padding need cu_seq_lens_q and "
        "max_length_q: the number of sequences is not known when a model is compiled.",
    )


def sequence_starts(
    batch_size: int,
    q_length: int,
    kv_length: int,
    mask_function: Callable[..., torch.Tensor],
    q_offset: int = 0,
    attention_mask: torch.Tensor | None = None,
    allow_is_causal_skip: bool = True,
    device: torch.device | None = None,
    **_: Any,
) -> torch.Tensor | None:
    """The sequences that a mask tells apart, in place of the mask.

    A token that does not see the one before it begins a sequence. So padded rows
    consist of a sequence of tokens and one of padding, which no token sees.

    Args:
        batch_size: Rows.
        q_length: Tokens of a row that attend.
        kv_length: Tokens of a row that are seen; the same.
        mask_function: Says whether a token sees another, for indices
            (row, head, token, other token) that are broadcast against each other.
        q_offset: Place of the first token that attends; 0.
        attention_mask: Which tokens are no padding, shape = [batch_size, kv_length].
        allow_is_causal_skip: The mask function is that of causal attention, or a
            window of it, and nothing else.
        device: Where the tokens are.

    Returns:
        cu_seqlens over the rows one after another, torch.int32; None if each row is
        one sequence. While torch.compile traces, which does not know their number:
        whether a sequence begins at a token, torch.bool, shape = [batch_size,
        q_length].

    Raises:
        ValueError: The mask is not causal within sequences, or padding lies between
            the tokens of a row.
    """
    if q_length != kv_length or not _is_zero(q_offset):
        raise ValueError(
            f"{q_length} tokens attend to {kv_length}. An adopted model computes whole "
            "sequences: call it with use_cache=False, and generate with the engine."
        )
    if attention_mask is None and allow_is_causal_skip:
        return None
    rows = torch.arange(batch_size, device=device)[:, None]
    tokens = torch.arange(q_length, device=device)[None]
    before = torch.cat([tokens[:, :1], tokens[:, :-1]], 1)
    after = torch.cat([tokens[:, 1:], tokens[:, -1:]], 1)

    is_token = torch.ones(batch_size, q_length, dtype=torch.bool, device=device)
    if attention_mask is not None:
        is_token = attention_mask.bool()

    def sees(token: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
        return mask_function(rows, 0, token, other) & is_token[rows, other]

    starts = ~sees(tokens, before) | (tokens == 0)
    changes = is_token[:, 1:] != is_token[:, :-1]
    starts[:, 1:] |= changes
    is_wrong = sees(tokens, after) & (after > tokens)
    if torch.compiler.is_compiling():
        torch._assert_async(~(is_wrong & is_token).any(), _NOT_CAUSAL)
        return starts
    first = torch.where(starts, tokens, 0).cummax(1).values
    is_wrong |= sees(tokens, (first - 1).clamp(min=0)) & (first > 0)
    is_wrong &= is_token
    # The tokens of a row are one run, in the first column or after padding.
    runs = (changes & is_token[:, 1:]).sum(1) + is_token[:, 0].long()
    is_wrong |= (runs > 1)[:, None]
    if bool(is_wrong.any()):
        raise ValueError(_NOT_CAUSAL)
    bounds = starts.flatten().nonzero().flatten()
    end = bounds.new_tensor([batch_size * q_length])
    return torch.cat([bounds, end]).to(torch.int32)


_NOT_CAUSAL = (
    "The mask is not causal attention within sequences: a token sees a later one, or "
    "one of another sequence, or padding lies between the tokens of a row. Only "
    "padding at the ends of a row and packed sequences can be trained."
)


def _is_zero(offset: Any) -> bool:
    return bool(offset == 0)


def describe_mask(
    local_size: int | None = None,
    config: Any = None,
    use_vmap: bool = False,
    allow_is_bidirectional_skip: bool | None = None,
    **_: Any,
) -> torch.Tensor | None:
    """What transformers says of a mask that it would make.

    Args:
        local_size: Size of the window, or of the chunks.
        config: The model's, which names that size.
        use_vmap: The model gives a function of its own for the mask.
        allow_is_bidirectional_skip: Given for a mask that is not causal.

    Returns:
        None for causal attention; else a tensor of shape [0, window], with 0 for a mask
        that is not causal.

    Raises:
        ValueError: The mask is neither causal nor a window.
    """
    if use_vmap:
        raise ValueError(
            "The model adds a function of its own to the causal mask. Only causal "
            "attention and windows of it can be served."
        )
    if allow_is_bidirectional_skip is not None:
        return torch.empty(0, 0)
    if local_size is None:
        return None
    if local_size == getattr(config, "attention_chunk_size", None):
        raise ValueError(
            f"Attention is computed in chunks of {local_size} tokens "
            "(attention_chunk_size), for which there is no kernel. For sequences of no "
            "more tokens, make all layers full attention in the config (layer_types)."
        )
    return torch.empty(0, local_size)


def _with_window(site: AttentionSite, mask: torch.Tensor | None) -> AttentionSite:
    """The call, with the window that its mask has.

    Args:
        site: What the call itself asks for.
        mask: What `describe_mask` returned.

    Raises:
        ValueError: The call and the mask differ, or the mask is one that the model made
            itself.
    """
    if mask is None:
        window = None
    elif mask.ndim == 2 and mask.shape[0] == 0:
        window = mask.shape[1]
    else:
        raise ValueError(
            f"attention is called with a mask of shape {tuple(mask.shape)} that the "
            "model makes itself. Only masks of transformers' functions are known."
        )
    if window == 0:
        raise ValueError(
            f"attention is called with a mask that is not causal. {_PAST_ONLY}"
        )
    if site.sliding_window not in (None, window):
        raise ValueError(
            f"attention is called with sliding_window={site.sliding_window} and with a "
            f"mask of {'all tokens' if window is None else f'a window of {window}'}. "
            "Both have to agree."
        )
    return site._replace(sliding_window=window)


@contextmanager
def recorded(model: PreTrainedModel, record: Record) -> Iterator[None]:
    """Record inside what modules ask of attention, and compute nothing.

    Args:
        model: Its attention implementation is restored after.
        record: Called with the module and the call.
    """

    def recorder(
        module: nn.Module,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        **arguments: Any,
    ) -> tuple[torch.Tensor, None]:
        site = read_call(module, query, key, value, **arguments)
        record(module, _with_window(site, attention_mask))
        batch, num_heads, seq, _ = query.shape
        return value.new_zeros(batch, seq, num_heads, value.shape[-1]), None

    before = model.config._attn_implementation
    ALL_ATTENTION_FUNCTIONS.register(_RECORDER, recorder)
    ALL_MASK_ATTENTION_FUNCTIONS.register(_RECORDER, describe_mask)
    try:
        model.set_attn_implementation(_RECORDER)
        yield
    finally:
        model.set_attn_implementation(before)


def use_training_layers(model: PreTrainedModel) -> None:
    """Let a model compute attention by its `AdoptedAttention` layers."""
    model.set_attn_implementation(IN_TRAINER)


for _name in (IN_TRAINER, IN_ENGINE):
    ALL_ATTENTION_FUNCTIONS.register(_name, adopted_attention)
ALL_MASK_ATTENTION_FUNCTIONS.register(IN_TRAINER, sequence_starts)
