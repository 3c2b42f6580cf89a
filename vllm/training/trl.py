# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""TRL's GRPO with a trainer and a colocated engine that compute the same bits.

`GRPOTrainer` is TRL's with three things replaced: the model is adopted, logprobs are
computed as the engine computes them, and weights are pushed a whole model at a time.
This is the only module that imports `trl`, of which it needs 1.16.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from contextlib import contextmanager
from types import MethodType, ModuleType
from typing import Any

import torch
import trl
from torch import nn
from transformers import PreTrainedModel
from trl.generation import vllm_generation
from trl.trainer import grpo_trainer
from trl.trainer.utils import FusedCausalLMOutput, create_model_from_path

from vllm import LLM, ModelRegistry
from vllm.model_executor.checkpoint.save import checkpoint_tensors
from vllm.model_executor.layers.training import TrainingLayer
from vllm.model_executor.models.builder.adopt import adopt
from vllm.model_executor.models.builder.body import Method
from vllm.model_executor.models.builder.model import RegisteredBuilder
from vllm.model_executor.parallel_context import ParallelContext
from vllm.training.logprobs import token_logprobs

__all__ = ["GRPOTrainer"]

_BUILDER = "vllm.model_executor.models.builder.adopt:causal_lm"
_NO_AUTOCAST = (
    "Autocast computes in another dtype than that of the weights, and the engine does "
    "not. Pass bf16=False, and load the model in bfloat16 to compute in it."
)


class GRPOTrainer(trl.GRPOTrainer):
    """`trl.GRPOTrainer` whose engine gives the trainer's logprobs, bit for bit.

    It takes what TRL's takes, and a model of transformers or the path of one, which it
    adopts. With `VLLM_BATCH_INVARIANT=1` and without truncated sampling (`top_p`,
    `top_k`, `min_p`, penalties), the logprobs of trainer and engine are equal at every
    step. Each step logs `sampling/kl`, the KL divergence of the trainer from the engine
    over the sampled tokens, which is then exactly 0.

    Args:
        model: See TRL. `name_or_path` has to be a directory or a repository that holds
            its config and tokenizer, because the engine starts from that.
        reward_funcs: See TRL.
        args: See TRL, with `use_vllm=True` and `bf16=False`: the engine has the dtype
            of the model's parameters.
        *others: See TRL.
        engine_args: More arguments of the engine, `vllm.LLM`.
        **options: See TRL.

    Raises:
        ValueError: A setting by which trainer and engine would compute something else,
            or that a model cannot be adopted with.
    """

    def __init__(
        self,
        model: str | PreTrainedModel,
        reward_funcs: Any = None,
        args: trl.GRPOConfig | None = None,
        *others: Any,
        engine_args: dict[str, Any] | None = None,
        **options: Any,
    ) -> None:
        args = args or trl.GRPOConfig()
        _check(model, args, options)
        context = ParallelContext(tp_reduction_shards=args.vllm_tensor_parallel_size)

        def create_adopted_model(*path: Any, **kwargs: Any) -> PreTrainedModel:
            created = create_model_from_path(*path, **kwargs)
            return adopt(created, parallel_context=context)

        if not isinstance(model, str):
            adopt(model, parallel_context=context)
            _check_order_of_sums(model, context)
        generation = functools.partial(_Generation, engine_args=engine_args or {})
        with _replaced(
            grpo_trainer,
            VLLMGeneration=generation,
            add_fused_lm_head=_add_token_logprobs,
            create_model_from_path=create_adopted_model,
        ):
            super().__init__(model, reward_funcs, args, *others, **options)

    def _generate_and_score_completions(self, inputs: Any) -> dict[str, Any]:
        scored = super()._generate_and_score_completions(inputs)
        trainer = scored.get("old_per_token_logps")
        if trainer is not None:
            is_sampled = scored["completion_mask"] * scored.get("tool_mask", 1)
            ratio = trainer - scored["sampling_per_token_logps"]
            # Of samples x of q: KL(p || q) = E[p/q log(p/q) - (p/q - 1)], each summand
            # at least 0 (Schulman, Approximating KL Divergence).
            kl = (ratio.exp() * ratio - ratio.expm1())[is_sampled.bool()]
            total = torch.stack([kl.sum(), kl.new_tensor(kl.numel())])
            total = self.accelerator.reduce(total, reduction="sum")
            mode = "train" if self.model.training else "eval"
            self._metrics[mode]["sampling/kl"].append((total[0] / total[1]).item())
        return scored


