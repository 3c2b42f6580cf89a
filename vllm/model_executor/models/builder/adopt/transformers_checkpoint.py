# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""Checkpoints of transformers' models, under the names and dtypes that a model has.

What `from_pretrained` renames, merges and splits, such as the experts of a mixture,
which files hold one by one, is done by transformers' own conversions.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Iterable, Iterator
from typing import Any, cast

import torch
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    WeightConverter,
    WeightRenaming,
    build_glob_alternation,
    rename_source_key,
)

NamedTensor = tuple[str, torch.Tensor]


def keep_in_fp32(model: PreTrainedModel) -> None:
    """Cast what `from_pretrained` keeps in fp32, such as a router's correction bias."""
    patterns = list(model._get_dtype_plan(model.dtype))
    if not patterns:
        return
    kept, _, _ = build_glob_alternation(patterns)
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        if kept.search(name) and tensor.is_floating_point():
            tensor.data = tensor.data.float()


class CheckpointConversion:
    """Turns a checkpoint's tensors into a model's.

    Args:
        model: One of transformers' models.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        self.model = model
        self.names = dict.fromkeys(model.state_dict(), True)
        transforms = get_model_conversion_mapping(model)
        self.renamings = [t for t in transforms if isinstance(t, WeightRenaming)]
        self.converters = [t for t in transforms if isinstance(t, WeightConverter)]
        ignored = model._keys_to_ignore_on_load_unexpected or ()
        self.ignored = [re.compile(pattern) for pattern in ignored]

    def __call__(self, tensors: Iterable[NamedTensor]) -> Iterator[NamedTensor]:
        """The model's names and tensors.

        Args:
            tensors: The checkpoint's. Those that are merged with others are kept until
                the last has been read.
        """
        by_pattern = {
            pattern: converter
            for converter in self.converters
            for pattern in converter.source_patterns
        }
        collected: dict[str, WeightConverter] = {}
        for name, tensor in tensors:
            new_name, pattern = self._rename(name)
            if new_name not in self.names and any(p.search(name) for p in self.ignored):
                continue
            if pattern is None:
                yield new_name, tensor
                continue
            if new_name not in collected:
                collected[new_name] = copy.deepcopy(by_pattern[pattern])
            # It takes what `torch.Tensor` and a future of one have in common.
            collected[new_name].add_tensor(new_name, name, pattern, cast(Any, tensor))
        for name, converter in collected.items():
            converted = converter.convert(
                name, model=self.model, config=self.model.config
            )
            for new_name, value in converted.items():
                yield new_name, value[0] if isinstance(value, list) else value

    def _rename(self, name: str) -> tuple[str, str | None]:
        prefix = self.model.base_model_prefix
        renamed = rename_source_key(
            name, self.renamings, self.converters, prefix, self.names
        )
        if renamed[0] not in self.names and name in self.names:
            return name, None
        return renamed
