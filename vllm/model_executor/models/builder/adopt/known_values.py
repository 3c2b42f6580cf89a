# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""Values of the fake tensors that do not depend on weights or token ids.

A forward on fake tensors computes no values. Masks are made of none but constants,
buffers and positions, so their values can be computed beside it.
"""

from __future__ import annotations

from typing import Any

import torch
from torch._ops import OpOverload
from torch._subclasses.fake_tensor import FakeTensor, unset_fake_temporarily
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.weak import WeakIdKeyDictionary


class KnownValues(TorchDispatchMode):
    """Computes what follows from known values, beside a forward on fake tensors."""

    def __init__(self) -> None:
        super().__init__()
        self._values = WeakIdKeyDictionary()
        # Memory that something unknown was written to, by its address.
        self._unknown: set[int] = set()

    def learn(self, fake: torch.Tensor, value: torch.Tensor) -> None:
        """Note a value; it is not changed where the forward changes the tensor."""
        with unset_fake_temporarily(), torch._C.DisableTorchFunction():
            if value.device.type == "cpu":
                self._values[fake] = value.detach().clone()
            elif not value.is_meta:
                self._values[fake] = value.detach().cpu()

    def value(self, tensor: torch.Tensor) -> torch.Tensor | None:
        """The value of a tensor, if it is known."""
        if not isinstance(tensor, FakeTensor):
            with unset_fake_temporarily(), torch._C.DisableTorchFunction():
                return None if tensor.is_meta else tensor.detach().cpu()
        value = self._values.get(tensor)
        return None if value is None or _address(value) in self._unknown else value

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        tensors = [x for x in tree_leaves((args, kwargs)) if _is_tensor(x)]
        values = [self.value(tensor) for tensor in tensors]
        is_known = all(value is not None for value in values)
        if not isinstance(func, OpOverload) or _is_random(func):
            is_known = False
        elif func._schema.is_mutable:
            is_known &= all(isinstance(tensor, FakeTensor) for tensor in tensors)
        result = func(*args, **kwargs)
        if is_known:
            given = tree_map(self._given, (args, kwargs))
            with unset_fake_temporarily():
                known = func(*given[0], **given[1])
            for fake, value in zip(tree_leaves(result), tree_leaves(known)):
                if isinstance(fake, FakeTensor):
                    self._values[fake] = value
        elif func._schema.is_mutable:
            self._unknown |= {_address(value) for value in values if value is not None}
        return result

    def _given(self, x: Any) -> Any:
        return self.value(x) if _is_tensor(x) else x


def _is_random(op: OpOverload) -> bool:
    return torch.Tag.nondeterministic_seeded in op.tags


def _is_tensor(x: Any) -> bool:
    return isinstance(x, torch.Tensor)


def _address(tensor: torch.Tensor) -> int:
    return tensor.untyped_storage()._cdata
