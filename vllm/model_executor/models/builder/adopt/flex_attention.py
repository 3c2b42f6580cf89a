# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""Calls of torch's `flex_attention`.

It takes functions: of a score, and of the places of a query and a key. What they
compute is found by calling them on numbers. Accepted are the scores themselves and
`cap * tanh(score / cap)`; and masks of a key that is not later, within a window, within
the same sequence of packed tokens.

When a model is adopted, a mask may use nothing but the places, so that it can be asked
about places far apart: in the engine no mask is computed.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any
from unittest.mock import patch

import torch
from torch._subclasses.fake_tensor import unset_fake_temporarily
from torch.nn.attention import flex_attention as torchs
from torch.utils.weak import WeakIdKeyDictionary

from vllm.model_executor.models.builder.adopt.attention import AttentionSite
from vllm.model_executor.models.builder.adopt.masks import causal

# What `flex_attention` calls, also where a caller has compiled it.
OPERATOR = torch.ops.higher_order.flex_attention

_NEAR, _FAR = 256, 1 << 20
# By function of a score, its cap; by a tensor of a BlockMask, and by what it was
# checked for, the bounds of sequences.
_CAPS: weakref.WeakKeyDictionary[Callable[..., Any], float | None]
_CAPS = weakref.WeakKeyDictionary()
_BOUNDS = WeakIdKeyDictionary()


def read_call(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    score_mod: Callable[..., torch.Tensor],
    block_mask: Sequence[Any],
    scale: float,
    *_: Any,
) -> AttentionSite:
    """What a call of the operator asks for.

    Raises:
        ValueError: Something that cannot be trained and served, by name.
    """
    site = AttentionSite.of(query, key, value, scale, is_flex=True)
    heads = (0, site.num_heads - 1)
    with unset_fake_temporarily(), torch.device("cpu"), torch._C.DisableTorchFunction():
        return site._replace(
            logits_soft_cap=_cap(score_mod, heads),
            sliding_window=_window(block_mask[-1], site.num_heads),
        )


def same_site(site: AttentionSite, adopted: AttentionSite) -> bool:
    """Whether a call has the sizes of one that was adopted."""
    found = {
        name: getattr(adopted, name) for name in ("logits_soft_cap", "sliding_window")
    }
    return site._replace(**found) == adopted


def bounds_of(
    site: AttentionSite,
    query: torch.Tensor,
    score_mod: Callable[..., torch.Tensor],
    block_mask: Sequence[Any],
) -> torch.Tensor | None:
    """Check a call in a trainer; where sequences begin and end, if there are several.

    Args:
        site: What the adopted layer computes.
        query: shape = [batch, num_heads, seq, head_size].
        score_mod: The call's.
        block_mask: The call's. It is read once for each form of call.

    Returns:
        torch.int32, shape = [num_seqs + 1]; None: each row is one sequence.

    Raises:
        ValueError: The call asks for something else.
    """
    batch, num_heads, seq, _ = query.shape
    if torch.compiler.is_compiling():
        mask = _mask(block_mask[-1], batch, num_heads, seq, query.device)
        # Inductor has no comparison of the truth values of places.
        wrong = mask ^ causal(seq, site.sliding_window, query.device)
        torch._assert_async(wrong.sum() == 0, _NOT_CAUSAL)
        return None
    with torch.device(query.device):
        if _cap(score_mod, (0, num_heads - 1)) != site.logits_soft_cap:
            raise ValueError(_OTHER_SCORES)
    mask_mod, window = block_mask[-1], site.sliding_window
    checked = _BOUNDS.setdefault(block_mask[2], {})
    call = mask_mod, window, batch, num_heads, seq
    if call not in checked:
        mask = _mask(mask_mod, batch, num_heads, seq, query.device)
        checked[call] = _bounds(mask, window, batch)
    return checked[call]


@contextmanager
def _uncompiled() -> Iterator[None]:
    """torch would compile it for each module, and has no backward on CPU."""
    with (
        torch.compiler.set_stance("force_eager"),
        patch.object(torchs, "_FLEX_ATTENTION_DISABLE_COMPILE_DEBUG", True),
        patch.object(torchs, "_validate_device", lambda *_: None),
    ):
        yield


def without_compiler() -> AbstractContextManager[None]:
    """Where calls are taken over, unless the calling module is being compiled."""
    return nullcontext() if torch.compiler.is_compiling() else _uncompiled()


