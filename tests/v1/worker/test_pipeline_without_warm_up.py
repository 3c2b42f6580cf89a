# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""A pipeline stage that receives hidden states before any warm-up."""

from types import SimpleNamespace

import torch

from vllm.sequence import IntermediateTensors
from vllm.v1.worker.gpu_model_runner import GPUModelRunner


def test_the_first_step_makes_what_it_receives_into() -> None:
    made = []

    def make(batch_size, dtype, device):
        made.append((batch_size, dtype, device))
        zeros = torch.zeros(batch_size, 3, dtype=dtype, device=device)
        return IntermediateTensors({"hidden_states": zeros})

    runner = SimpleNamespace(
        intermediate_tensors=None,
        model=SimpleNamespace(make_empty_intermediate_tensors=make),
        max_num_tokens=8,
        model_config=SimpleNamespace(dtype=torch.bfloat16),
        device=torch.device("cpu"),
    )
    for step in (1.0, 2.0):
        received = torch.full((5, 3), step, dtype=torch.bfloat16)
        tensors = GPUModelRunner.sync_and_gather_intermediate_tensors(
            runner, 5, IntermediateTensors({"hidden_states": received}), True
        )
        assert torch.equal(tensors["hidden_states"], received)
    assert made == [(8, torch.bfloat16, torch.device("cpu"))]
