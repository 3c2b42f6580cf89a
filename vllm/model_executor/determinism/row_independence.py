# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""Which ops of torch give a row the same bits whatever other rows are in the batch.

Each element of such an op's result is

- copied or chosen, as by views, indexing, sorting and maxima;
- an elementwise function, by one rounding or by a kernel that treats elements alike;
- an integer, a count or a truth value, which is not rounded;
- or the work of an op of this project, or of torch's layer norm, which reads one row.

Nothing is known of any other op, such as convolutions, transforms, scatters that add,
and products: whether a row's bits depend on the batch is up to the kernel.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch._library.custom_ops import OPDEFS
from torch._ops import OpOverload
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from vllm.model_executor.determinism.functions import BatchInvariantFunctions, replaced
from vllm.model_executor.determinism.pointwise import EXACT, INEXACT, names
from vllm.model_executor.op_library import NAMESPACE

# Names without the underscore of the in-place form.
_COPIES = names(
    """
    _conj_physical _index_put_impl _local_scalar_dense _reshape_copy _to_copy
    _unsafe_view amax amin aminmax arange as_strided_scatter cat clone complex
    constant_pad_nd copy cummax cummin diagonal_scatter embedding empty empty_like
    empty_permuted empty_strided expand_copy eye fill flip full full_like gather histc
    index index_copy index_fill index_put index_select kthvalue lift_fresh
    lift_fresh_copy linspace masked_scatter masked_select max median min mode
    narrow_copy new_empty new_empty_strided new_full new_ones new_zeros ones ones_like
    reflection_pad1d repeat repeat_interleave replication_pad1d resize roll rot90
    scalar_tensor scatter select_scatter slice_scatter sort stack take topk tril triu
    unbind_copy view_as_complex_copy view_as_real_copy zero zeros zeros_like
    """
)
_ROW_BY_ROW = names("native_layer_norm")
# Adds to a row in the order of the indices; not so on CUDA.
_IN_ORDER_ON_CPU = names("index_add")
# The same. What is examined on CPU may run on CUDA, where there is one.
_IN_ORDER_WITHOUT_CUDA = names("scatter_add")
# Groups of rows, added up in order.
_ON_CUDA = names("_grouped_mm")
# Elementwise, but without torch's tag for it.
_UNTAGGED = names("glu log_sigmoid_forward")
_EXACT_IF_COMPLEX = names("add clone conj_physical masked_fill neg sub where")
_COLLECTIVES_THAT_COPY = names(
    """
    all_gather_into_tensor all_gather_into_tensor_coalesced all_to_all_single broadcast
    wait_tensor
    """
)


def is_row_independent(
    op: OpOverload, args: Sequence[Any], kwargs: Mapping[str, Any], result: Any
) -> bool:
    """Whether an op's rows are known not to depend on the batch.

    Args:
        op: of the dispatcher.
        args: its positional arguments.
        kwargs: its other arguments.
        result: what it returned.
    """
    name = op._schema.name.partition("::")[2].removesuffix("_")
    if op.namespace == NAMESPACE:
        return True
    if op.namespace == "_c10d_functional":
        return name in _COLLECTIVES_THAT_COPY
    tensors = [leaf for leaf in tree_leaves(result) if isinstance(leaf, torch.Tensor)]
    if not any(tensor.is_floating_point() or tensor.is_complex() for tensor in tensors):
        return bool(tensors) or not op._schema.is_mutable
    if op.namespace != "aten":
        return _consists_of_known(op, args, kwargs)
    if _is_view(op) or name in _ROW_BY_ROW:
        return True
    if name in _COPIES:
        accumulates = name in ("index_put", "_index_put_impl") and any(args[3:4])
        return not accumulates and "reduce" not in op._overloadname
    if tensors and all(tensor.is_cuda for tensor in tensors):
        known = EXACT | INEXACT | _UNTAGGED | _ON_CUDA
        return torch.Tag.pointwise in op.tags or name in known
    if any(isinstance(arg, torch.Tensor) and arg.is_complex() for arg in args):
        return name in _EXACT_IF_COMPLEX
    if name in _IN_ORDER_WITHOUT_CUDA:
        return not torch.cuda.is_available()
    return name in EXACT | _IN_ORDER_ON_CPU and "alpha" not in kwargs


def _consists_of_known(
    op: OpOverload, args: Sequence[Any], kwargs: Mapping[str, Any]
) -> bool:
    """Whether an op that is a Python function calls nothing unknown.

    It is called once more, so that `UnknownFunctions` is for tensors without values.
    """
    definition = OPDEFS.get(op._schema.name)
    if definition is None:
        return False
    unknown: list[str] = []
    with _UnknownOps(op, lambda _, inner: unknown.append(inner)):
        definition._init_fn(*args, **kwargs)
    return not unknown


class UnknownFunctions(BatchInvariantFunctions):
    """Reports calls of torch whose rows are not known to be independent of the batch.

    It replaces functions as `BatchInvariantFunctions` does, in its stead.

    Args:
        report: called with the function's name and that of the op behind it, such as
            `report("conv1d", "aten.convolution.default")`, in the call.
    """

    def __init__(self, report: Callable[[str, str], None]) -> None:
        super().__init__()
        self._report = report

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        result = replaced(func, args, kwargs)
        if result is not NotImplemented:
            return result
        with _UnknownOps(func, self._report):
            return func(*args, **kwargs)


class _UnknownOps(TorchDispatchMode):
    def __init__(self, func: Any, report: Callable[[str, str], None]) -> None:
        super().__init__()
        self._name = getattr(func, "__name__", str(func))
        self._report = report

    def __torch_dispatch__(
        self, op: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        result = op(*args, **kwargs)
        if not is_row_independent(op, args, kwargs, result):
            self._report(self._name, str(op))
        return result


def _is_view(op: OpOverload) -> bool:
    aliases = [argument.alias_info for argument in op._schema.arguments]
    return any(alias is not None and not alias.is_write for alias in aliases)
