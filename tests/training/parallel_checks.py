# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""Run on each of two ranks by `test_parallel.py`, through torchrun."""

import os

import torch
import torch.distributed as dist

from vllm import training
from vllm.model_executor.parallel_context import ParallelContext

RANK = int(os.environ["RANK"])


def check(axis: str, sizes: tuple[int, int], mesh_shape: tuple[int, int, int]) -> None:
    """Two ranks along one axis."""
    context = training.initialize_parallel(*sizes)
    assert training.initialize_parallel(*sizes) == context
    assert ParallelContext.current() == context
    assert (context.rank, context.world_size, context.local_rank) == (RANK, 2, RANK)
    for other in ("tp", "pp", "dp"):
        expected = (RANK, 2) if other == axis else (0, 1)
        rank, size = (getattr(context, f"{other}_{part}") for part in ("rank", "size"))
        assert (rank, size) == expected
        # To PyTorch no group would be the world.
        total = torch.tensor([RANK + 1], device=context.device)
        dist.all_reduce(total, group=getattr(context, f"{other}_group"))
        assert total.item() == (3 if other == axis else RANK + 1)
    mesh = context.device_mesh()
    assert mesh.mesh_dim_names == ("dp", "pp", "tp") and mesh.shape == mesh_shape
    for other in ("tp", "pp", "dp"):
        assert mesh[other].get_group() is context.group(other)
    assert mesh.mesh.flatten().tolist() == [0, 1]
    training.destroy_parallel()
    assert not dist.is_initialized()


def refused(sizes: tuple[int, int], message: str) -> None:
    try:
        training.initialize_parallel(*sizes)
    except (RuntimeError, ValueError) as error:
        assert message in str(error), error
    else:
        raise AssertionError(f"{sizes} were accepted")


if __name__ == "__main__":
    refused((3, 1), "does not divide the world of 2 process(es)")
    refused((2, 2), "is 4, which does not divide the world of 2")
    check("tp", (2, 1), (1, 1, 2))
    check("pp", (1, 2), (1, 2, 1))
    check("dp", (1, 1), (2, 1, 1))
    training.initialize_parallel(2)
    refused((1, 1), "tensor_parallel_size=2 and pipeline_parallel_size=1; 1 and 1")
    training.destroy_parallel()
    print("all checks passed")
