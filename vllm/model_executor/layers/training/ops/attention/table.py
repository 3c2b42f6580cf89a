# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""The table of attention implementations, and how one is chosen.

A forward and a backward can be combined because both mean the same by lse: the natural
logarithm of the softmax's sum, sink included, fp32, shape = [num_heads, num_tokens].
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any, NamedTuple

import torch

from vllm.logger import init_logger
from vllm.model_executor import vllm_internals
from vllm.model_executor.layers.training.ops.attention import (
    cpu,
    reference,
    torch_flash,
    vllm_flash,
    vllm_triton,
)
from vllm.model_executor.layers.training.ops.attention.call import AttentionSpec
from vllm.model_executor.layers.training.ops.attention.triton_backward import (
    attention_backward_triton,
)
from vllm.model_executor.layers.training.ops.attention.triton_forward import (
    attention_forward_triton,
)
from vllm.model_executor.op_library import (
    HAS_CPU_KERNELS,
    KERNEL_DTYPES,
    SUPPORTED_DTYPES,
)
from vllm.triton_utils import HAS_TRITON

logger = init_logger(__name__)

HALF_DTYPES = (torch.bfloat16, torch.float16)

NO_ALIBI = frozenset({"non_causal", "sliding_window", "logits_soft_cap", "sinks"})
ALL_FEATURES = NO_ALIBI | {"alibi_slopes"}


_capability = functools.cache(torch.cuda.get_device_capability)


class Request(NamedTuple):
    """What has to be computed, as far as it decides which kernels can.

    A tuple, because each call of the op makes one and looks up what was chosen for it.

    Attributes:
        device_type: torch's device type.
        capability: CUDA's compute capability; (0, 0) on other devices.
        dtype: of query, key and value.
        num_heads: query heads.
        head_size: size of a head.
        features: those of ALL_FEATURES that it has.
        deterministic: gradients must be equal bit for bit from run to run.
        batch_invariant: the output must have the bits of a batch-invariant engine.
    """

    device_type: str
    capability: tuple[int, int]
    dtype: torch.dtype
    num_heads: int
    head_size: int
    features: tuple[str, ...]
    deterministic: bool
    batch_invariant: bool = False

    @classmethod
    def of(
        cls,
        device: torch.device,
        dtype: torch.dtype,
        num_heads: int,
        head_size: int,
        spec: AttentionSpec,
        *,
        sinks: bool,
        alibi_slopes: bool,
        deterministic: bool,
        batch_invariant: bool,
    ) -> Request:
        """That of attention with a spec, and with sinks and slopes or without."""
        features = []
        if not spec.causal:
            features.append("non_causal")
        if spec.sliding_window:
            features.append("sliding_window")
        if spec.logits_soft_cap:
            features.append("logits_soft_cap")
        if sinks:
            features.append("sinks")
        if alibi_slopes:
            features.append("alibi_slopes")
        return cls(
            device.type,
            _capability(device) if device.type == "cuda" else (0, 0),
            dtype,
            num_heads,
            head_size,
            tuple(features),
            deterministic,
            batch_invariant,
        )

    def __str__(self) -> str:
        device = self.device_type
        if self.capability[0]:
            device += f" (sm{self.capability[0]}{self.capability[1]})"
        parts = [str(self.dtype), f"head_size={self.head_size}", *self.features]
        if self.deterministic:
            parts.append("deterministic")
        if self.batch_invariant:
            parts.append("batch_invariant")
        return f"{', '.join(parts)} on {device}"


@dataclass(frozen=True)
class Kernel:
    """A forward or a backward.

    Attributes:
        function: arguments and results as of `reference.forward` or
            `reference.backward`, of which the last is the call.
        device_type: where it runs; None: everywhere.
        capabilities: major compute capabilities that it runs on; None: all.
        dtypes: of query, key and value.
        features: those that it has.
        max_head_size: the largest head; None: any.
        head_size_multiple: what head sizes are multiples of.
        deterministic: it gives the same bits in each run; None: if the call says so.
        batch_invariant: of a forward: an engine's backend has its bits.
        limit: says why it cannot compute a request for a reason of its own.
    """

    function: Callable[..., Any]
    device_type: str | None = "cuda"
    capabilities: tuple[int, ...] | None = None
    dtypes: tuple[torch.dtype, ...] = HALF_DTYPES
    features: frozenset[str] = ALL_FEATURES
    max_head_size: int | None = 256
    head_size_multiple: int = 1
    deterministic: bool | None = True
    batch_invariant: bool = False
    limit: Callable[[Request], str | None] = lambda request: None

    def objection(self, request: Request) -> str | None:
        """Why it cannot compute a request; None if it can."""
        if self.device_type not in (None, request.device_type):
            return f"runs on {self.device_type}"
        majors = self.capabilities
        if majors is not None and request.capability[0] not in majors:
            return f"runs on {', '.join(f'sm{major}x' for major in majors)}"
        if request.dtype not in self.dtypes:
            return f"takes {', '.join(map(str, self.dtypes))}"
        missing = [name for name in request.features if name not in self.features]
        if missing:
            return f"has no {', no '.join(missing)}"
        size, largest = request.head_size, self.max_head_size
        if largest is not None and size > largest:
            return f"takes heads of at most {largest}"
        if size % self.head_size_multiple:
            return f"takes head sizes that are multiples of {self.head_size_multiple}"
        if request.deterministic and self.deterministic is False:
            return "is not deterministic"
        return self.limit(request)


