# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""What a module calls, found by a forward of a few tokens.

The forward runs on fake tensors, which have shapes and no values: neither the
module's weights nor the time of a real forward are needed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any, NamedTuple

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode, unset_fake_temporarily
from torch.nn.modules.module import (
    register_module_forward_hook,
    register_module_forward_pre_hook,
)
from torch.overrides import TorchFunctionMode

from vllm.model_executor import vllm_internals
from vllm.model_executor.checkpoint.wrappers import join, own_tensors
from vllm.model_executor.determinism.row_independence import UnknownFunctions
from vllm.model_executor.models.builder.adopt import (
    torch_attention,
    written_attention,
)
from vllm.model_executor.models.builder.adopt.attention import AttentionSite
from vllm.model_executor.models.builder.adopt.flex_attention import without_compiler
from vllm.model_executor.models.builder.adopt.known_values import KnownValues
from vllm.model_executor.models.builder.adopt.linear_calls import LinearCalls
from vllm.model_executor.models.builder.adopt.masks import (
    MOST_IN_TRAINER,
    visible,
    window_of,
)
from vllm.model_executor.models.builder.adopt.written_attention import Scores
from vllm.model_executor.models.builder.counting import (
    Counting,
    CountingRecorder,
    compare,
)
from vllm.model_executor.models.builder.merged_linears import LinearGroup

_TOKENS = 6
_LONGEST_MASK = 16384

# By calling module, in the order of the calls that one forward of it makes.
Sites = dict[nn.Module, list[AttentionSite]]
Groups = dict[nn.Module, list[LinearGroup]]


class Calls(NamedTuple):
    """What a forward calls.

    Attributes:
        attention: By module, what it asks of attention.
        linears: By module, children of it that are called with one tensor.
        has_masks: Whether one of them is given a mask as a tensor.
        unknown: Path of a module and the function of torch that it calls, where a
            token's row may depend on the batch.
    """

    attention: Sites
    linears: Groups
    has_masks: bool
    unknown: tuple[tuple[str, str], ...]


def find_calls(
    module: nn.Module,
    call: Callable[[torch.Tensor, torch.Tensor], Any],
    transformers: Any = None,
) -> Calls:
    """Every call of attention in a forward, and linear layers of one input.

    Args:
        module: Any module, also one on the meta device.
        call: Calls it with packed token ids and positions, shape = [num_tokens].
        transformers: `transformers_attention`, for one of transformers' models.

    Raises:
        ValueError: Attention is called in a way that cannot be trained and served.
    """
    contiguous = False
    try:
        calls = _find_calls(module, call, transformers, contiguous)
    except ValueError:
        # Columns of a merged product are apart, which a `view` may not allow.
        contiguous = True
        calls = _find_calls(module, call, transformers, contiguous)
    if not calls.has_masks:
        return calls
    *lengths, last = _lengths_with_masks()
    for length in lengths:
        try:
            return _find_calls(module, call, transformers, contiguous, length)
        except ValueError:  # It may be longer than what the module takes.
            continue
    return _find_calls(module, call, transformers, contiguous, last)


def _lengths_with_masks() -> tuple[int, ...]:
    """Numbers of tokens to look at masks of; the first that a module takes is enough.

    In a trainer, masks are checked in each call. In an engine they are not computed.

    Raises:
        ValueError: In the engine sequences are so long that no such mask can be made.
    """
    longest = _longest_in_engine()
    if longest is None:
        return (MOST_IN_TRAINER, 256, 64, _TOKENS)
    if longest > _LONGEST_MASK:
        raise ValueError(
            "attention is called with a mask as a tensor. Its values cannot be checked "
            f"for sequences of {longest} tokens. Use is_causal=True and no mask, or "
            f"start with max_model_len={_LONGEST_MASK}."
        )
    return (longest,)


def _longest_in_engine() -> int | None:
    """Length of the longest sequence of the engine that builds a model, if one does."""
    config = vllm_internals.get_current_vllm_config_or_none()
    if config is None or config.model_config is None:
        return None
    return config.model_config.max_model_len


def _check_unknown_mask() -> None:
    """Refuse, in an engine, a mask that only the trainer can check."""
    if _longest_in_engine() is not None:
        raise ValueError(
            "attention is called with a mask that depends on token ids, weights or a "
            "buffer without values, so it is not known to be causal. Make it from the "
            "number of tokens or from positions, or use is_causal=True and no mask."
        )


