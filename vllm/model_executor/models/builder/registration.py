# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""How registrations enter the registry and reach every process of the engine.

`ModelRegistry` is local to a process. A registration made in the front end rides
in `ModelConfig.registered_models` to engine cores and workers, where
`synchronize`, called by the property `ModelConfig.registry` that every process
passes through, puts it back.
"""

import functools
import hashlib
import importlib
import inspect
import re
import uuid
from collections.abc import Callable, Iterable, Sequence
from operator import attrgetter
from types import ModuleType
from typing import TYPE_CHECKING, Any

import cloudpickle
from torch import nn

from vllm.logger import init_logger
from vllm.model_executor.models.builder.pipeline import check_stages
from vllm.model_executor.models.builder.spec import BuilderSpec, builder_name

if TYPE_CHECKING:
    from vllm.config import ModelConfig
    from vllm.model_executor.models.builder.model import RegisteredBuilder

logger = init_logger(__name__)

Target = str | type[nn.Module] | Callable[..., nn.Module]

_targets: dict[str, Target] = {}
"""What `register_model` was given in this process, by architecture."""


class SerializedRegistration:
    """One registration inside `ModelConfig`, pickled by value when it has to travel.

    Nothing is pickled while the engine stays in this process.

    Attributes:
        arch: The architecture.
        arrived: Whether it came from another process.
    """

    def __init__(self, arch: str, target: Target | None, payload: bytes | None = None):
        self.arch = arch
        self.arrived = payload is not None
        self._target = target
        self._payload = payload
        if self.arrived:
            _read_configs_of([arch])

    @property
    def target(self) -> Target:
        if self._target is None:
            assert self._payload is not None
            self._target = cloudpickle.loads(self._payload)
        return self._target

    @property
    def payload(self) -> bytes:
        """The pickled target; `TypeError` that names what cannot be pickled."""
        if self._payload is None:
            self._payload = serialize(self.arch, self.target)
        return self._payload

    @functools.cached_property
    def _uuid(self) -> str:
        try:
            # cloudpickle numbers classes at random, as 32 hexadecimal digits.
            stable = re.sub(rb"[0-9a-f]{32}", b"", self.payload)
        except TypeError:
            return uuid.uuid4().hex
        return hashlib.sha256(stable).hexdigest()

    def uuid(self) -> str:
        """This registration's part of the config's hash (compilation caches)."""
        return self._uuid

    def __reduce__(self) -> tuple:
        return SerializedRegistration, (self.arch, None, self.payload)

    def __deepcopy__(self, memo: dict) -> "SerializedRegistration":
        return self

    def __repr__(self) -> str:
        target = self._target if isinstance(self._target, str) else None
        if target is None and self._target is not None:
            target = builder_name(self._target)
        return f"SerializedRegistration({self.arch!r}, {target or 'not loaded'})"


def serialize(arch: str, target: Target) -> bytes:
    """Pickle a registration's target by value.

    Raises:
        TypeError: It cannot be pickled; the message names the captured objects
            that are to blame.
    """
    try:
        return cloudpickle.dumps(target)
    except Exception as error:
        culprits = ", ".join(_unpicklable(target)) or "an object it refers to"
        raise TypeError(
            f"The registration of architecture {arch!r} ({builder_name(target)}) "
            f"cannot be sent to the engine's processes: it captures {culprits} "
            f"({type(error).__name__}: {error}). Create such objects inside the "
            "builder, or register it lazily as 'module:name'."
        ) from error


def _unpicklable(target: Any) -> list[str]:
    """Names of the variables and attributes of `target` that cannot be pickled."""
    captured: dict[str, Any] = {}
    if isinstance(target, functools.partial):
        captured |= {f"argument {i}": value for i, value in enumerate(target.args)}
        captured |= target.keywords
        target = target.func
    if inspect.isfunction(target):
        variables = inspect.getclosurevars(target)
        captured |= {**variables.globals, **variables.nonlocals}
    else:
        captured |= getattr(target, "__dict__", {})
    found = []
    for name, value in captured.items():
        try:
            cloudpickle.dumps(value)
        except Exception:
            found.append(f"{name!r} ({type(value).__name__})")
    return found


def register(arch: str, target: Any) -> "RegisteredBuilder | None":
    """Called by `ModelRegistry.register_model` for every registration.

    Returns:
        The entry for a builder; None for what vLLM registers itself (a class or
        a lazy string) or refuses.

    Raises:
        TypeError: The builder requires a parameter that vLLM does not provide, or
            `target` is a module that has already been built.
    """
    is_class = isinstance(target, type)
    if isinstance(target, staticmethod):
        target = target.__func__
    entry = None
    if isinstance(target, nn.Module):
        raise TypeError(
            f"{arch!r} was registered with an instance of {type(target).__name__}. "
            "Every process of the engine makes its own: register the class, or a "
            "builder that returns a new module."
        )
    if callable(target) and not is_class:
        from vllm.model_executor.models.builder.model import RegisteredBuilder

        entry = RegisteredBuilder(BuilderSpec.of(target))
    elif isinstance(target, str):
        if target.count(":") != 1:
            return None
    elif not (is_class and issubclass(target, nn.Module)):
        return None
    if arch in _targets and _targets[arch] is not target:
        _forget_resolved_architectures()
    _targets[arch] = target
    return entry


def _forget_resolved_architectures() -> None:
    """Drop vLLM's cache of resolved classes, whose key lacks the registration."""
    from vllm.model_executor import vllm_internals

    vllm_internals.MODEL_ARCH_BY_HASH.clear()


