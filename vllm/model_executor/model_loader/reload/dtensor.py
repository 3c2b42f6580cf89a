# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""Parameters that are DTensors, in vLLM's reloading of weights."""

import torch
from torch.distributed.tensor import DTensor


def materialize_dtensor(meta_tensor: torch.Tensor) -> torch.Tensor | None:
    """An uninitialised DTensor on the current device, like one on the meta device.

    Args:
        meta_tensor: What vLLM keeps of a parameter while it reloads it.

    Returns:
        With the placements and attributes of `meta_tensor`; None if that is no DTensor.
    """
    if not isinstance(meta_tensor, DTensor):
        return None
    local = meta_tensor.to_local()
    local = torch.empty_like(local, device=torch.get_default_device())
    tensor = DTensor.from_local(
        local,
        meta_tensor.device_mesh,
        meta_tensor.placements,
        run_check=False,
        shape=meta_tensor.shape,
        stride=meta_tensor.stride(),
    )
    vars(tensor).update(vars(meta_tensor))
    return tensor
