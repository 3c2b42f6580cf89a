# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""The torch.library namespace of the training ops, and which kernels there are.

An op is defined in its folder's `op.py`: schema, shapes for tracing, backward, and the
public function that checks its arguments. Its kernel for CPU is C++ in
`csrc/training/cpu`, built into `vllm/_training_C`, which implements the op for
torch's CPU key, unless `op.py` says otherwise; its kernel for CUDA is Triton in the
op's folder.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

import torch
from torch._functorch.utils import enable_single_level_autograd_function
from torch.autograd import forward_ad

from vllm.logger import init_logger
from vllm.triton_utils import HAS_TRITON

logger = init_logger(__name__)

NAMESPACE = "vllm_training"
KERNEL_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# float64 is for checks, in plain torch.
SUPPORTED_DTYPES = (*KERNEL_DTYPES, torch.float64)
# What has the derivatives that most ops lack.
IN_FLOAT64 = "pass float64 inputs, which run in plain torch"

_LIBRARY = torch.library.Library(NAMESPACE, "FRAGMENT")
_EXTENSION = Path(__file__).parents[1] / "_training_C.abi3.so"
# For errors: how the extension gets there.
BUILD_EXTENSION = (
    "install vLLM from source: `pip install --no-build-isolation .` in its source tree "
    "compiles the extension"
)


def _load_cpu_kernels() -> bool:
    if not _EXTENSION.exists():
        logger.warning(
            "%s is not built: training layers run plain torch on CPU, which is slower "
            "and takes more memory. To build it, %s.",
            _EXTENSION.name,
            BUILD_EXTENSION,
        )
        return False
    torch.ops.load_library(str(_EXTENSION))
    return True


HAS_CPU_KERNELS = _load_cpu_kernels()


def has_kernel(tensor: torch.Tensor) -> bool:
    """Whether the ops have a kernel for a tensor's device and dtype.

    Plain torch computes what has none: float64, which is for checks, the meta device,
    and CPU tensors where the extension is not built.
    """
    if tensor.dtype not in KERNEL_DTYPES:
        return False
    if tensor.device.type == "cpu":
        return HAS_CPU_KERNELS
    return tensor.device.type == "cuda" and HAS_TRITON


@functools.cache
def has_large_shared_memory(device: torch.device) -> bool:
    """Whether a block may have the 163 KB of an A100 (others: 99 KB)."""
    properties: Any = torch.cuda.get_device_properties(device)
    return properties.shared_memory_per_block_optin >= 160 * 1024


def described(**tensors: torch.Tensor | None) -> str:
    """Dtypes, shapes and devices by name, for an error; None is left out."""
    return ", ".join(
        f"{name}: {tensor.dtype} {tuple(tensor.shape)} on {tensor.device}"
        for name, tensor in tensors.items()
        if tensor is not None
    )


def autocast_dtype(tensor: torch.Tensor) -> torch.dtype | None:
    """What autocast makes of a tensor where it is; None without autocast."""
    device_type = tensor.device.type
    # torch knows no autocast for the meta device, and raises.
    if device_type == "meta" or not torch.is_autocast_enabled(device_type):
        return None
    return torch.get_autocast_dtype(device_type)


def rows_of(x: torch.Tensor) -> torch.Tensor:
    """A tensor as ops on rows take it.

    Returns:
        shape = [rows, last dim], each row contiguous.
    """
    if x.ndim != 2:
        x = x.unsqueeze(0).flatten(0, -2)
    return x if x.stride(-1) == 1 else x.contiguous()


