# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""Whether the engine serves a model as it was trained, found out by running it.

The engine computes some tokens of a request in one step and some in the next, beside
tokens of other requests. So a model is right in it exactly if, outside its layers with
state, the row of a token depends on the token's id and its position alone. A few
forwards of a dozen tokens show that, in which each layer with state computes a function
of each row by itself (`TrainingLayer.row_wise`).
"""

import os
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from vllm.logger import init_logger
from vllm.model_executor import vllm_internals
from vllm.model_executor.layers.training.attention import TrainableAttention
from vllm.model_executor.layers.training.base import TrainingLayer
from vllm.model_executor.models.builder.agreement import others
from vllm.model_executor.models.builder.body import Body
from vllm.model_executor.models.builder.interface import (
    check_every_token,
    check_logits,
)
from vllm.model_executor.models.builder.rows import (
    LOOKUPS,
    Comparison,
    Recording,
    Sight,
    Visit,
    same,
    watching,
)
from vllm.model_executor.models.builder.spec import BuilderOptions

if TYPE_CHECKING:
    from vllm.config import VllmConfig
    from vllm.model_executor.models.builder.model import BuiltModel

logger = init_logger(__name__)

# Numbers of tokens, of which the first that is no size of the model is taken.
TOKENS = (13, 17, 11, 19, 23, 29, 31, 37, 41, 43, 47, 53)
# Functions of torch that attend over tokens.
ATTENTION = ("scaled_dot_product_attention", "multi_head_attention_forward")


@dataclass(frozen=True)
class Batch:
    """What a model is called with, a row for each token.

    Attributes:
        input_ids: shape = [num_tokens].
        positions: shape = [num_tokens].
        hidden_states: shape = [num_tokens, hidden_size], on later pipeline stages.
    """

    input_ids: torch.Tensor
    positions: torch.Tensor
    hidden_states: torch.Tensor | None = None

    def rows(self, index: torch.Tensor) -> "Batch":
        """These rows, in this order."""
        states = self.hidden_states
        states = None if states is None else states[index]
        return Batch(self.input_ids[index], self.positions[index], states)

    def keeping(self, row: int, others: "Batch") -> "Batch":
        """One row of this batch, all others of another."""
        index = torch.arange(len(self.positions), device=self.positions.device)
        values = {}
        for name, theirs in vars(others).items():
            mine = getattr(self, name)
            if mine is not None:
                keep = (index == row).view(-1, *[1] * (mine.ndim - 1))
                values[name] = torch.where(keep, mine, theirs)
        return Batch(**values)


@dataclass(frozen=True)
class Findings:
    """What one rank of an engine found; joined, what all of them found.

    Attributes:
        problems: What stands against serving the model, in sentences.
        notes: What is said without stopping the start.
        attention: How many layers with state there are.
        encodes_positions: Whether any of them encodes positions by itself.
        positions_matter: Whether other positions changed anything; None if that cannot
            be told.
    """

    problems: tuple[str, ...]
    notes: tuple[str, ...]
    attention: int
    encodes_positions: bool
    positions_matter: bool | None

    def joined(self, other: "Findings") -> "Findings":
        """Of two pipeline stages, or of two ranks of one."""
        known = (self.positions_matter, other.positions_matter)
        return Findings(
            tuple(dict.fromkeys(self.problems + other.problems)),
            tuple(dict.fromkeys(self.notes + other.notes)),
            self.attention + other.attention,
            self.encodes_positions or other.encodes_positions,
            None if None in known and True not in known else any(known),
        )

    def on_stage(self, stage: int) -> "Findings":
        problems = tuple(f"Pipeline stage {stage}: {text}" for text in self.problems)
        return replace(self, problems=problems)


def check_servable(
    module: nn.Module,
    config: Any,
    *,
    head: str | None = None,
    batched: bool | None = None,
    uses_positions: bool = True,
    positions: str | None = None,
) -> None:
    """Check that vLLM would serve a training-only module as it is trained.

    Every engine runs this check at startup. Here it needs no engine. It runs a few
    forwards of a dozen tokens on the device of the module, in evaluation mode and
    without gradients. The module and the state of torch's random numbers stay as they
    are.

    Args:
        module: What a builder returns, or the trainer's model in one process.
        config: The model's, with `vocab_size` and `hidden_size`; positions below
            `max_position_embeddings` are tried, or below 2048 where it has none.
        head: See `BuilderOptions.head`.
        batched: See `BuilderOptions.batched`.
        uses_positions: See `BuilderOptions.uses_positions`. False: no warning.
        positions: See `BuilderOptions.positions`.

    Raises:
        ValueError: The engine would not compute what the trainer computes: a token's
            row depends on other tokens outside `TrainableAttention`, or on its place in
            the batch; there is no attention layer; one is called more than once, or
            never; the head's logits are not of the config's vocabulary. The message
            names every reason and its module. If positions have no effect, a warning
            is logged instead.
        TypeError: `forward` cannot be called as the engine calls it, or does not return
            the output of the head or a function of each of its logits.
    """
    name = type(module).__name__
    text_config = (
        config.get_text_config() if hasattr(config, "get_text_config") else config
    )
    options = BuilderOptions(head, batched, positions=positions)
    body = Body(module, options, name)
    vocab_size = text_config.vocab_size
    sizes = (vocab_size, text_config.hidden_size)
    body.set_head(body.find_head("check_servable", sizes))

    def received(output: Any, tokens: torch.Size) -> torch.Tensor:
        rows = body.hidden_states(output)
        check_every_token(rows, tokens, name)
        check_logits(body.logits(rows), vocab_size, body.head_path, name)
        return rows

    training = [layer for layer in module.modules() if layer.training]
    module.eval()
    try:
        with body.installed():
            findings = probe(
                body,
                vocab_size,
                getattr(text_config, "max_position_embeddings", None) or 2048,
                next(module.parameters()).device,
                received,
            )
    finally:
        for layer in training:
            layer.training = True
    judge(findings, uses_positions, name)


def check_in_engine(model: "BuiltModel") -> None:
    """`check_servable` of a model that an engine has built; every rank calls it.

    Raises:
        ValueError, TypeError: As `check_servable`, on every rank.
    """
    started = time.perf_counter()
    module, name = model.module, model.spec.name
    foreign = [
        path
        for path, layer in module.named_modules()
        if isinstance(layer, vllm_internals.Attention)
        and not isinstance(_parent(module, path), TrainableAttention)
    ]
    if foreign:
        logger.info(
            "%s: %s is vLLM's own attention, so the start-up check of a training-only "
            "module does not apply.",
            name,
            foreign[0],
        )
        return
    module.eval()
    device = torch.device(vllm_internals.current_platform.device_type)

    def received(output: Any, tokens: torch.Size) -> torch.Tensor:
        rows = model.received(output, tokens)
        model.check_rows(rows, tokens)
        return rows

    with vllm_internals.set_forward_context(None, model.vllm_config):
        findings = probe(
            model.body,
            model.vocab_size,
            model.vllm_config.model_config.max_model_len,
            device,
            received,
            None if model.is_first_stage else model.carried,
        )
        _check_longest_step(model.body, model.vllm_config, device)
    for _, theirs in others("tp", findings):
        findings = findings.joined(replace(theirs, attention=0))
    stages = others("pp", findings)
    if stages:
        findings = findings.on_stage(vllm_internals.get_pp_group().rank_in_group)
    for stage, theirs in stages:
        findings = findings.joined(theirs.on_stage(stage))
    judge(findings, model.spec.options.uses_positions, name)
    if model.body.tail is not None and model.body.tail.steps:
        logger.info("%s: after the head follow %s.", name, model.body.tail)
    seconds = time.perf_counter() - started
    logger.info(
        "%s: each token's row depends on its id, its position and %d attention layers "
        "alone (checked in %.2f s).",
        name,
        findings.attention,
        seconds,
    )


def _check_longest_step(
    body: Body, vllm_config: "VllmConfig", device: torch.device
) -> None:
    """Call a module that counts its tokens with as many as a step may have.

    Raises:
        ValueError: It takes fewer.
    """
    if body.convention.counting is None:
        return
    count = vllm_config.scheduler_config.max_num_batched_tokens
    tokens = torch.zeros(count, dtype=torch.int64, device=device)
    with _quietly(device), _row_wise(_layers_with_state(body.module)):
        try:
            body.call(tokens, tokens)
        except Exception as error:
            longest = vllm_config.model_config.max_model_len
            raise ValueError(
                f"forward of {type(body.module).__name__} counts its tokens, and does "
                f"not take the {count} tokens of a step ({type(error).__name__}: "
                f"{error}). Start with max_num_batched_tokens={longest} and "
                "max_num_seqs of at most that, or build the module for longer "
                "sequences."
            ) from error


def judge(findings: Findings, uses_positions: bool, name: str) -> None:
    """Log the notes, and raise the problems."""
    problems, notes = list(findings.problems), list(findings.notes)
    if not findings.attention:
        problems.insert(
            0,
            "It has no TrainableAttention, so the engine would keep no keys and values "
            "of earlier tokens. Call TrainableAttention where the model attends "
            "(vllm.model_executor.layers.training).",
        )
    by_itself = findings.encodes_positions or not uses_positions
    if findings.positions_matter is False and not by_itself:
        notes.append(
            "forward does not use positions: other ones change nothing. So tokens are "
            "served without a position encoding. If that is meant, say "
            "@model_builder(uses_positions=False)."
        )
    for note in notes:
        logger.warning("%s: %s", name, note)
    if problems:
        listing = "".join(f"\n- {problem}" for problem in problems)
        raise ValueError(f"{name} would not be served as it is trained:{listing}")


def probe(
    body: Body,
    vocab_size: int,
    max_positions: int,
    device: torch.device,
    received: Callable[[Any, torch.Size], torch.Tensor],
    carried: tuple[int, torch.dtype] | None = None,
) -> Findings:
    """Run a training-only module, in evaluation mode, and compare rows.

    Args:
        body: The module, without its head. Its tail is found.
        vocab_size: Token ids are below it.
        max_positions: Positions are below it.
        device: Where the module's inputs are.
        received: Gives what the head, or the next stage, receives. Called with what the
            module returned, and the shape of its input's tokens.
        carried: Width and dtype of the hidden states of a later pipeline stage.
    """
    module = body.module
    count = _number_of_tokens(module)
    first, second = _batches(count, vocab_size, max_positions, device, carried)
    row = count // 2
    every = torch.arange(count, device=device)
    one = every[row : row + 1]
    order = every.flip(0).roll(3)
    layers = _layers_with_state(module)
    recording = Recording()
    notes: list[str] = []

    def tokens_of(batch: Batch) -> tuple[torch.Tensor | None, ...]:
        ids = None if carried else batch.input_ids
        return ids, batch.positions, batch.hidden_states

    def run(batch: Batch, visit: Visit, callers: _Callers | None = None) -> Any:
        with watching(module, count, visit) as running, callers or nullcontext():
            if callers:
                callers.running = running
            return body.call(*tokens_of(batch))

    def compare(
        batch: Batch, rows: torch.Tensor, recorded: torch.Tensor, poison: bool = False
    ) -> list[Sight]:
        comparison = Comparison(recording, rows, recorded, poison)
        run(batch, comparison.visit)
        return comparison.differing

    with _quietly(device), _row_wise(layers):
        # Another number of tokens, on which nothing may depend.
        body.find_tail(tokens_of(first), tokens_of(second.rows(every[1:])))
    with _quietly(device), _row_wise(layers) as stand_ins:
        callers = _Callers(body.convention.positions)
        output = run(first, recording.visit, callers)
        states = received(output, body.convention.shape_of(first.positions))
        problems = _miscalled(stand_ins)
        random = compare(first, every, every)
        if random:
            problems += _describe(module, random, _RANDOM)
            return _findings(problems, notes, layers, None)
        try:
            difference = body.difference(tokens_of(first), states)
            problems += [difference] if difference else []
        except Exception as error:
            notes.append(
                "forward could not be compared with the method hidden_states, which "
                f"is served: {type(error).__name__}: {error}"
            )
        replaced = first.keeping(row, second)
        mixing = compare(replaced, one, one)
        try:
            mixing += compare(replaced, one, one, poison=True)
        except Exception as error:
            notes.append(
                "The check that NaN in one token's row leaves the others alone could "
                f"not be made: {type(error).__name__}: {error}"
            )
        moved = compare(first.rows(order), every, order)
        changes = _Changes(recording)
        run(replace(first, positions=second.positions), changes.visit)

    by_design = [sight for sight in mixing if _is_quantised(sight.module)]
    notes += _describe(module, by_design[:1], _QUANTISED)
    mixing = [sight for sight in mixing if not _is_quantised(sight.module)]
    problems += _describe(module, mixing, _MIXED, callers.attention, _NO_STATE)
    known = {sight.owner for sight in mixing + by_design}
    moved = [sight for sight in moved if sight.owner not in known]
    take = _take_positions(body.convention.positions)
    problems += _describe(module, moved, _MOVED, callers.counted, take)
    matter: bool | None = changes.found
    if not matter and (changes.blank or max_positions < 2):
        matter = None
    return _findings(problems, notes, layers, matter)


_RANDOM = (
    "{owner} is random or not deterministic: {place} differs between two forwards of "
    "the same tokens in evaluation mode. Dropout needs training=self.training."
)
_MIXED = (
    "{owner} mixes tokens outside TrainableAttention: {place} depends, for each token, "
    "on other tokens of the batch. In the engine these are tokens of other requests, "
    "and only those of the same step. {advice}"
)
_MOVED = (
    "{owner} makes a token's row depend on its place in the batch: {place} does not "
    "follow when tokens are permuted together with their positions. {advice}"
)
_QUANTISED = (
    "{owner} quantises the activations of all tokens of a step together: {place} "
    "depends, for each token, on the others. So results depend on the batch by design."
)
_USE_ATTENTION = (
    "It calls torch's {function}: call TrainableAttention there, which has a KV cache."
)
_NO_STATE = (
    "Only layers of this package with state of their own, such as TrainableAttention, "
    "may do that: not convolutions over tokens, token shifts, recurrent layers, linear "
    "attention, norms over the batch or sums over tokens."
)


def _describe(
    module: nn.Module,
    sights: Sequence[Sight],
    text: str,
    advice: Mapping[str, str] = MappingProxyType({}),
    otherwise: str = "",
) -> list[str]:
    """One sentence for each module that is to blame, at the first place it shows."""
    found: dict[str, str] = {}
    for sight in sights:
        owner, place = sight.owner, sight.place
        assert owner is not None
        where = "its output"
        if place.side == "input":
            where = f"what it passes to {place.path!r}"
        named = f"{owner!r}" if owner else "The model itself"
        named += f" ({type(module.get_submodule(owner)).__name__})"
        found.setdefault(
            owner,
            text.format(
                owner=named, place=where, advice=advice.get(owner, otherwise)
            ).strip(),
        )
    return list(found.values())


def _miscalled(stand_ins: dict[str, "_StandIn"]) -> list[str]:
    """Layers with state that a forward does not call exactly once."""
    problems = []
    for path, stand_in in stand_ins.items():
        kind = type(stand_in.layer).__name__
        if stand_in.calls == 0:
            problems.append(
                f"forward never calls {path!r} ({kind}), for which the engine would "
                "keep a KV cache. Remove it from the module that the builder returns, "
                "or call it."
            )
        elif stand_in.calls > 1:
            problems.append(
                f"forward calls {path!r} ({kind}) {stand_in.calls} times. Each use "
                "needs a KV cache of its own: create one TrainableAttention per use, "
                "also where the weights around it are shared."
            )
    return problems


def _findings(
    problems: list[str],
    notes: list[str],
    layers: dict[str, TrainingLayer],
    positions_matter: bool | None,
) -> Findings:
    encodes = any(
        getattr(layer, "encodes_positions", False) for layer in layers.values()
    )
    return Findings(
        tuple(problems), tuple(notes), len(layers), encodes, positions_matter
    )


def _layers_with_state(module: nn.Module) -> dict[str, TrainingLayer]:
    return {
        path: layer
        for path, layer in module.named_modules()
        if isinstance(layer, TrainingLayer) and layer.has_state
    }


def _number_of_tokens(module: nn.Module) -> int:
    """A number that is no size of the model's tensors or heads."""
    sizes = {size for tensor in module.parameters() for size in tensor.shape}
    sizes |= {size for tensor in module.buffers() for size in tensor.shape}
    for layer in module.modules():
        sizes |= {value for value in vars(layer).values() if type(value) is int}
    return next((count for count in TOKENS if count not in sizes), TOKENS[0])


