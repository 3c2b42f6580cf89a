# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""Attention of plain PyTorch modules, in calls of torch's functions."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.overrides import TorchFunctionMode

from vllm.model_executor.models.builder.adopt import flex_attention, written_attention
from vllm.model_executor.models.builder.adopt.attention import (
    AdoptedAttention,
    AttentionSite,
)
from vllm.model_executor.models.builder.adopt.masks import (
    HIDDEN,
    MOST_IN_TRAINER,
    NOT_CAUSAL,
    causal,
)
from vllm.model_executor.models.builder.adopt.written_attention import Scores


def site_name(index: int) -> str:
    """The submodule that stands for a module's call number `index` of attention."""
    return "trainable_attention" + (f"_{index}" if index else "")


def is_attention(func: Any) -> bool:
    """Whether it is torch's attention, or what `flex_attention` calls."""
    return func is F.scaled_dot_product_attention or _is_flex(func)


def _is_flex(func: Any) -> bool:
    return func is flex_attention.OPERATOR


def read_call(
    func: Any, args: Any, kwargs: Any
) -> tuple[AttentionSite, torch.Tensor | None]:
    """What a call of attention asks for, and its mask if that is a tensor.

    Raises:
        ValueError: Something that cannot be trained and served, by name.
    """
    if _is_flex(func):
        return flex_attention.read_call(*args, **kwargs), None
    return _read_call(*args, **kwargs)


def result(func: Any, output: torch.Tensor) -> Any:
    """What a call returns; `flex_attention` without statistics of its scores."""
    if not _is_flex(func):
        return output
    return output, output.new_empty(0), output.new_empty(0)


