# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""Elementwise functions as ops that torch.compile leaves alone.

A compiler writes loops of its own for `exp` or `silu`, whose results differ from those
of eager torch in the last bit. As an op, such a function has one result, eager and
compiled. Correctly rounded operations, such as sums and products, need no op: each has
one right result, if the compiler rounds after each of them
(`torch._inductor.config.emulate_precision_casts`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F

from vllm.model_executor.determinism.pointwise import on_whole_vectors
from vllm.model_executor.op_library import define_op


def _gelu_tanh(x: torch.Tensor) -> torch.Tensor:
    return F.gelu(x, approximate="tanh")


def _power_of(x: torch.Tensor, base: float) -> torch.Tensor:
    return torch.pow(base, x)


# The function of an op's name, called with the tensor and the op's numbers.
_OF_ONE_TENSOR = (
    *("acos", "acosh", "asin", "asinh", "atan", "atanh", "cos", "cosh", "sin", "sinh"),
    *("tan", "tanh", "erf", "erfc", "exp", "exp2", "expm1", "log", "log10", "log1p"),
    *("log2", "rsqrt", "sqrt", "square", "sigmoid"),
)
_FUNCTIONS: dict[str, Callable[..., torch.Tensor]] = {
    **{name: getattr(torch, name) for name in _OF_ONE_TENSOR},
    **{name: getattr(F, name) for name in ("logsigmoid", "mish", "silu")},
    "gelu": F.gelu,
    "gelu_tanh": _gelu_tanh,
    "elu": F.elu,
    "celu": F.celu,
    "softplus": F.softplus,
    "pow": torch.pow,
    "rpow": _power_of,
}


def called(func: Callable[..., Any], args: Sequence[Any], kwargs: Any) -> Any:
    """Call an elementwise function of torch, or an in-place form of one.

    Args:
        func: the function.
        args: its positional arguments.
        kwargs: its other arguments, without `out`.

    Returns:
        What the function returns; NotImplemented if torch's own call is right.

    Raises:
        NotImplementedError: while torch.compile traces: the function, or this form of
            it, has no op.
    """
    if torch.compiler.is_compiling():
        return _as_op(func.__name__, args, kwargs)
    return on_whole_vectors(func, args, kwargs)


def glu(input: torch.Tensor, dim: int = -1) -> Any:
    """`torch.nn.functional.glu`: the first half times the sigmoid of the second."""
    if not input.ndim or input.shape[dim] % 2:
        return NotImplemented
    first, second = input.chunk(2, dim)
    if torch.compiler.is_compiling():
        return first * _as_op("sigmoid", (second,), {})
    return on_whole_vectors(_glu_of_halves, (first, second), {})


def _glu_of_halves(first: torch.Tensor, second: torch.Tensor) -> torch.Tensor:
    return F.glu(torch.cat((first, second)), 0)


def exp(x: torch.Tensor) -> torch.Tensor:
    return _of_one(torch.exp, x)


def log(x: torch.Tensor) -> torch.Tensor:
    return _of_one(torch.log, x)


def sqrt(x: torch.Tensor) -> torch.Tensor:
    return _of_one(torch.sqrt, x)


def _of_one(func: Callable[..., Any], x: torch.Tensor) -> torch.Tensor:
    result = called(func, (x,), {})
    return func(x) if result is NotImplemented else result


def _as_op(name: str, args: Sequence[Any], kwargs: Any) -> Any:
    read, plain, changes_input = _FORMS.get(name, (_no_form, name, False))
    call = read(plain, *args, **kwargs)
    if call is None:
        tensors = [x for x in (*args, *kwargs.values()) if isinstance(x, torch.Tensor)]
        if not any(x.is_floating_point() or x.is_complex() for x in tensors):
            return NotImplemented  # of integers each result is exact
        raise NotImplementedError(
            f"torch.{name} with these arguments has no form whose bits are alike eager "
            "and compiled. In batch-invariant mode, run the model without "
            "torch.compile, or compute it from other functions."
        )
    x, op_name, numbers, in_place = call
    numbers = [float(number) for number in numbers]
    if in_place or changes_input:
        # The backward needs what was there before.
        return x.copy_(_elementwise(x.clone(), op_name, numbers))
    return _elementwise(x, op_name, numbers)


_Called = tuple[torch.Tensor, str, Sequence[float], bool]


def _no_form(name: str, *args: Any, **kwargs: Any) -> None:
    return None


def _of_tensor(name: str, input: torch.Tensor, inplace: bool = False) -> _Called:
    return input, name, (), inplace


def _gelu(name: str, input: torch.Tensor, approximate: str = "none") -> _Called:
    return input, "gelu" if approximate == "none" else "gelu_tanh", (), False


def _softplus(
    name: str, input: torch.Tensor, beta: float = 1, threshold: float = 20
) -> _Called:
    return input, name, (beta, threshold), False


def _elu(
    name: str, input: torch.Tensor, alpha: float = 1.0, inplace: bool = False
) -> _Called:
    return input, name, (alpha,), inplace


def _pow(name: str, input: Any, exponent: Any) -> _Called | None:
    if not isinstance(exponent, torch.Tensor):
        return input, "pow", (exponent,), False
    return (
        None if isinstance(input, torch.Tensor) else (exponent, "rpow", (input,), False)
    )


def _rpow(name: str, exponent: torch.Tensor, base: Any) -> _Called | None:
    if isinstance(base, torch.Tensor):
        return None
    return exponent, "rpow", (base,), False


def _log_sigmoid(name: str, input: torch.Tensor) -> _Called:
    return input, "logsigmoid", (), False


def _expit(name: str, input: torch.Tensor) -> _Called:
    return input, "sigmoid", (), False


_READ: dict[str, Callable[..., _Called | None]] = {
    **dict.fromkeys((*_OF_ONE_TENSOR, "mish", "silu"), _of_tensor),
    "gelu": _gelu,
    "softplus": _softplus,
    "elu": _elu,
    "celu": _elu,
    "log_sigmoid": _log_sigmoid,
    "special_expit": _expit,
    "pow": _pow,
}
# By the names of a function's forms: how its arguments are read, its own name, and
# whether it changes its first tensor.
_FORMS: dict[str, tuple[Callable[..., _Called | None], str, bool]] = {
    **{name: (read, name, False) for name, read in _READ.items()},
    **{f"{name}_": (read, name, True) for name, read in _READ.items()},
    "__rpow__": (_rpow, "rpow", False),
}


def _call(x: torch.Tensor, name: str, numbers: list[float]) -> torch.Tensor:
    result = on_whole_vectors(_FUNCTIONS[name], (x, *numbers), {})
    if result is NotImplemented:
        return _FUNCTIONS[name](x, *numbers)
    # An op's result is a tensor of its own.
    return result.clone() if result is x else result


def _gradient(
    grad: torch.Tensor, x: torch.Tensor, name: str, numbers: list[float]
) -> torch.Tensor:
    with torch.enable_grad():
        variable = x.detach().requires_grad_()
        (result,) = torch.autograd.grad(
            _FUNCTIONS[name](variable, *numbers), variable, grad
        )
    return result


def _setup_context(ctx: Any, inputs: Any, output: torch.Tensor) -> None:
    x, ctx.name, ctx.numbers = inputs
    ctx.save_for_backward(x)


def _backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None, None]:
    (x,) = ctx.saved_tensors
    return _elementwise_backward(grad, x, ctx.name, ctx.numbers), None, None


_elementwise = define_op(
    "elementwise(Tensor x, str name, float[] numbers) -> Tensor",
    fake=lambda x, name, numbers: _FUNCTIONS[name](x, *numbers),
    cpu=_call,
    cuda=_call,
    backward=_backward,
    setup_context=_setup_context,
)
_elementwise_backward = define_op(
    "elementwise_backward(Tensor grad, Tensor x, str name, float[] numbers) -> Tensor",
    fake=lambda grad, x, name, numbers: torch.empty_like(x),
    cpu=_gradient,
    cuda=_gradient,
)
