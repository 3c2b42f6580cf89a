# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""Models defined by a builder: a callable that returns a `torch.nn.Module`.

`spec` says what a builder is, `registration` how it reaches every process,
`config` how its `config.json` is read, `convention` how its module is called, `tail`
what that does after its head, `binding` how training layers become engine layers,
`pipeline` spreads a model over stages, `agreement` compares what the ranks have built,
and `model` is what the engine instantiates.
"""

from vllm.model_executor.models.builder.pipeline import PipelineLayers
from vllm.model_executor.models.builder.spec import BuilderOptions, model_builder

__all__ = ["BuilderOptions", "PipelineLayers", "model_builder"]
