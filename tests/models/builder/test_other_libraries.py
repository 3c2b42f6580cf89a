# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""Modules sharded by torch's parallelize_module, in an engine of one rank.

`tests/examples/test_parallelism.py` has engines of two ranks, and other libraries.
"""

import torch
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    RowwiseParallel,
    parallelize_module,
)

from tests.models.builder.models import (
    PLAIN,
    PlainGPT,
    assert_trainer_agrees,
    greedy,
    save_plain,
)
from vllm import ModelRegistry
from vllm.model_executor.checkpoint.save import checkpoint_tensors

PROMPTS = [[1, 2, 3], list(range(20, 60))]


def build_dtensor(config, parallel_context):
    plan = {
        "blocks.*.mlp.0": ColwiseParallel(),
        "blocks.*.mlp.2": RowwiseParallel(),
    }
    mesh = parallel_context.device_mesh()["tp"]
    return parallelize_module(PlainGPT(config), mesh, plan)


def count_dtensors(model):
    return sum(isinstance(p, DTensor) for p in model.parameters())


def test_dtensors_are_served_and_their_weights_replaced(make_llm, tmp_path):
    model = save_plain(tmp_path)
    ModelRegistry.register_model(PLAIN, build_dtensor)
    llm = make_llm(tmp_path)
    assert llm.apply_model(count_dtensors) == [8]
    assert_trainer_agrees(model, PROMPTS, greedy(llm, PROMPTS))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.05)
    llm.collective_rpc(
        "reload_weights", kwargs={"weights_iterator": list(checkpoint_tensors(model))}
    )
    llm.reset_prefix_cache()
    assert llm.apply_model(count_dtensors) == [8]
    assert_trainer_agrees(model, PROMPTS, greedy(llm, PROMPTS))
