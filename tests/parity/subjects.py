# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""Which models are compared, in which dtypes and which kinds of engine."""

from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import nn

from tests.models.gpus import MEMORY
from tests.parity import models
from tests.parity.engine import Engine
from vllm.model_executor.parallel_context import ParallelContext

CUDA = torch.cuda.is_available()
TWO_DEVICES = not CUDA or torch.cuda.device_count() > 1
DEVICE = "cuda" if CUDA else "cpu"
BACKENDS = ("FLASH_ATTN", "TRITON_ATTN") if CUDA else ("CPU_ATTN",)
# What computes attention in a trainer whose engine has the backend.
IMPLEMENTATIONS = {"CPU_ATTN": None, "FLASH_ATTN": None, "TRITON_ATTN": "vllm_triton"}


@dataclass(frozen=True)
class Subject:
    """A model, and the engines and trainers of it.

    Attributes:
        model_name: of `models.CONFIGS`.
        dtype: such as "float32".
        backend: the engine's attention backend.
        eager: whether the engine runs without compilation and CUDA graphs.
        directory: of the model's checkpoint.
        engine: where its engines are started.
        pair: where its engines of two tensor-parallel ranks are started.
    """

    model_name: str
    dtype: str
    backend: str
    eager: bool
    directory: Path | None = None
    engine: Engine | None = None
    pair: Engine | None = None

    @property
    def mode(self) -> str:
        kind = "eager" if self.eager else "CUDA graphs" if CUDA else "compiled"
        return f"{self.backend} {kind}" if CUDA else kind

    def __str__(self) -> str:
        return f"{self.model_name}-{self.dtype}-{self.mode}".replace(" ", "-")

    def made(self, directory: Path, engine: Engine, pair: Engine) -> "Subject":
        """With random weights in `directory`."""
        models.save_new(directory, self.model_name, self.dtype, DEVICE)
        return replace(self, directory=directory, engine=engine, pair=pair)

    @cached_property
    def trainer(self) -> nn.Module:
        """The training model with the checkpoint's weights."""
        return self.load_trainer(1)

    def load_trainer(self, tp_reduction_shards: int) -> nn.Module:
        return models.load(
            self.directory,
            self.model_name,
            self.dtype,
            ParallelContext(
                device=torch.device(DEVICE), tp_reduction_shards=tp_reduction_shards
            ),
            DEVICE,
            IMPLEMENTATIONS[self.backend],
        )

    def start(self, **options: Any) -> Engine:
        """An engine of the model; one that runs already is taken if it fits."""
        self.engine.start(**self._options() | options)
        return self.engine

    def start_apart(self, engine: Engine, **options: Any) -> Engine:
        """As `start`, in another `engine`'s process."""
        engine.start(**self._options() | options)
        return engine

    def begin_pair(self) -> None:
        """Begin to start the engine of two tensor-parallel ranks."""
        self.pair.begin(**self._options(), tensor_parallel_size=2)

    def start_pair(self) -> Engine:
        """The engine of two tensor-parallel ranks with the checkpoint of now."""
        self.pair.start(**self._options(), tensor_parallel_size=2)
        self.pair.reload_weights()
        return self.pair

    def _options(self) -> dict[str, Any]:
        options = {
            "model": str(self.directory),
            "dtype": self.dtype,
            "enforce_eager": self.eager,
            # So few that requests of one batch do not all fit.
            "num_gpu_blocks_override": self._num_blocks(),
            "block_size": 32,
        }
        if CUDA:
            options |= {"attention_config": {"backend": self.backend}, **MEMORY}
            if not self.eager:
                sizes = [1, 2, 4, 8, 16, 32, 64]
                options["compilation_config"] = {"cudagraph_capture_sizes": sizes}
        return options

    def _num_blocks(self) -> int:
        """A request of 2,048 tokens takes 64, and 12 more in layers with a window."""
        return 80 if CUDA and self.model_name == "window" else 72


def _subjects() -> list[Subject]:
    if not CUDA:
        eager = [
            Subject(name, dtype, "CPU_ATTN", True)
            for name in ("demo", "GPT-2", "window")
            for dtype in ("float32", "bfloat16")
        ]
        compiled = [("demo", "bfloat16"), ("GPT-2", "float32")]
        return eager + [Subject(*each, "CPU_ATTN", False) for each in compiled]
    # FlashAttention takes no fp32; a window in it is not claimed.
    return [
        Subject("demo", "float32", "TRITON_ATTN", False),
        *(Subject("demo", "bfloat16", b, e) for b in BACKENDS for e in (True, False)),
        *(Subject("GPT-2", "bfloat16", b, b == "FLASH_ATTN") for b in BACKENDS),
        *(Subject("window", "bfloat16", "TRITON_ATTN", e) for e in (True, False)),
    ]


SUBJECTS = _subjects()
# Each with its own model and options of the engine; see `random_models`.
RANDOM = [
    Subject(name, config["dtype"], "CPU_ATTN", True)
    for name, config in models.CONFIGS.items()
    if name.startswith("random-")
]
# Those of a run on CPU without a report, which is shorter: every model once, both
# dtypes, both kinds of engine; and random models of most features.
FEW_SUBJECTS = [
    Subject("demo", "float32", "CPU_ATTN", True),
    Subject("GPT-2", "bfloat16", "CPU_ATTN", True),
    Subject("window", "float32", "CPU_ATTN", True),
    Subject("demo", "bfloat16", "CPU_ATTN", False),
    RANDOM[4],
    RANDOM[13],
]
TENSOR_PARALLEL = [
    Subject("demo", "float32", "CPU_ATTN", True),
    Subject("demo", "bfloat16", "CPU_ATTN", True),
    Subject("GPT-2", "bfloat16", "CPU_ATTN", True),
]
if CUDA:
    TENSOR_PARALLEL = [Subject("demo", "bfloat16", b, True) for b in BACKENDS]
