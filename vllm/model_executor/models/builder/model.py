# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""What the engine instantiates for a builder."""

import inspect
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import nn

from vllm.compilation.decorators import support_torch_compile
from vllm.model_executor import upstream
from vllm.model_executor.layers.training.base import skip_init
from vllm.model_executor.models.builder.agreement import compare_ranks
from vllm.model_executor.models.builder.binding import bind_engine_layers
from vllm.model_executor.models.builder.head import HeadTap, find_head
from vllm.model_executor.models.builder.spec import BuilderSpec
from vllm.model_executor.parallel_context import ParallelContext
from vllm.training.weights import CheckpointLayout, EngineLoader

if TYPE_CHECKING:
    from vllm.config import VllmConfig

VLLM_INTERFACE = ("embed_input_ids", "forward", "compute_logits", "load_weights")


def model_class(spec: BuilderSpec) -> "type[BuiltModel]":
    """The class that `ModelRegistry` resolves a builder's architecture to."""
    name = spec.name.rpartition(".")[2].strip("<>")
    base = BuiltStage if spec.options.supports_pp else BuiltModel
    return type(name, (base,), {"spec": spec, "__doc__": f"Built by {spec.name}."})


class RegisteredBuilder(upstream.BaseRegisteredModel):
    """A builder's entry in `ModelRegistry.models`."""

    def __init__(self, spec: BuilderSpec) -> None:
        self.model_cls: type[BuiltModel] = model_class(spec)

    def load_model_cls(self) -> type[nn.Module]:
        return self.model_cls

    def inspect_model_cls(self) -> Any:
        return upstream.ModelInfo.from_model_cls(self.model_cls)


def has_vllm_interface(module: nn.Module, builder: str, stages: int = 1) -> bool:
    """Whether a built module talks to the engine itself.

    Raises:
        TypeError: It has `compute_logits` but lacks another of `VLLM_INTERFACE`, or,
            with several pipeline stages, `make_empty_intermediate_tensors`.
    """
    if not callable(getattr(module, "compute_logits", None)):
        return False
    needed: tuple[str, ...] = VLLM_INTERFACE
    if stages > 1:
        needed += ("make_empty_intermediate_tensors",)
    missing = [n for n in needed if not callable(getattr(module, n, None))]
    if missing:
        raise TypeError(
            f"The builder {builder} returned {type(module).__name__}, which has "
            f"compute_logits but lacks {', '.join(missing)} (embed_input_ids was once "
            "called get_input_embeddings). A module either has all "
            f"of {', '.join(needed)} and is used as it is, or has no "
            "compute_logits and forward(input_ids, positions) returns logits."
        )
    return True