@functools.cache
def _flash_attention_missing(version: int) -> str | None:
    try:
        reason = vllm_internals.flash_attention().fa_version_unsupported_reason(version)
    except ImportError as error:
        reason = str(error)
    return f"is not installed ({reason})" if reason else None


@functools.cache
def _cute_missing() -> str | None:
    missing = [name for name in ("cutlass", "quack") if find_spec(name) is None]
    if missing:
        return f"needs nvidia-cutlass-dsl and quack-kernels; {missing[0]} is missing"
    return _flash_attention_missing(4)


def _limit_fa3(request: Request) -> str | None:
    # Its blocks of keys begin where the window of their first query begins, and which
    # query that is depends on where the engine's step cut the request.
    if request.batch_invariant and "sliding_window" in request.features:
        return (
            "depends on the batch with a sliding_window; the Triton backend does not: "
            "LLM(attention_backend='TRITON_ATTN'), implementation='vllm_triton'"
        )
    if "sinks" in request.features and request.dtype != torch.bfloat16:
        return "takes sinks in torch.bfloat16"
    if "sinks" in request.features and request.num_heads > 64:
        return "takes sinks of at most 64 heads"
    return _flash_attention_missing(3)


# Of FA4 on sm90: its backward was wrong for heads of 80 and did not compile for 192
# and 8 (vLLM 0.32.0, H200).
_FA4_HEAD_SIZES = (32, 64, 96, 128, 256)


def _limit_fa4(request: Request) -> str | None:
    """Of its forward and its backward; on sm100 as its interface checks head sizes."""
    if request.capability[0] == 9 and request.head_size not in _FA4_HEAD_SIZES:
        return f"takes heads of {', '.join(map(str, _FA4_HEAD_SIZES))} on sm90"
    if request.capability[0] > 9 and 128 < request.head_size != 256:
        return "takes heads of at most 128, or of 256, on sm100"
    if request.capability[0] > 9 and request.head_size == 256:
        for feature in ("logits_soft_cap", "sinks"):
            if feature in request.features:
                return f"has no {feature} for heads of 256 on sm100"
    return _cute_missing()


def _limit_triton(request: Request) -> str | None:
    return None if HAS_TRITON else "needs triton, which is not installed"


def _limit_vllm_triton(request: Request) -> str | None:
    if request.head_size < 32:
        return "takes heads of at least 32"
    # There the engine's kernel visits more keys at a time in prefill than in decode.
    if request.head_size == 256 and request.capability[0] == 10:
        return "takes no heads of 256 on sm10x"
    return _limit_triton(request)


def _limit_cpu(request: Request) -> str | None:
    return None if HAS_CPU_KERNELS else "needs the extension, which is not built"


def _limit_vllm_cpu(request: Request) -> str | None:
    vllm = vllm_internals.cpu_attention()
    if not vllm.is_built:
        return "needs vLLM's build for CPU"
    if request.head_size not in vllm.head_sizes:
        return f"takes head sizes {', '.join(map(str, vllm.head_sizes))}"
    return _limit_cpu(request)


_flash = functools.partial(Kernel, head_size_multiple=8, features=NO_ALIBI)
_torch_flash = functools.partial(
    Kernel,
    capabilities=(8, 9, 10, 11, 12),
    head_size_multiple=8,
    features=frozenset({"non_causal", "sliding_window"}),
)
_triton = functools.partial(Kernel, dtypes=KERNEL_DTYPES, limit=_limit_triton)
_cpu = functools.partial(Kernel, device_type="cpu", dtypes=KERNEL_DTYPES)
_reference = functools.partial(
    Kernel, device_type=None, dtypes=SUPPORTED_DTYPES, max_head_size=None
)