def _batches(
    count: int,
    vocab_size: int,
    max_positions: int,
    device: torch.device,
    carried: tuple[int, torch.dtype] | None,
) -> tuple[Batch, Batch]:
    """Two batches of consecutive positions, with no row in common."""
    generator = torch.Generator("cpu").manual_seed(0)
    ids = torch.randint(vocab_size, (2, count), generator=generator, device="cpu")
    # An id of the first batch stands nowhere at the same place in the second.
    ids[1] = (ids[1] + (ids[0] == ids[1])) % vocab_size
    start = max(0, min(count, max_positions - 2 * count))
    places = (start + torch.arange(2 * count, device="cpu")) % max_positions
    states: torch.Tensor | None = None
    if carried is not None:
        width, dtype = carried
        shape = (2, count, width)
        states = torch.randn(
            shape, generator=generator, dtype=torch.float32, device="cpu"
        ).to(device, dtype)
    first, second = (
        Batch(
            ids[number].to(device),
            places.view(2, count)[number].to(device),
            None if states is None else states[number],
        )
        for number in range(2)
    )
    return first, second


@contextmanager
def _quietly(device: torch.device) -> Iterator[None]:
    """Without gradients and compilation, and with the random state of before after."""
    devices = [device] if device.type == "cuda" else []
    with (
        torch.no_grad(),
        torch.compiler.set_stance("force_eager"),
        torch.random.fork_rng(devices),
    ):
        yield