def _find_calls(
    module: nn.Module,
    call: Callable[[torch.Tensor, torch.Tensor], Any],
    transformers: Any,
    contiguous: bool,
    num_tokens: int = _TOKENS,
) -> Calls:
    sites: Sites = {}
    paths = {part: path for path, part in module.named_modules()}

    # Of the latest forward of a module: one in several places runs several times.
    latest: dict[nn.Module, list[AttentionSite]] = {}

    def begin(caller: nn.Module, args: Any) -> None:
        latest[caller] = []

    def record(caller: nn.Module, site: AttentionSite) -> None:
        latest[caller].append(site)
        if len(latest[caller]) > len(sites.get(caller, ())):
            sites[caller] = latest[caller]

    unknown: dict[tuple[str, str], None] = {}

    def report(function: str, op: str) -> None:
        inside = [paths[part] for part in running if part in paths]
        unknown[inside[-1] if inside else "", f"{function} ({op})"] = None

    linears = LinearCalls(module, contiguous)
    with (
        register_module_forward_pre_hook(begin),
        running_modules(linears) as running,
        paths_in_errors(running, paths),
    ):
        recorded = transformers.recorded(module, record) if transformers else None
        known = KnownValues()
        recorder = _Recorder(running, record, linears, known, num_tokens)
        with recorded or nullcontext(), UnknownFunctions(report), recorder:
            run_on_fake_tensors(module, call, num_tokens, known)
            recorder.finish()
    return Calls(sites, linears.groups(), recorder.has_masks, tuple(unknown))


def find_counting(
    module: nn.Module, call: Callable[[torch.Tensor, torch.Tensor], Any]
) -> Counting | None:
    """How a module counts its tokens; None if it does not.

    Args:
        module: Any module, also one on the meta device.
        call: Calls it with packed token ids and positions, shape = [num_tokens].

    Raises:
        ValueError: It cannot be called.
    """
    recorders = [CountingRecorder(_TOKENS), CountingRecorder(_TOKENS + 1)]
    for recorder in recorders:

        def recorded(*tokens: torch.Tensor, recorder: Any = recorder) -> None:
            with recorder:
                call(*tokens)

        with paths_in_errors([], {}):
            run_on_fake_tensors(module, recorded, recorder.num_tokens)
    return compare(*recorders)


class _Recorder(TorchFunctionMode):
    """Records calls of torch's attention and computes none."""

    def __init__(
        self,
        running: list[nn.Module],
        record: Callable[[nn.Module, AttentionSite], None],
        linears: LinearCalls,
        known: KnownValues,
        num_tokens: int,
    ) -> None:
        super().__init__()
        self.running, self.record, self.linears = running, record, linears
        self.known, self.has_masks = known, False
        self.num_tokens = num_tokens
        self.scores: Scores | None = None
        self.caller: nn.Module | None = None

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        if not torch_attention.is_attention(func):
            if self.running:
                self.linears.use(self.running[-1], (*args, *kwargs.values()))
            return self._written(func, args, kwargs)
        site, mask = torch_attention.read_call(func, args, kwargs)
        if mask is not None:
            self.has_masks = True
            value = self.known.value(mask)
            if value is not None:
                site = site._replace(sliding_window=_window_of(value))
            else:
                _check_unknown_mask()
        self.record(self.running[-1], site)
        query = args[0] if args else kwargs["query"]
        output = query.new_zeros(*query.shape[:-1], site.value_size)
        return torch_attention.result(func, output)

    def _written(self, func: Any, args: Any, kwargs: Any) -> Any:
        """A function that may belong to attention that is written out."""
        scores, known = self.scores, self.known
        if scores is None:
            if not written_attention.starts(func, args):
                return func(*args, **kwargs)
            tokens = {args[0].shape[2], args[1].shape[3]}
            if tokens != {self.num_tokens}:
                return func(*args, **kwargs)
            self.scores = Scores(args[0], args[1], known.value)
            self.caller = self.running[-1]
            return self.scores.stand_in
        if not scores.are_multiplied(func, args):
            if scores.are_in((args, kwargs)):
                return scores.apply(func, args, kwargs)
            return func(*args, **kwargs)
        self.has_masks, self.scores = True, None
        if not scores.is_known:
            _check_unknown_mask()
        with unset_fake_temporarily(), torch._C.DisableTorchFunction():
            scale, cap = written_attention.scale_and_cap(scores.functions)
            window = scores.window()
        site = AttentionSite.of(
            scores.query,
            scores.key,
            args[1],
            scale,
            sliding_window=window,
            logits_soft_cap=cap,
            written=tuple(scores.functions),
        )
        assert self.caller is not None
        self.record(self.caller, site)
        return args[1].new_zeros(*scores.query.shape[:-1], site.value_size)

    def finish(self) -> None:
        """The forward has ended.

        Raises:
            ValueError: Something else was done with scores.
        """
        if self.scores is not None:
            raise ValueError(torch_attention.UNFINISHED)