FORWARDS = {
    "fa3": _flash(
        functools.partial(vllm_flash.forward, version=3),
        capabilities=(9,),
        batch_invariant=True,
        limit=_limit_fa3,
    ),
    "fa4": _flash(
        functools.partial(vllm_flash.forward, version=4),
        capabilities=(9, 10, 11),
        limit=_limit_fa4,
    ),
    "torch_flash": _torch_flash(torch_flash.forward),
    "triton": _triton(attention_forward_triton),
    # Its products of fp32 are in TF32, as the engine's.
    "vllm_triton": Kernel(
        vllm_triton.forward,
        dtypes=KERNEL_DTYPES,
        features=NO_ALIBI - {"non_causal"},
        batch_invariant=True,
        limit=_limit_vllm_triton,
    ),
    "cpu": _cpu(cpu.forward, limit=_limit_cpu),
    "vllm_cpu": _cpu(
        cpu.forward_vllm,
        features=ALL_FEATURES - {"non_causal"},
        batch_invariant=True,
        limit=_limit_vllm_cpu,
    ),
    "reference": _reference(reference.forward),
}
BACKWARDS = {
    "fa4": _flash(
        vllm_flash.backward,
        capabilities=(9, 10, 11),
        deterministic=None,
        limit=_limit_fa4,
    ),
    "torch_flash": _torch_flash(torch_flash.backward, deterministic=False),
    "triton": _triton(attention_backward_triton),
    "cpu": _cpu(cpu.backward, limit=_limit_cpu),
    "reference": _reference(reference.backward),
}

# Name: forward and backward. The first that can is the default. fa3, fa3_triton,
# vllm_triton and vllm_cpu have the bits of a batch-invariant engine and are all that
# its mode takes.
IMPLEMENTATIONS = {
    "fa3": ("fa3", "fa4"),
    "fa4": ("fa4", "fa4"),
    "fa3_triton": ("fa3", "triton"),
    "torch_flash": ("torch_flash", "torch_flash"),
    "triton": ("triton", "triton"),
    "vllm_triton": ("vllm_triton", "triton"),
    "cpu": ("cpu", "cpu"),
    "vllm_cpu": ("vllm_cpu", "cpu"),
    "reference": ("reference", "reference"),
}


def default_for(request: Request) -> str | None:
    """Name of the first implementation that can compute a request; None: none can."""
    return next((n for n in IMPLEMENTATIONS if not objections(n, request)), None)


def choose(request: Request, name: str = "") -> tuple[Kernel, Kernel]:
    """The forward and the backward for a request.

    Args:
        name: of an implementation; empty: the first that can.

    Raises:
        ValueError: the implementation cannot, or there is none of the name.
    """
    if name:
        check_name(name)
        reasons = objections(name, request)
        if reasons:
            able = [n for n in IMPLEMENTATIONS if not objections(n, request)]
            raise ValueError(
                f"Attention implementation {name!r} cannot compute {request}: "
                f"{'; '.join(reasons)}. Those that can: {', '.join(able) or 'none'}."
            )
    else:
        name = default_for(request) or ""
        if not name:
            raise ValueError(_refusal(request))
    _log_choice(name, request.device_type, ", ".join(request.features) or "none")
    forward, backward = IMPLEMENTATIONS[name]
    return FORWARDS[forward], BACKWARDS[backward]


def check_name(name: str) -> None:
    """Raise ValueError if there is no implementation of the name."""
    if name not in IMPLEMENTATIONS:
        raise ValueError(
            f"implementation={name!r} is not one of {', '.join(IMPLEMENTATIONS)}; "
            "None chooses the first that can."
        )


def objections(name: str, request: Request) -> list[str]:
    """Why an implementation cannot compute a request; empty if it can."""
    forward, backward = IMPLEMENTATIONS[name]
    reasons = {
        f"the forward {forward!r}": FORWARDS[forward].objection(request),
        f"the backward {backward!r}": BACKWARDS[backward].objection(request),
    }
    if request.batch_invariant and not FORWARDS[forward].batch_invariant:
        reasons["its output"] = "has not the bits of the engine"
    return [f"{kernel} {reason}" for kernel, reason in reasons.items() if reason]


def _refusal(request: Request) -> str:
    """That none can, and why not those of its device and its mode."""
    reasons = [
        f"{name}: {'; '.join(objections(name, request))}"
        for name, (forward, _) in IMPLEMENTATIONS.items()
        if FORWARDS[forward].device_type in (None, request.device_type)
        and (FORWARDS[forward].batch_invariant or not request.batch_invariant)
    ]
    return f"No attention implementation can compute {request}. {'. '.join(reasons)}."


@functools.cache
def _log_choice(name: str, device_type: str, features: str) -> None:
    forward, backward = IMPLEMENTATIONS[name]
    logger.info(
        "Attention for training runs on %r: forward %s, backward %s (device: %s; "
        "features: %s).",
        name,
        forward,
        backward,
        device_type,
        features,
    )
