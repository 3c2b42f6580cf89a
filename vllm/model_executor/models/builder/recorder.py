# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""Recording what every module of a model puts out, as fingerprints of rows.

They are little enough to be sent from the engine's workers to the trainer.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from vllm.model_executor.checkpoint.fingerprint import row_fingerprints
from vllm.model_executor.models.builder.tail import TracedLogits

Key = tuple[str, int, int]


class ModuleRecorder:
    """Records the outputs of a model's submodules until `finish` is called.

    Forwards that follow each other, as those of a prefill in chunks, are joined.

    Args:
        model: takes token ids and positions, one of each a token; has hooks until
            `finish`.
    """

    def __init__(self, model: nn.Module) -> None:
        self.rows: dict[Key, list[torch.Tensor]] = {}
        self.calls: dict[str, int] = {}
        self.num_tokens = 0
        self.handles = [
            model.register_forward_pre_hook(self._begin_forward, with_kwargs=True)
        ]
        for path, module in model.named_modules():
            if path:
                hook = _RecordOutput(self, path)
                self.handles.append(module.register_forward_hook(hook))

    def _begin_forward(self, module: nn.Module, args: tuple, kwargs: dict) -> None:
        # Later pipeline stages need no ids.
        of_tokens = (*args, *kwargs.values())
        tensors = (x for x in of_tokens if isinstance(x, torch.Tensor))
        self.num_tokens = next(tensors).numel()
        self.calls.clear()

    def record(self, path: str, output: Any) -> None:
        """Add what a module put out in this forward."""
        call = self.calls.get(path, 0)
        self.calls[path] = call + 1
        for index, tensor in enumerate(_tensors(output)):
            if self.num_tokens and tensor.numel() % self.num_tokens == 0:
                rows = row_fingerprints(tensor.reshape(self.num_tokens, -1))
                self.rows.setdefault((path, call, index), []).append(rows)

    def finish(self) -> list[dict[str, Any]]:
        """Remove the hooks.

        Returns:
            In the order of execution: path; call, counted for a module that is used
            several times; index among the tensors it returns; rows, one fingerprint
            a token.
        """
        for handle in self.handles:
            handle.remove()
        return [
            {
                "path": path,
                "call": call,
                "index": index,
                "rows": torch.cat(chunks).tolist(),
            }
            for (path, call, index), chunks in self.rows.items()
        ]


class _RecordOutput:
    """A forward hook that knows its module's path."""

    def __init__(self, recorder: ModuleRecorder, path: str) -> None:
        self.recorder = recorder
        self.path = path

    def __call__(self, module: nn.Module, args: tuple, output: Any) -> None:
        self.recorder.record(self.path, output)


def _tensors(output: Any) -> Iterator[torch.Tensor]:
    outputs = output if isinstance(output, tuple | list) else (output,)
    for each in outputs:
        is_traced = isinstance(each, TracedLogits)
        if isinstance(each, torch.Tensor) and each.numel() and not is_traced:
            yield each
