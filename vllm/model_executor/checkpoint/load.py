# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""Loading a model directory into a training module, each rank its own pieces."""

import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from vllm.model_executor.checkpoint.files import checkpoint_files, opened
from vllm.model_executor.checkpoint.fingerprint import same_bits
from vllm.model_executor.checkpoint.layout import (
    CheckpointLayout,
    LayoutComparison,
    refuse_meta,
    tensors_of,
)
from vllm.model_executor.checkpoint.shards import local_tensor
from vllm.model_executor.checkpoint.state_dict_hooks import refuse_changing_hooks


def load_checkpoint(module: nn.Module, directory: str | os.PathLike) -> None:
    """Load a model directory's safetensors into a training module.

    Each rank reads only its shards. If the checkpoint does not fit, the module stays
    unchanged.

    Args:
        module: Built with the `ParallelContext` of this process, also under
            DistributedDataParallel or FSDP2.
        directory: Directory with `model.safetensors`, or several files and their index.

    Raises:
        FileNotFoundError: The directory has no safetensors.
        ValueError: Tensors are missing, extra, or of a wrong shape. The message names
            all of them.
    """
    directory = Path(directory)
    layout, targets = CheckpointLayout.of(module), tensors_of(module)
    refuse_meta(targets)
    refuse_changing_hooks(module)
    with opened(directory, checkpoint_files(directory)) as files:
        check = LayoutComparison(layout)
        matched = {
            name: check.match(name, *_shape_and_dtype(file, name))
            for name, file in files.items()
        }
        for name, first in check.repeated.items():
            entry = layout.tensor(name)
            assert entry is not None, "it was matched"
            if not _same_in_files(files, first, name, entry.dtype):
                check.different.append((first, name))
        check.finish(check.missing())
        for name, entry in matched.items():
            if entry is None:
                continue
            sharded = layout.parameters[entry.parameter]
            target = local_tensor(targets[entry.parameter])
            parts = {part.shard_id for part in entry.parts}
            for shard in sharded.shards:
                if shard.part in parts:
                    box = sharded.source(shard, entry.origin)
                    sharded.put(target, shard, _read(files[name], name, box))


def _read(file: Any, name: str, box: tuple[slice, ...]) -> torch.Tensor:
    """A box of a tensor in a safetensors file; a file has no boxes of a scalar."""
    return file.get_slice(name)[box] if box else file.get_tensor(name)


def _shape_and_dtype(file: Any, name: str) -> tuple[list[int], torch.dtype | str]:
    """Of a tensor in a safetensors file; a dtype that is not of `_DTYPES` as text."""
    header = file.get_slice(name)
    dtype = header.get_dtype()
    return header.get_shape(), _DTYPES.get(dtype, dtype)


_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "C64": torch.complex64,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}


def _same_in_files(
    files: Mapping[str, Any], first: str, second: str, dtype: torch.dtype
) -> bool:
    """Whether two tensors would be loaded as the same; reads some rows at a time."""
    shape, other_shape = (files[n].get_slice(n).get_shape() for n in (first, second))
    if shape != other_shape:
        return False
    rows = max(1, 2**24 // max(1, math.prod(shape[1:])))
    boxes = [(slice(i, i + rows),) for i in range(0, shape[0], rows)] if shape else [()]
    return all(
        same_bits(*(_read(files[n], n, box).to(dtype) for n in (first, second)))
        for box in boxes
    )