def _window_of(mask: torch.Tensor) -> int | None:
    with unset_fake_temporarily(), torch._C.DisableTorchFunction():
        return window_of(visible(mask))


def run_on_fake_tensors(
    module: nn.Module,
    call: Callable[[torch.Tensor, torch.Tensor], Any],
    num_tokens: int = _TOKENS,
    known: KnownValues | None = None,
) -> None:
    """Call a function of token ids and positions while a module's tensors are fake.

    Args:
        module: The module.
        call: The function.
        num_tokens: How many tokens there are.
        known: Learns the values of buffers and positions.
    """
    # In an engine, torch's default device is not the CPU.
    fake = FakeTensorMode(allow_non_fake_inputs=True)
    with fake, torch.device("cpu"), torch.no_grad(), without_compiler():
        tensors = _fake_tensors(module)
        input_ids = torch.zeros(num_tokens, dtype=torch.int64)
        positions = torch.arange(num_tokens)
        if known is not None:
            with unset_fake_temporarily():
                places = torch.arange(num_tokens)
            known.learn(positions, places)
            for name, value in module.named_buffers(prefix="module"):
                known.learn(tensors[name], value)
        was_training = {part: part.training for part in module.modules()}
        module.eval()
        try:
            caller = _Caller(module, call)
            # Tied here: torch would leave a module of two places with fake tensors.
            with known or nullcontext():
                torch.func.functional_call(
                    caller, tensors, (input_ids, positions), tie_weights=False
                )
        finally:
            for part, training in was_training.items():
                part.training = training


def _fake_tensors(module: nn.Module) -> dict[str, torch.Tensor]:
    """What stands for parameters and buffers, by the name of one place of each."""
    fakes: dict[int, torch.Tensor] = {}
    tensors = {}
    for path, part in module.named_modules(prefix="module"):
        for name, tensor in own_tensors(part, persistent=False):
            if id(tensor) not in fakes:
                fakes[id(tensor)] = torch.empty_strided(
                    tensor.shape, tensor.stride(), dtype=tensor.dtype, device="cpu"
                )
            tensors[join(path, name)] = fakes[id(tensor)]
    return tensors


class _Caller(nn.Module):
    """Calls a module in a way of one's own."""

    def __init__(self, module: nn.Module, call: Callable[..., Any]) -> None:
        super().__init__()
        self.module, self.call = module, call

    def forward(self, input_ids: torch.Tensor, positions: torch.Tensor) -> None:
        self.call(input_ids, positions)


@contextmanager
def running_modules(linears: LinearCalls | None = None) -> Iterator[list[nn.Module]]:
    """The modules whose forwards run now, the innermost last.

    Args:
        linears: Records them too.
    """
    running: list[nn.Module] = []

    def enter(module: nn.Module, args: Any) -> None:
        if linears is not None:
            linears.enter(module, running[-1] if running else None, args)
        running.append(module)

    def leave(module: nn.Module, args: Any, output: Any) -> Any:
        running.pop()
        return None if linears is None else linears.leave(module, output)

    handles = [
        register_module_forward_pre_hook(enter),
        register_module_forward_hook(leave),
    ]
    try:
        yield running
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def paths_in_errors(
    running: list[nn.Module], paths: dict[nn.Module, str]
) -> Iterator[None]:
    """Say in which module something was raised.

    Args:
        running: What `running_modules` gave.
        paths: Of all modules.
    """
    try:
        yield
    except Exception as error:
        inside = [paths[m] for m in running if m in paths]
        where = inside[-1] if inside else ""
        raise ValueError(f"{where or 'The model'}: {error}") from error
