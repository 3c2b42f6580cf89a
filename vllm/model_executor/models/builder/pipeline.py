# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""Spreading a model's layers over pipeline stages."""

from collections.abc import Callable, Iterator
from typing import overload

from torch import nn

from vllm.model_executor.parallel_context import ParallelContext


class PipelineLayers(nn.Module):
    """The layers of this process's pipeline stage, and no others.

    With one stage, as in most trainers, these are all layers. Iterating gives them in
    order; `layers[i] = wrap(layers[i])` puts another module in a layer's place. They
    are submodules named by their index in the whole model, so parameters, checkpoint
    tensors and KV caches are named as there. Layers are distributed as vLLM distributes
    those of its own models (VLLM_PP_LAYER_PARTITION overrides it).

    Args:
        num_layers: Of the whole model, at least one per stage.
        make_layer: Called with a layer's index in the whole model.
        parallel_context: Says which stage this is.

    Attributes:
        num_layers: Of the whole model.
        start: Index of this stage's first layer.
        end: One more than the index of its last.

    Raises:
        ValueError: There are fewer layers than stages.
    """

    def __init__(
        self,
        num_layers: int,
        make_layer: Callable[[int], nn.Module],
        parallel_context: ParallelContext,
    ) -> None:
        super().__init__()
        self.num_layers = num_layers
        self.start, self.end = stage_bounds(num_layers, parallel_context)
        for index in range(self.start, self.end):
            self.add_module(str(index), make_layer(index))

    def __iter__(self) -> Iterator[nn.Module]:
        return iter(self._modules.values())  # type: ignore[arg-type]

    def __len__(self) -> int:
        """How many layers this stage has."""
        return len(self._modules)

    @overload
    def __getitem__(self, index: int) -> nn.Module: ...

    @overload
    def __getitem__(self, index: slice) -> list[nn.Module]: ...

    def __getitem__(self, index: int | slice) -> nn.Module | list[nn.Module]:
        """The layer of that index in the whole model, or the layers of a slice of it.

        Negative indices count from the end of the whole model.

        Raises:
            IndexError: The layer, or one of the slice, is on another stage.
        """
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(self.num_layers))]
        return self.get_submodule(self._name(index))

    def __setitem__(self, index: int, layer: nn.Module) -> None:
        """Put a layer in the place of another, such as the same one in a wrapper."""
        self.add_module(self._name(index), layer)

    def _name(self, index: int) -> str:
        place = index + self.num_layers if index < 0 else index
        if not self.start <= place < self.end:
            raise IndexError(
                f"Layer {index} is not on this pipeline stage, which has layers "
                f"{self.start} to {self.end - 1} of {self.num_layers}."
            )
        return str(place)


def stage_bounds(num_layers: int, parallel_context: ParallelContext) -> tuple[int, int]:
    """First layer of this stage, and one more than its last.

    Raises:
        ValueError: There are fewer layers than stages, or VLLM_PP_LAYER_PARTITION
            leaves this stage without.
    """
    # The registry, which vllm_internals imports, imports this package.
    from vllm.model_executor import vllm_internals

    stages = parallel_context.pp_size
    check_stages(num_layers, stages)
    start, end = vllm_internals.get_pp_indices(
        num_layers, parallel_context.pp_rank, stages
    )
    if start == end:
        raise ValueError(
            f"VLLM_PP_LAYER_PARTITION gives pipeline stage {parallel_context.pp_rank} "
            "no layer. Each stage needs at least one."
        )
    return start, end


def check_stages(num_layers: int, stages: int) -> None:
    """Refuse more pipeline stages than layers."""
    if num_layers < stages:
        raise ValueError(
            f"A model of {num_layers} layers cannot be spread over "
            f"pipeline_parallel_size={stages} stages: each stage needs at least one "
            f"layer. Use pipeline_parallel_size={num_layers} or less."
        )
