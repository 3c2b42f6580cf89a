# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""What the engine instantiates for a builder."""

import random
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import nn
from torch._functorch._aot_autograd import autograd_cache

from vllm.compilation.decorators import support_torch_compile
from vllm.model_executor import vllm_internals
from vllm.model_executor.checkpoint.layout import CheckpointLayout
from vllm.model_executor.checkpoint.state_dict_hooks import refuse_changing_hooks
from vllm.model_executor.checkpoint.wrappers import unwrapped
from vllm.model_executor.determinism.log_softmax import (
    aligned_rows,
    uses_samplers_kernels,
)
from vllm.model_executor.determinism.mode import is_batch_invariant
from vllm.model_executor.layers.training.base import skip_init
from vllm.model_executor.models.builder.agreement import compare_ranks
from vllm.model_executor.models.builder.binding import bind_engine_layers
from vllm.model_executor.models.builder.body import Body
from vllm.model_executor.models.builder.config import tie_as_configured
from vllm.model_executor.models.builder.convention import logits_of
from vllm.model_executor.models.builder.interface import (
    check_every_token,
    check_logits,
    check_takes_hidden_states,
    has_vllm_interface,
    is_adopted,
)
from vllm.model_executor.models.builder.loader import EngineLoader
from vllm.model_executor.models.builder.merged_linears import merge_linears
from vllm.model_executor.models.builder.servable import check_in_engine
from vllm.model_executor.models.builder.spec import BuilderSpec
from vllm.model_executor.parallel_context import ParallelContext

if TYPE_CHECKING:
    from vllm.config import VllmConfig


def model_class(spec: BuilderSpec) -> "type[BuiltModel]":
    """The class that `ModelRegistry` resolves a builder's architecture to."""
    name = spec.name.rpartition(".")[2].strip("<>")
    base = BuiltStage if spec.options.supports_pp else BuiltModel
    built = type(name, (base,), {"spec": spec, "__doc__": f"Built by {spec.name}."})
    built.__qualname__ = f"BuiltModel[{spec.name}]"
    return built