class _Generation(vllm_generation.VLLMGeneration):
    """Starts an engine of the adopted model and pushes its weights whole."""

    def __init__(self, *args: Any, engine_args: dict[str, Any], **options: Any) -> None:
        self.engine_args = engine_args
        super().__init__(*args, **options)

    def _init_vllm(self) -> None:
        if self.accelerator.mixed_precision != "no":
            raise ValueError(
                f"accelerate was launched with mixed_precision="
                f"{self.accelerator.mixed_precision!r}. {_NO_AUTOCAST}"
            )
        if self.accelerator.state.deepspeed_plugin is not None:
            raise ValueError(
                "accelerate was launched with DeepSpeed, whose shards cannot be pushed "
                "to the engine. Use FSDP2 or DDP."
            )
        with _replaced(vllm_generation, LLM=self._engine):
            super()._init_vllm()

    def _engine(self, **options: Any) -> LLM:
        """The engine, from what TRL would start `vllm.LLM` with."""
        if not options["model"]:
            raise ValueError(
                f"{type(self.model).__name__}.name_or_path is empty. Write the model "
                "and its tokenizer with save_pretrained and load it with "
                "from_pretrained; the engine starts from that directory."
            )
        architecture = type(self.model).__name__
        options |= {
            "dtype": str(self.model.dtype).removeprefix("torch."),
            "hf_overrides": {"architectures": [architecture]},
        }
        if not isinstance(ModelRegistry.models.get(architecture), RegisteredBuilder):
            options["model_class_overrides"] = {architecture: _BUILDER}
        return LLM(**options | self.engine_args)

    def sync_weights(self) -> None:
        super().sync_weights()  # wakes the engine up and pushes nothing
        tensors = list(checkpoint_tensors(self.model))
        self.llm.collective_rpc("reload_weights", kwargs={"weights_iterator": tensors})

    def _iter_named_params(self) -> Iterator[tuple[str, torch.Tensor]]:
        """Of the tensors that TRL pushes one by one: none."""
        return iter(())


def _check(
    model: str | PreTrainedModel, args: trl.GRPOConfig, options: dict[str, Any]
) -> None:
    if not args.use_vllm or args.vllm_mode != "colocate":
        raise ValueError(
            f"use_vllm={args.use_vllm} and vllm_mode={args.vllm_mode!r} were given. "
            "This trainer generates with an engine in its own process: pass "
            "use_vllm=True and vllm_mode='colocate'."
        )
    if args.bf16 or args.fp16:
        raise ValueError(
            f"bf16={args.bf16} and fp16={args.fp16} were given, and bf16=True is TRL's "
            f"default. {_NO_AUTOCAST}"
        )
    if options.get("peft_config") is not None or hasattr(model, "peft_config"):
        raise ValueError(
            "A model with adapters of PEFT cannot be adopted. Train all parameters: "
            "leave peft_config out."
        )
    if args.vllm_model_impl not in ("auto", "vllm"):
        raise ValueError(
            f"vllm_model_impl={args.vllm_model_impl!r} was given, which serves another "
            "model than the adopted one. Leave it out."
        )
    for name in ("cast_lm_head_to_fp32", "use_liger_kernel"):
        if getattr(args, name):
            raise ValueError(
                f"{name}=True changes modules of the trainer only, so trainer and "
                f"engine would differ. Pass {name}=False."
            )