class _StandIn:
    """Computes `row_wise` in place of a layer's engine, and counts the calls."""

    def __init__(self, layer: TrainingLayer) -> None:
        self.layer = layer
        self.calls = 0

    def __call__(self, *inputs: torch.Tensor) -> torch.Tensor:
        self.calls += 1
        return self.layer.row_wise(*inputs)


@contextmanager
def _row_wise(layers: dict[str, TrainingLayer]) -> Iterator[dict[str, _StandIn]]:
    """Let layers with state compute each row by itself."""
    stand_ins = {path: _StandIn(layer) for path, layer in layers.items()}
    # In the instance's own attributes they hide a submodule of that name.
    before = {path: dict(vars(layer)) for path, layer in layers.items()}
    for path, layer in layers.items():
        vars(layer)["engine"] = stand_ins[path]
    try:
        yield stand_ins
    finally:
        for path, layer in layers.items():
            del vars(layer)["engine"]
            if "engine" in before[path]:
                vars(layer)["engine"] = before[path]["engine"]


class _Callers(TorchFunctionMode):
    """Notes which modules call torch's attention, or count.

    Attributes:
        running: The paths of the modules that are running, outermost first.
        attention: What to do in a module that calls torch's attention, by its path.
        counted: What to do in a module that calls `torch.arange`, by its path.
    """

    def __init__(self, positions: str | None) -> None:
        super().__init__()
        self.running: list[str] = []
        self.attention: dict[str, str] = {}
        self.counted: dict[str, str] = {}
        self._advice = _take_positions(positions)

    def __torch_function__(
        self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None
    ) -> Any:
        name = getattr(func, "__name__", "")
        if name in ATTENTION and self.running:
            advice = _USE_ATTENTION.format(function=name)
            self.attention[self.running[-1]] = advice
        if func is torch.arange and self.running:
            line = f" It counts with torch.arange in {_line_of_caller()}."
            self.counted[self.running[-1]] = self._advice + line
        return func(*args, **(kwargs or {}))