class RegisteredBuilder(vllm_internals.BaseRegisteredModel):
    """A builder's entry in `ModelRegistry.models`."""

    def __init__(self, spec: BuilderSpec) -> None:
        self.model_cls: type[BuiltModel] = model_class(spec)

    def load_model_cls(self) -> type[nn.Module]:
        return self.model_cls

    def inspect_model_cls(self) -> Any:
        return vllm_internals.ModelInfo.from_model_cls(self.model_cls)


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
        module = cls._build(vllm_config, prefix)
        stages = ParallelContext.current().pp_size
        if has_vllm_interface(module, cls.spec.name, stages):
            bind_engine_layers(module, vllm_config, prefix)
            return module
        if tie_as_configured(vllm_config.model_config):
            del module
            module = cls._build(vllm_config, prefix)
        model = super().__new__(cls)
        object.__setattr__(model, "module", module)
        return model

    @classmethod
    def _build(cls, vllm_config: "VllmConfig", prefix: str) -> nn.Module:
        with skip_init():
            module = unwrapped(cls.spec.build(vllm_config, prefix))
        # Nothing is trained here; a library's layers may be simpler for knowing it.
        return module.requires_grad_(False)

    # Not registered as submodules: they would change the parameters' names.
    module: nn.Module
    logits_processor: nn.Module
    loader: EngineLoader
    body: Body
    head_path: str | None
    carried: tuple[int, torch.dtype]

    def __init__(self, *, vllm_config: "VllmConfig", prefix: str = "") -> None:
        super().__init__()
        _refuse_unsupported(vllm_config, self.spec.name)
        module, options = self.module, self.spec.options
        self._modules = module._modules
        self._parameters = module._parameters
        self._buffers = module._buffers
        self._non_persistent_buffers_set = module._non_persistent_buffers_set

        model_config = vllm_config.model_config
        context = ParallelContext.current()
        self.vllm_config = vllm_config
        _give_graphs_entries_of_their_own()
        if is_adopted(module) and is_batch_invariant():
            _keep_eager_numerics(vllm_config)
        self.is_first_stage = context.is_first_stage
        self.is_last_stage = context.is_last_stage
        self.carried = (model_config.get_hidden_size(), torch.get_default_dtype())
        self.body = Body(module, options, self.spec.name)
        if context.pp_size > 1:
            check_takes_hidden_states(self.body.module, self.spec.name)
        refuse_changing_hooks(module)
        if vllm_config.quant_config is None:  # which may be for some of the layers only
            merge_linears(module)
        layout = compare_ranks(module, CheckpointLayout.of(module), self.spec.name)
        strict = vllm_config.load_config.load_format != "dummy"
        self.vocab_size = model_config.hf_config.get_text_config().vocab_size
        self.head_path = None
        if self.is_last_stage:
            sizes = (self.vocab_size, model_config.get_hidden_size())
            caller = f"The builder {self.spec.name}"
            self.head_path = self.body.find_head(caller, sizes)
        # A model that gives embeddings has no use for logits, and vLLM leaves out its
        # own heads there; so the head stays a training layer, which is never called.
        is_pooling = model_config.runner_type == "pooling"
        engine_head = None if is_pooling else self.head_path
        bind_engine_layers(module, vllm_config, prefix, head=engine_head)
        if self.is_last_stage:
            self.body.set_head(self.head_path)
            if isinstance(self.body.head, vllm_internals.ParallelLMHead):
                self.body.apply_head = self._apply_parallel_head
            self.body.install()
        object.__setattr__(
            self, "logits_processor", vllm_internals.LogitsProcessor(self.vocab_size)
        )
        convert = getattr(module, "convert_checkpoint", None)
        loader = EngineLoader(self, layout, model_config, strict, convert)
        object.__setattr__(self, "loader", loader)

    def _get_name(self) -> str:
        """What `repr` calls it."""
        return type(self).__qualname__

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
        carried = None
        if intermediate_tensors is not None:
            carried = intermediate_tensors["hidden_states"]
        output = self.body.call(input_ids, positions, carried)
        convention = self.body.convention
        rows = self.received(output, convention.shape_of(positions))
        rows = rows[0] if convention.batched else rows
        if self.is_last_stage:
            return rows
        return vllm_internals.IntermediateTensors({"hidden_states": rows})

    def received(self, output: Any, tokens: torch.Size) -> torch.Tensor:
        """What the head, or the next stage, receives.

        Args:
            output: What the module returned.
            tokens: Shape of the tokens that it was called with.

        Raises:
            TypeError: It cannot be served so.
        """
        if self.is_last_stage:
            return self.body.hidden_states(output)
        hidden_states = logits_of(output)
        self._check_carried(hidden_states, torch.Size((*tokens, self.carried[0])))
        return hidden_states

    def _check_carried(self, output: Any, shape: torch.Size) -> None:
        """Refuse what the next stage would not receive as it is."""
        width, dtype = self.carried
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
        logits = self.body.logits(hidden_states)
        if logits is None or not uses_samplers_kernels(logits):
            return logits
        # The sampler's kernels sum up a row in an order that depends on its alignment.
        return aligned_rows(logits)

    def _apply_parallel_head(self, hidden_states: torch.Tensor) -> torch.Tensor | None:
        head = self.body.head
        return self.logits_processor(head, hidden_states, head.bias)

    def process_weights_after_loading(self) -> None:
        """Check with the weights in place that the model is served as it was trained.

        vLLM's loaders call it before the engine's first step.
        """
        check_in_engine(self)

    def check_rows(self, rows: torch.Tensor, tokens: torch.Size) -> None:
        """Refuse what is not hidden states of every token, or gives other logits.

        Args:
            rows: What `received` returned.
            tokens: Shape of the tokens that the module was called with.
        """
        if self.is_last_stage:
            check_every_token(rows, tokens, self.spec.name)
            logits = self.compute_logits(rows.flatten(0, -2)[:1])
            check_logits(logits, self.vocab_size, self.body.head_path, self.spec.name)

    def load_weights(self, weights: Iterable[tuple[str, torch.Tensor]]) -> set[str]:
        """Load checkpoint tensors; see `EngineLoader`."""
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
        return vllm_internals.IntermediateTensors({"hidden_states": zeros})


_NO_EMBEDS = (
    "The module built by {name} takes token ids only; prompt embeddings need a "
    "module with vLLM's interface (embed_input_ids and inputs_embeds)."
)


def _give_graphs_entries_of_their_own() -> None:
    """Let no graph find the compiled code of another one.

    torch names the cache entry of a graph that it cannot hash, such as one with a call
    of `torch.Tensor.split`, by a number of Python's generator, which vLLM seeds alike
    in all processes. Another rank, or the same model started again, would find such an
    entry under the number of its own graph.
    """
    vars(autograd_cache)["random"] = random.SystemRandom()


def _keep_eager_numerics(vllm_config: "VllmConfig") -> None:
    """Let Inductor round as eager torch does.

    Training layers are ops, which a compiler leaves as they are. What a model's own
    code computes between them, it writes anew.
    """
    options = vllm_config.compilation_config.inductor_compile_config
    options["emulate_precision_casts"] = True
    options["eager_numerics.division_rounding"] = True


def _refuse_unsupported(vllm_config: "VllmConfig", builder: str) -> None:
    """Refuse what vLLM adds to models and cannot add to a training-only module.

    Raises:
        NotImplementedError: Names the setting.
    """
    if vllm_config.lora_config is not None:
        raise NotImplementedError(
            f"enable_lora=True: the module built by {builder} cannot take vLLM's LoRA "
            "adapters, which replace layers that vLLM's own model classes declare. "
            "Merge the adapter into the weights and start with enable_lora=False; "
            "merged weights can also be sent to a running engine (reload_weights)."
        )
    if vllm_config.model_config.convert_type == "classify":
        raise NotImplementedError(
            f"convert='classify': the module built by {builder} has no classification, "
            "score or reward head that vLLM knows. Use runner='pooling', "
            "convert='embed' and apply the head to the embeddings, which are what the "
            "language-model head would receive (unnormalised with "
            "PoolerConfig(use_activation=False)); or return a module with vLLM's "
            "interface and a `pooler`."
        )