def _check_order_of_sums(model: PreTrainedModel, context: ParallelContext) -> None:
    """Refuse a model that was adopted for another engine."""
    layers = [m for m in model.modules() if isinstance(m, TrainingLayer)]
    found = max(layer.parallel_context.tp_reduction_shards for layer in layers)
    if found != context.tp_reduction_shards:
        raise ValueError(
            f"The model was adopted for an engine of tensor-parallel size {found}, and "
            f"vllm_tensor_parallel_size={context.tp_reduction_shards}, so sums over "
            "ranks would have another order. Leave adopt to this trainer, or pass it "
            "parallel_context=ParallelContext(tp_reduction_shards="
            f"{context.tp_reduction_shards})."
        )


def _add_token_logprobs(
    model: PreTrainedModel,
    temperature: float = 1.0,
    cast_lm_head_to_fp32: bool = False,
    outputs: tuple[str, ...] = ("log_probs",),
) -> None:
    """Stands for TRL's `add_fused_lm_head`, with the arithmetic of an engine.

    Logprobs are computed inside the model's forward, because DDP and FSDP2 reduce
    gradients and gather parameters by what goes through it.

    Args:
        model: The adopted model.
        temperature: Divides the logits.
        cast_lm_head_to_fp32: False, which `_check` made sure of.
        outputs: What is computed besides logprobs: nothing, or `entropy`.
    """
    whole = Method(model, "forward")

    @functools.wraps(type(model).forward)
    def forward(
        self: nn.Module, *args: Any, fused_lm_head: bool = False, **kwargs: Any
    ) -> Any:
        if not fused_lm_head:
            return whole.forward(*args, **kwargs)
        return _scored(whole, temperature, "entropy" in outputs, *args, **kwargs)

    model.forward = MethodType(forward, model)


def _scored(
    model: nn.Module,
    temperature: float,
    return_entropy: bool,
    input_ids: torch.Tensor,
    attention_mask: torch.Tensor,
    labels: torch.Tensor,
    **others: Any,
) -> FusedCausalLMOutput:
    """Logprobs of labels that are no -100, from rows without their padding.

    Args:
        model: The model.
        temperature: Divides the logits.
        return_entropy: Compute also the entropy of each token's distribution.
        input_ids: shape = [batch, seq].
        attention_mask: Which of them are no padding, shape = [batch, seq].
        labels: The tokens, or -100, shape = [batch, seq].
        **others: What TRL passes for images and routers.

    Returns:
        log_probs and entropy, shape = [batch, seq - 1].

    Raises:
        ValueError: One of `others` is given.
    """
    given = [name for name, other in others.items() if other is not None]
    if given:
        raise ValueError(
            f"TRL asks for {', '.join(given)}. Logprobs are computed from tokens "
            "alone, so images and the loss of a router cannot be trained. For a "
            "mixture of experts pass router_aux_loss_coef=0."
        )
    is_token = attention_mask.bool()
    ids = input_ids[is_token]
    ends = is_token.sum(1).cumsum(0)
    numbers = token_logprobs(
        model,
        ids,
        ids.roll(-1),
        cu_seqlens=nn.functional.pad(ends, (1, 0)).to(torch.int32),
        temperature=temperature,
        return_entropy=return_entropy,  # type: ignore[call-overload]
    )

    def at_labels(scores: torch.Tensor) -> torch.Tensor:
        # A token's number is at the token before it.
        placed = scores.new_zeros(labels.shape)
        placed = placed.masked_scatter(is_token, scores.roll(1))
        return placed[:, 1:].masked_fill(labels[:, 1:] == -100, 0)

    fields = ("log_probs", "entropy") if return_entropy else ("log_probs",)
    scores = numbers if return_entropy else (numbers,)
    return FusedCausalLMOutput(**dict(zip(fields, map(at_labels, scores))))


@contextmanager
def _replaced(module: ModuleType, **names: Any) -> Iterator[None]:
    """Have other values in a module inside."""
    before = {name: getattr(module, name) for name in names}
    vars(module).update(names)
    try:
        yield
    finally:
        vars(module).update(before)