def _cap(score_mod: Callable[..., torch.Tensor], heads: Sequence[int]) -> float | None:
    """The soft cap that a function of a score computes; None: it returns the score."""
    if score_mod not in _CAPS:
        _CAPS[score_mod] = _find_cap(score_mod, heads)
    return _CAPS[score_mod]


def _find_cap(
    score_mod: Callable[..., torch.Tensor], heads: Sequence[int]
) -> float | None:
    scores = torch.linspace(-200, 200, 401)[:, None, None]
    places = torch.tensor([0, 1, 2, 97, _FAR])
    row = torch.tensor(0)
    caps: set[float | None] = set()
    for head in heads:
        number = torch.tensor(head)
        try:
            found = [
                score_mod(each, row, number, places[:, None], places)
                for each in (scores, torch.full((1, 1, 1), 1e9))
            ]
        except Exception as error:
            raise ValueError(f"{_OTHER_SCORES} ({error})") from error
        if torch.equal(found[0].expand(401, 5, 5), scores.expand(401, 5, 5)):
            caps.add(None)
            continue
        cap = float(found[1].flatten()[0])
        capped = cap * torch.tanh(scores / cap)
        if not torch.allclose(found[0], capped.expand_as(found[0]), 1e-4, 1e-5):
            raise ValueError(_OTHER_SCORES)
        caps.add(cap)
    if len(caps) > 1:
        raise ValueError(_OTHER_SCORES)
    return caps.pop()


def _window(mask_mod: Callable[..., torch.Tensor], num_heads: int) -> int | None:
    """How far a mask of the places alone sees; None: to the beginning."""
    try:
        near = _mask(mask_mod, 1, num_heads, _NEAR, torch.device("cpu"))
        row, place = torch.tensor(0), torch.tensor(_FAR)
        keys = torch.arange(_FAR + 1)
        far = [
            mask_mod(row, torch.tensor(head), place, keys).expand(_FAR + 1)
            for head in (0, num_heads - 1)
        ]
    except Exception as error:
        raise ValueError(
            "flex_attention is called with a mask that uses more than the places of "
            f"query and key ({type(error).__name__}: {error}). When a model is "
            "adopted, and in an engine, the mask has to be one of the places alone, "
            "such as q_idx >= kv_idx. In a trainer it may also keep packed sequences "
            "apart."
        ) from error
    count = int(far[0].sum())
    window = None if count > _FAR else count
    expected = causal(_NEAR, window, torch.device("cpu"))
    in_window = keys > _FAR - count
    if not (near == expected).all() or not all((x == in_window).all() for x in far):
        raise ValueError(_NOT_CAUSAL)
    return window


def _mask(
    mask_mod: Callable[..., torch.Tensor],
    batch: int,
    num_heads: int,
    seq: int,
    device: torch.device,
) -> torch.Tensor:
    """What each query sees, shape = [batch or 1, num_heads or 1, seq, seq]."""
    rows = torch.arange(batch, device=device)[:, None, None, None]
    heads = torch.arange(num_heads, device=device)[:, None, None]
    places = torch.arange(seq, device=device)
    mask = mask_mod(rows, heads, places[:, None], places)
    shape = torch.broadcast_shapes(mask.shape, (1, 1, seq, seq))
    return mask.bool().expand(shape)


def _bounds(mask: torch.Tensor, window: int | None, batch: int) -> torch.Tensor | None:
    """Bounds of the sequences that a mask keeps apart."""
    seq = mask.shape[-1]
    places = torch.arange(seq, device=mask.device)
    starts = torch.ones_like(mask[:, 0, 0])
    starts[:, 1:] = ~mask[:, 0].diagonal(-1, 1, 2)
    first = torch.where(starts, places, 0).cummax(1).values
    expected = causal(seq, window, mask.device) & (places >= first[:, :, None])
    if not bool((mask == expected[:, None]).all()):
        raise ValueError(_NOT_CAUSAL)
    if window == 1 or not bool(starts[:, 1:].any()):
        return None
    begins = starts.expand(batch, seq).flatten().nonzero().flatten()
    return torch.cat([begins, begins.new_tensor([batch * seq])]).to(torch.int32)


_NOT_CAUSAL = (
    "flex_attention is called with a mask that is not causal attention, within a "
    "window and within sequences. Padding, prefixes and other masks cannot be served. "
    "A window has to be the one of when the model was adopted."
)
_OTHER_SCORES = (
    "flex_attention is called with a score_mod that is neither the score itself nor "
    "cap * tanh(score / cap), with the cap of when the model was adopted. Position "
    "biases and other functions cannot be served."
)
