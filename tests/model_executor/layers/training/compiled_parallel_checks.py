# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""Parallel layers and collectives under torch.compile.

Run on each of two ranks by `test_tensor_parallel.py`.
"""

import pytest
import torch

from tests.model_executor.layers.training.parallel_model import (
    HIDDEN,
    TOKENS,
    engine_step,
)
from vllm.model_executor.layers.training import (
    ColumnParallelLinear,
    RMSNorm,
    RowParallelLinear,
    collectives,
)

pytestmark = pytest.mark.usefixtures("on_the_ranks_device")


@pytest.mark.parametrize("sequence_parallel", [False, True])
def test_the_compiler_sees_one_graph(context, sequence_parallel):
    """Forward and backward, against the same without the compiler."""
    torch.manual_seed(0)
    options = {"sequence_parallel": sequence_parallel, "parallel_context": context}
    layers = torch.nn.Sequential(
        RMSNorm(HIDDEN, **options),
        ColumnParallelLinear(HIDDEN, 16, **options),
        RowParallelLinear(16, HIDDEN, **options),
    )
    x = torch.randn(TOKENS, HIDDEN)

    def gradients(function):
        layers.zero_grad()
        function(x).square().sum().backward()
        return [parameter.grad for parameter in layers.parameters()]

    expected = gradients(layers)
    with torch._dynamo.config.patch(disable=False):
        compiled = torch.compile(layers, fullgraph=True, backend="aot_eager")
        actual = gradients(compiled)
    torch.testing.assert_close(actual, expected)


# The engine for CPU has no kernel of its own for a reduce-scatter.
ENGINE_CALLS = {
    "reduce_from_group": ("all_reduce", ()),
    "all_gather_to_group": ("all_gather", (0,)),
    "gather_from_group": ("all_gather", (-1,)),
}


@pytest.mark.parametrize("name", ENGINE_CALLS)
def test_a_compiled_step_takes_the_engines(context, vllm_groups, name, assert_equal):
    function = getattr(collectives, name)
    called, options = ENGINE_CALLS[name]
    x = torch.arange(64.0).view(8, 8) + context.tp_rank
    expected = 2 * function(x, context, *options) + function(x, context, *options)
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph

    with torch._dynamo.config.patch(disable=False), engine_step():
        compiled = torch.compile(
            lambda x: (
                2 * function(x, context, *options) + function(x, context, *options)
            ),
            fullgraph=True,
            backend=backend,
        )
        assert_equal(name, compiled(x), expected)
    targets = " ".join(str(node.target) for node in graphs[0].graph.nodes)
    assert ("shm_all" if x.device.type == "cpu" else f"vllm.{called}") in targets