def from_rows(rows: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """The result of an op on `rows_of(x)`, in the shape of x but for the last dim.

    As that of torch's linear it is no view to autograd, of which FSDP2 warns. So the op
    may not keep its result for the backward: a change in place would not be noticed.
    """
    if x.ndim == 2:
        return rows
    return torch.ops.aten._unsafe_view(rows, (*x.shape[:-1], rows.shape[-1]))


def define_op(
    schema: str,
    *,
    fake: Callable[..., Any],
    cpu: Callable[..., Any] | None = None,
    cuda: Callable[..., Any] | None = None,
    backward: Callable[..., Any] | None = None,
    setup_context: Callable[..., Any] | None = None,
    instead: str = IN_FLOAT64,
) -> Any:
    """Define an op of the namespace.

    Args:
        schema: name, arguments and results, such as `relu(Tensor x) -> Tensor`.
            Arguments are positional and have no defaults.
        fake: the op on tensors without data: the results' shapes, strides and dtypes.
        cpu: the op on CPU tensors; None: it is in the extension.
        cuda: the op on CUDA tensors.
        backward: as for `torch.library.register_autograd`; None: not differentiable.
        setup_context: likewise.
        instead: what a caller can do who needs a forward-mode derivative, for an
            error: "pass ...".

    Returns:
        The op, which is called with the schema's arguments.

    Raises:
        ImportError: the extension is there, but the op's kernel is not in it.
    """
    name = schema.partition("(")[0]
    qualified = f"{NAMESPACE}::{name}"
    _LIBRARY.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
    torch.library.register_fake(qualified, fake, lib=_LIBRARY)
    if cpu is not None:
        _LIBRARY.impl(name, _as_kernel(cpu), "CPU")
    elif HAS_CPU_KERNELS and not torch._C._dispatch_has_kernel_for_dispatch_key(
        qualified, "CPU"
    ):
        raise ImportError(
            f"{_EXTENSION} has no CPU kernel for {qualified}: it was built from other "
            f"sources. To build it again, {BUILD_EXTENSION}."
        )
    if cuda is not None:
        _LIBRARY.impl(name, _as_kernel(cuda), "CUDA")
    op = getattr(getattr(torch.ops, NAMESPACE), name).default
    if backward is not None:
        kernel = _differentiable(op, backward, setup_context, instead)
        _LIBRARY.impl(name, kernel, "Autograd")
    return op


def _as_kernel(function: Callable[..., Any]) -> Callable[..., Any]:
    """A Python function as torch calls its own kernels.

    On the first tensor's device, and without autocast, which would change the dtypes of
    what the function calls.
    """

    @functools.wraps(function)
    def kernel(first: torch.Tensor, *rest: Any) -> Any:
        device = first.device
        if torch.is_autocast_enabled(device.type):
            with torch.autocast(device.type, enabled=False):
                return kernel(first, *rest)
        if device.type == "cuda" and device.index != torch.cuda.current_device():
            with torch.cuda.device(device):
                return function(first, *rest)
        return function(first, *rest)

    return kernel


def refuse_second_derivative_of(
    name: str, instead: str = IN_FLOAT64
) -> Callable[..., NoReturn]:
    """The backward of an op that is the backward of another.

    Without one torch would warn and leave its gradient out.

    Args:
        name: of the other op.
        instead: what a caller can do who needs a second derivative: "pass ...".
    """

    def backward(ctx: Any, *grads: torch.Tensor) -> NoReturn:
        raise RuntimeError(
            f"{name} has no second derivative: its gradients cannot be differentiated. "
            f"To differentiate twice, {instead}."
        )

    return backward


def refuse_forward_mode(name: str, *args: Any, instead: str = IN_FLOAT64) -> None:
    """Refuse arguments with a tangent: torch would leave it out of the result.

    Args:
        name: of what is called with the arguments.
        args: of which the tensors are checked.
        instead: what a caller can do who needs a forward-mode derivative.

    Raises:
        NotImplementedError: a tensor has a tangent.
    """
    # Outside of forward mode nothing but this is done.
    if forward_ad._current_level < 0 or not torch._C._is_fwd_grad_enabled():
        return
    for arg in args:
        if (
            isinstance(arg, torch.Tensor)
            and forward_ad.unpack_dual(arg).tangent is not None
        ):
            raise NotImplementedError(
                f"{name} has no forward-mode derivative, but an argument of shape "
                f"{tuple(arg.shape)} has a tangent, as torch.func.jvp, jacfwd, hessian "
                "and torch.autograd.forward_ad give it. Use reverse mode, such as "
                "torch.func.vjp, torch.func.jacrev or torch.autograd.grad; or "
                f"{instead}."
            )


def _differentiable(
    op: Any,
    backward: Callable[..., Any],
    setup_context: Callable[..., Any] | None,
    instead: str,
) -> Callable[..., Any]:
    """The op for torch's Autograd key.

    `torch.library.register_autograd` would do the same, but takes host time in each
    call that grows with the square of the number of arguments: 0.07 ms for attention,
    for which a GPU may have to wait. Nor does it work under torch.func.
    """
    name = op._opname.removesuffix("_backward")

    def forward(ctx: Any, *args: Any) -> Any:
        output = below_autograd(*args)
        if setup_context is not None:
            setup_context(ctx, args, output)
        return output

    def below_autograd(*args: Any) -> Any:
        # Nor are a kernel's views of its own tensors views to autograd, which would
        # not let the op's results be changed in place.
        with torch._C._AutoDispatchBelowADInplaceOrView():
            return op(*args)

    def forward_in_transform(ctx: Any, *args: Any) -> Any:
        # torch.func's next transform is below: it differentiates in its own right.
        with torch.enable_grad(), forward_ad._set_fwd_grad_enabled(True):
            return forward(ctx, *args)

    def function_of(forward: Callable[..., Any]) -> Any:
        methods = {"forward": staticmethod(forward), "backward": staticmethod(backward)}
        return type(f"{op._opname}_function", (torch.autograd.Function,), methods)

    function, in_transform = function_of(forward), function_of(forward_in_transform)
    # Of one transform, to which torch.func has come when it calls this key.
    apply_in_transform = super(torch.autograd.Function, in_transform).apply

    def call(*args: Any) -> Any:
        refuse_forward_mode(name, *args, instead=instead)
        if not (torch.is_grad_enabled() and torch._C._any_requires_grad(*args)):
            return below_autograd(*args)
        if torch._C._are_functorch_transforms_active():
            with enable_single_level_autograd_function():
                return apply_in_transform(*args)
        return function.apply(*args)

    return call