def _take_positions(parameter: str | None) -> str:
    """What to do in place of counting positions."""
    if parameter is not None:
        return f"Take the positions from the argument `{parameter}`; do not count them."
    return (
        "forward is given no positions: give it a parameter `positions`, or say which "
        "one it is (@model_builder(positions='name')), and do not count them."
    )


def _line_of_caller() -> str:
    """File and line of the first caller that is not torch or this module."""
    frame = sys._getframe(1)
    here, torchs = frame.f_code.co_filename, os.path.dirname(torch.__file__)
    while frame.f_back is not None and (
        frame.f_code.co_filename == here or frame.f_code.co_filename.startswith(torchs)
    ):
        frame = frame.f_back
    return f"{frame.f_code.co_filename}, line {frame.f_lineno}"


class _Changes:
    """Looks for any effect of other positions on what modules compute.

    Attributes:
        found: Whether there was one.
        blank: Whether all that layers with state received was zero.
    """

    def __init__(self, recording: Recording) -> None:
        self.recording = recording
        self.found = False
        self.blank = True

    def visit(self, sight: Sight) -> None:
        recorded = self.recording.rows.get(sight.place)
        has_state = getattr(sight.module, "has_state", False)
        if has_state and sight.place.side == "input":
            self.blank = self.blank and not bool(sight.rows.any())
        elif sight.place.side == "input" and not isinstance(sight.module, LOOKUPS):
            return
        if recorded is not None and sight.owner is not None:
            same_shape = recorded.shape == sight.rows.shape
            self.found |= not same_shape or not same(sight.rows, recorded)


def _is_quantised(module: nn.Module) -> bool:
    """Whether it is one of vLLM's layers with a quantised product."""
    method = getattr(module, "quant_method", None)
    plain = (
        vllm_internals.UnquantizedLinearMethod,
        vllm_internals.UnquantizedEmbeddingMethod,
    )
    return method is not None and not isinstance(method, plain)


def _parent(module: nn.Module, path: str) -> nn.Module:
    return module.get_submodule(path.rpartition(".")[0])