@support_torch_compile(
    dynamic_arg_dims={"input_ids": 0, "positions": 0, "intermediate_tensors": 0}
)
class BuiltModel(nn.Module):
    """A training-only module behind the engine's interface.

    It is a second view of the built module's tree: submodules, parameters and
    buffers are the same objects under the same names. The head is left out of
    `forward`, which so returns hidden states, and applied by `compute_logits`.

    A builder that returns a module with the engine's interface gets no wrapper:
    instantiating this class then gives that very module. Unless the engine is eager,
    `forward` is compiled as vLLM's own models are.

    With several pipeline stages (`BuiltStage`) every stage has such a wrapper. The
    hidden states of the stage before are given to the module as `hidden_states`; all
    stages but the last have no head and return hidden states.
    """

    spec: ClassVar[BuilderSpec]

    def __new__(cls, *, vllm_config: "VllmConfig", prefix: str = "") -> Any:
        with skip_init():
            module = cls.spec.build(vllm_config, prefix)
        # Nothing is trained here; a library's layers may be simpler for knowing it.
        module.requires_grad_(False)
        stages = ParallelContext.current().pp_size
        if has_vllm_interface(module, cls.spec.name, stages):
            bind_engine_layers(module, vllm_config, prefix)
            return module
        model = super().__new__(cls)
        object.__setattr__(model, "module", module)
        return model

    # Not registered as submodules: they would change the parameters' names.
    module: nn.Module
    logits_processor: nn.Module
    loader: EngineLoader
    head_path: str | None

    def __init__(self, *, vllm_config: "VllmConfig", prefix: str = "") -> None:
        super().__init__()
        module, options = self.module, self.spec.options
        self._modules = module._modules
        self._parameters = module._parameters
        self._buffers = module._buffers
        self._non_persistent_buffers_set = module._non_persistent_buffers_set

        model_config = vllm_config.model_config
        context = ParallelContext.current()
        self.is_first_stage = context.is_first_stage
        self.is_last_stage = context.is_last_stage
        self.carried = (model_config.get_hidden_size(), model_config.dtype)
        self.batched = is_batched(module, options.batched, self.spec.name)
        if context.pp_size > 1:
            check_takes_hidden_states(module, self.spec.name)
        layout = compare_ranks(module, CheckpointLayout.of(module), self.spec.name)
        strict = vllm_config.load_config.load_format != "dummy"
        config = model_config.hf_config
        self.head_path = None
        if self.is_last_stage:
            self.head_path = find_head(module, options.head, config, self.spec.name)
        bind_engine_layers(module, vllm_config, prefix, head=self.head_path)
        if self.head_path is not None:
            head = module.get_submodule(self.head_path)
            self.head_tap = HeadTap(head)
            self.head_tap.install()
        vocab_size = config.get_text_config().vocab_size
        object.__setattr__(
            self, "logits_processor", upstream.LogitsProcessor(vocab_size)
        )
        loader = EngineLoader(self, layout, model_config, strict)
        object.__setattr__(self, "loader", loader)

    def train(self, mode: bool = True) -> "BuiltModel":
        """Set the built module's mode, and so that of everything in it."""
        self.training = mode
        self.module.train(mode)
        return self

    def embed_input_ids(self, input_ids: torch.Tensor) -> torch.Tensor:
        """Refused: a training-only module takes token ids only."""
        raise NotImplementedError(_NO_EMBEDS.format(name=self.spec.name))

    def forward(
        self,
        input_ids: torch.Tensor | None,
        positions: torch.Tensor,
        intermediate_tensors: Any | None = None,
        inputs_embeds: torch.Tensor | None = None,
    ) -> Any:
        """Hidden states, as the head or the next pipeline stage would receive them.

        Args:
            input_ids: Packed token ids, shape = [num_tokens].
            positions: Each token's position, shape = [num_tokens].
            intermediate_tensors: What the stage before returned; None on the first.
            inputs_embeds: Refused unless None.

        Returns:
            shape = [num_tokens, hidden_size]; on all stages but the last as
            `IntermediateTensors` with the key `hidden_states`.
        """
        if inputs_embeds is not None or (input_ids is None and self.is_first_stage):
            raise NotImplementedError(_NO_EMBEDS.format(name=self.spec.name))
        carried = {}
        if intermediate_tensors is not None:
            carried["hidden_states"] = intermediate_tensors["hidden_states"]
        if self.batched:
            input_ids = None if input_ids is None else input_ids[None]
            positions = positions[None]
            carried = {name: tensor[None] for name, tensor in carried.items()}
        output: torch.Tensor = self.module(input_ids, positions, **carried)
        if self.is_last_stage:
            self._check_output(output)
            self.head_tap.hidden_states = None
            return output[0] if self.batched else output
        self._check_carried(output, positions)
        hidden_states = output[0] if self.batched else output
        return upstream.IntermediateTensors({"hidden_states": hidden_states})

    def _check_output(self, output: torch.Tensor) -> None:
        """Refuse a module that changes what its head gives."""
        if output is not self.head_tap.hidden_states:
            raise TypeError(
                f"forward of the module built by {self.spec.name} does not return "
                f"the output of its head {self.head_path!r} unchanged, so logits "
                "cannot be computed for the sampled positions alone. Move what "
                "follows the head into the head module, or return a module with "
                f"vLLM's interface ({', '.join(VLLM_INTERFACE)})."
            )

    def _check_carried(self, output: Any, positions: torch.Tensor) -> None:
        """Refuse what the next stage would not receive as it is."""
        width, dtype = self.carried
        shape = (*positions.shape, width)
        if not isinstance(output, torch.Tensor):
            given = type(output).__name__
        elif output.shape != shape or output.dtype != dtype:
            given = f"a tensor of shape {tuple(output.shape)} in {output.dtype}"
        else:
            return
        raise TypeError(
            f"forward of the module built by {self.spec.name} returned {given} on a "
            "pipeline stage that is not the last. It has to return hidden states, "
            f"shape = [..., num_tokens, {width}] in {dtype}, and leave norm and head "
            "to the last stage; or the builder returns a module with vLLM's interface."
        )

    def compute_logits(self, hidden_states: torch.Tensor) -> torch.Tensor | None:
        """Logits, shape = [num_tokens, vocab_size]; None on ranks that sample nothing.

        Args:
            hidden_states: shape = [num_tokens, hidden_size].
        """
        assert self.head_path is not None, "only the last stage samples"
        head = self.head_tap.head
        if isinstance(head, upstream.ParallelLMHead):
            return self.logits_processor(head, hidden_states, head.bias)
        with self.head_tap.removed():
            return head(hidden_states)

    def load_weights(self, weights: Iterable[tuple[str, torch.Tensor]]) -> set[str]:
        """Load checkpoint tensors; see `vllm.training.weights.EngineLoader`."""
        return self.loader.load(weights)


class BuiltStage(BuiltModel):
    """A `BuiltModel` whose builder builds single pipeline stages."""

    supports_pp: ClassVar[bool] = True

    def make_empty_intermediate_tensors(
        self, batch_size: int, dtype: torch.dtype, device: torch.device
    ) -> Any:
        """What the stage before sends, as zeros."""
        shape = (batch_size, self.carried[0])
        zeros = torch.zeros(shape, dtype=dtype, device=device)
        return upstream.IntermediateTensors({"hidden_states": zeros})


_NO_EMBEDS = (
    "The module built by {name} takes token ids only; prompt embeddings need a "
    "module with vLLM's interface (embed_input_ids and inputs_embeds)."
)


def check_takes_hidden_states(module: nn.Module, builder: str) -> None:
    """Refuse a pipeline stage whose `forward` cannot be given hidden states."""
    signature = inspect.signature(module.forward)
    if "hidden_states" not in signature.parameters:
        raise TypeError(
            f"forward{signature} of {type(module).__name__}, built by {builder}, has "
            "no parameter hidden_states, in which later pipeline stages are given "
            "what the stage before returned (None on the first stage)."
        )


def is_batched(module: nn.Module, option: bool | None, builder: str) -> bool:
    """Whether `module.forward` wants `[batch, seq]`; see `BuilderOptions.batched`.

    Raises:
        TypeError: `forward` cannot be called with `(input_ids, positions)`.
    """
    signature = inspect.signature(module.forward)
    try:
        signature.bind(None, None)
    except TypeError as error:
        raise TypeError(
            f"forward{signature} of {type(module).__name__}, built by {builder}, "
            f"cannot be called as forward(input_ids, positions): {error}."
        ) from error
    return "cu_seqlens" not in signature.parameters if option is None else option