def from_lazy(module: ModuleType, qualname: str) -> type[nn.Module] | None:
    """Called when a lazy `"module:qualname"` is loaded.

    Returns:
        The class to serve; None where vLLM's own `getattr` finds the class.

    Raises:
        AttributeError: The module defines no such name.
        TypeError: It is neither a model class nor a builder.
    """
    if isinstance(getattr(module, qualname, None), type):
        return None
    try:
        target = attrgetter(qualname)(module)
    except AttributeError as error:
        raise AttributeError(
            f"module {module.__name__!r} defines no {qualname!r}: {error}"
        ) from error
    if isinstance(target, type) and issubclass(target, nn.Module):
        return target
    if not callable(target):
        raise TypeError(
            f"'{module.__name__}:{qualname}' is a {type(target).__name__}; a model "
            "registration names a torch.nn.Module class or a builder (a callable)."
        )
    from vllm.model_executor.models.builder.model import model_class

    return model_class(BuilderSpec.of(target))


def explain_failure(architectures: Sequence[str]) -> None:
    """Called before vLLM reports that it cannot use `architectures`.

    Raises:
        ValueError: One is registered lazily and does not load; says why.
    """
    for arch in architectures:
        target = _targets.get(arch)
        if not isinstance(target, str):
            continue
        try:
            module, _, qualname = target.partition(":")
            from_lazy(importlib.import_module(module), qualname)
        except Exception as error:
            raise ValueError(
                f"Architecture {arch!r} is registered as {target!r}, which does not "
                f"load: {type(error).__name__}: {error}. The module must be importable "
                "in the engine's processes (PYTHONPATH) and define that name."
            ) from error


def synchronize(model_config: "ModelConfig") -> None:
    """Carry registrations between this process's registry and `model_config`.

    A registration of one of the model's architectures that was made in this
    process is noted in the config. One that came with the config from another process
    is made here, also where a plugin has registered something else. The first call
    also says what `dtype="auto"` is.
    """
    from vllm.model_executor.models.builder.config import choose_dtype
    from vllm.model_executor.models.registry import ModelRegistry

    carried = model_config.registered_models
    for arch in model_config.architectures:
        if arch in carried:
            registration = carried[arch]
            if registration.arrived and _targets.get(arch) is not registration.target:
                logger.debug("Restoring the registration %s", registration)
                ModelRegistry.register_model(arch, registration.target)
        elif arch in _targets and _can_travel(_targets[arch]):
            carried[arch] = SerializedRegistration(arch, _targets[arch])
    target = next(filter(None, map(_targets.get, model_config.architectures)), None)
    if target is not None:
        choose_dtype(model_config, not isinstance(target, type))


def _can_travel(target: Target) -> bool:
    """Whether a registration is noted in the config.

    A class that cannot be pickled is not, and stays in the process that registered
    it, as ever. A builder always is; it is refused when it has to leave the process.
    """
    if not isinstance(target, type):
        return True
    try:
        cloudpickle.dumps(target)
    except Exception:
        return False
    return True


def before_config_is_read(model_config: "ModelConfig") -> None:
    """Called first when a `ModelConfig` is made, before the model's config is read."""
    model_config._maybe_register_model_class_overrides()
    if _targets:
        _read_configs_of(_targets)


def verify_stages(model_config: "ModelConfig", parallel_config: Any) -> None:
    """Called when a `ModelConfig` is checked against the engine's `ParallelConfig`.

    Classes are vLLM's to check, and so are lazy strings, which are not imported here.

    Raises:
        ValueError: Several pipeline stages are asked for, and the builder does not
            build stages or the model has fewer layers.
    """
    from vllm.model_executor.models.builder.model import RegisteredBuilder

    stages = parallel_config.pipeline_parallel_size
    models = model_config.registry.models
    entry = next(filter(None, map(models.get, model_config.architectures)), None)
    if stages == 1 or not isinstance(entry, RegisteredBuilder):
        return
    spec = entry.model_cls.spec
    if not spec.options.supports_pp:
        raise ValueError(
            f"pipeline_parallel_size={stages}, but the builder {spec.name} "
            "builds whole models. Let it build single stages (PipelineLayers in "
            "vllm.model_executor.models.builder) and say so with "
            "@model_builder(supports_pp=True), or use tensor_parallel_size."
        )
    check_stages(model_config.hf_text_config.num_hidden_layers, stages)


def _read_configs_of(architectures: Iterable[str]) -> None:
    from vllm.model_executor.models.builder.config import read_configs_of

    read_configs_of(architectures)
