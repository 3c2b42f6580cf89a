# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""Buffers that are computed: the table of a rotary embedding, the slopes of ALiBi.

They are no part of a state dict, so `load_state_dict(assign=True)` of a model that was
built on the meta device, or other ways to put its weights in place, would leave them
there. They are on the CPU instead, and move with the module.
"""

from __future__ import annotations

import torch


def home_of(device: torch.device) -> torch.device:
    """Where a computed buffer is in a module on a device."""
    return torch.device("cpu") if device.type == "meta" else device


def buffer_for(x: torch.Tensor, name: str, buffer: torch.Tensor) -> torch.Tensor:
    """A computed buffer where `x` is; on meta, which computes shapes alone, a stand-in.

    Args:
        x: what a layer computes with.
        name: of the buffer, for the message.
        buffer: the layer's.

    Raises:
        ValueError: they are on two devices.
    """
    if buffer.device == x.device:
        return buffer
    if x.is_meta:
        return buffer.to(x.device)
    raise ValueError(
        f"{name} is on {buffer.device}, but the input is on {x.device}. Call the "
        f"module's .to({str(x.device)!r}): {name} is no part of the state dict, so it "
        "stays where the module was built if weights alone are put elsewhere."
    )