def _read_call(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attn_mask: torch.Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> tuple[AttentionSite, torch.Tensor | None]:
    """What a call of `scaled_dot_product_attention` asks for, and its mask."""
    if dropout_p:
        raise ValueError(
            f"attention is called with dropout_p={dropout_p}; no kernel has dropout. "
            "Set it to 0 while training too."
        )
    # A forward of several tokens has shown whether a call is causal.
    if not is_causal and attn_mask is None and query.shape[-2] != 1:
        raise ValueError(
            "attention is called with is_causal=False and without a mask. The engine "
            "keeps keys and values of the past only; bidirectional attention cannot "
            "be served."
        )
    return AttentionSite.of(query, key, value, scale, is_torchs=True), attn_mask


class AttentionCalls(TorchFunctionMode):
    """Takes over a module's calls of attention, one after another.

    Args:
        module: Holds an `AdoptedAttention` for each call.
    """

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module
        self.calls = 0
        self.scores: Scores | None = None

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        if getattr(func, "__name__", "") == "unflatten":
            return torch.unflatten(*args, **kwargs)  # Dynamo cannot call the method
        if not is_attention(func):
            return self._written(func, args, kwargs)
        layer = getattr(self.module, site_name(self.calls), None)
        self.calls += 1
        attend = _attend_flex if _is_flex(func) else _attend
        return result(func, attend(self.module, layer, args, kwargs))

    def _written(self, func: Any, args: Any, kwargs: Any) -> Any:
        """A function that may belong to attention that is written out."""
        layer = getattr(self.module, site_name(self.calls), None)
        if not isinstance(layer, AdoptedAttention) or layer.site.written is None:
            return func(*args, **kwargs)
        scores = self.scores
        if scores is None:
            query = args[0] if written_attention.starts(func, args) else None
            sizes = layer.site.num_heads, layer.site.head_size
            if query is None or (query.shape[1], query.shape[3]) != sizes:
                return func(*args, **kwargs)
            value_of = _no_value if layer.is_in_engine else _own_value
            self.scores = Scores(args[0], args[1], value_of)
            return self.scores.stand_in
        if scores.are_multiplied(func, args):
            self.calls += 1
            self.scores = None
            return _attend_written(self.module, layer, scores, args[1])
        if scores.are_in((args, kwargs)):
            return scores.apply(func, args, kwargs)
        return func(*args, **kwargs)

    def finish(self) -> None:
        """The module's forward has ended.

        Raises:
            ValueError: Scores were not used as when the model was adopted, or it made
                fewer calls.
        """
        if self.scores is not None:
            raise ValueError(UNFINISHED)
        layer = getattr(self.module, site_name(self.calls), None)
        if isinstance(layer, AdoptedAttention) and _is_taken_over(layer.site):
            raise ValueError(
                f"{type(self.module).__name__} makes {self.calls} calls of attention; "
                "when the model was adopted it made more. Each forward has to make the "
                "same calls, also for a single token."
            )


def _is_taken_over(site: AttentionSite) -> bool:
    """Whether it is a call of torch's functions, not of transformers' interface."""
    return site.is_torchs or site.is_flex or site.written is not None


def _own_value(tensor: torch.Tensor) -> torch.Tensor | None:
    return tensor


def _no_value(tensor: torch.Tensor) -> torch.Tensor | None:
    return None


UNFINISHED = (
    "attention that is written out does something else with its scores than multiply "
    "the values. Call scaled_dot_product_attention or flex_attention."
)


def _attend(
    module: nn.Module, layer: nn.Module | None, args: Any, kwargs: Any
) -> torch.Tensor:
    """Compute one call, shape = [batch, num_heads, seq, value_size]."""
    site, mask = _read_call(*args, **kwargs)
    query, key, value = (*args, *(kwargs[n] for n in _NAMES[len(args) :]))[:3]
    if isinstance(layer, AdoptedAttention):
        window = layer.site.sliding_window
        # A single token sees itself alone, within any window.
        if mask is not None or (window is not None and query.shape[-2] == 1):
            site = site._replace(sliding_window=window)
    adopted = _checked(module, layer, site)
    if mask is not None and not adopted.is_in_engine:
        _check_causal(mask, query.shape[-2], site.sliding_window)
    return adopted.attend(query, key, value).transpose(1, 2)


def _attend_flex(
    module: nn.Module, layer: nn.Module | None, args: Any, kwargs: Any
) -> torch.Tensor:
    query, key, value, score_mod, block_mask, scale, *_ = args
    site = AttentionSite.of(query, key, value, scale, is_flex=True)
    if isinstance(layer, AdoptedAttention) and flex_attention.same_site(
        site, layer.site
    ):
        site = layer.site
    adopted = _checked(module, layer, site)
    bounds = None
    if not adopted.is_in_engine:
        bounds = flex_attention.bounds_of(site, query, score_mod, block_mask)
    return adopted.attend(query, key, value, bounds).transpose(1, 2)


def _attend_written(
    module: nn.Module, layer: AdoptedAttention, scores: Scores, value: torch.Tensor
) -> torch.Tensor:
    site = AttentionSite.of(
        scores.query,
        scores.key,
        value,
        layer.site.scale,
        sliding_window=layer.site.sliding_window,
        logits_soft_cap=layer.site.logits_soft_cap,
        written=tuple(scores.functions),
    )
    _checked(module, layer, site)
    if not layer.is_in_engine:
        scores.check(site.sliding_window)
    return layer.attend(scores.query, scores.key, value).transpose(1, 2)


def _checked(
    module: nn.Module, layer: nn.Module | None, site: AttentionSite
) -> AdoptedAttention:
    if not isinstance(layer, AdoptedAttention) or site != layer.site:
        expected = layer.site if isinstance(layer, AdoptedAttention) else "no call"
        raise ValueError(
            f"{type(module).__name__} calls attention with {site}; when the model was "
            f"adopted it was {expected}. Each forward has to make the same calls."
        )
    return layer


_NAMES = ("query", "key", "value")


def _check_causal(mask: torch.Tensor, seq: int, window: int | None) -> None:
    """Raise unless a mask is that of causal attention, and nothing else."""
    if mask.shape[-2:] != (seq, seq):
        raise ValueError(f"{NOT_CAUSAL} Its shape is {tuple(mask.shape)}.")
    expected = causal(seq, window, mask.device)
    if mask.dtype == torch.bool:
        is_causal = (mask == expected).all()
    else:
        hidden = mask <= HIDDEN
        is_causal = torch.where(expected, mask == 0, hidden).all()
    if torch.compiler.is_compiling():
        torch._assert_async(is_causal, NOT_CAUSAL)
    elif not is_causal and seq > MOST_IN_TRAINER:
        raise ValueError(
            f"{NOT_CAUSAL} It is for {seq} tokens. When a model is adopted in a "
            f"trainer, a window is found if it is shorter than {MOST_IN_TRAINER}."
        )
    elif not is_causal:
        raise ValueError(NOT_CAUSAL)
