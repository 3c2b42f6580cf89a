# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""Sampling from an engine and comparing with the trainer."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from torch import nn

from vllm.model_executor.models.builder.recorder import ModuleRecorder
from vllm.training.parity.compare import compare_with
from vllm.training.parity.localise import first_differing_module
from vllm.training.parity.prompts import Prompts, engine_prompts
from vllm.training.parity.refusals import refuse_incomparable
from vllm.training.parity.report import ParityReport
from vllm.training.parity.score import Scorer

if TYPE_CHECKING:
    from vllm import LLM, RequestOutput, SamplingParams


def check(
    llm: LLM,
    model: nn.Module,
    prompts: Prompts,
    *,
    max_tokens: int = 16,
    temperature: float = 1.0,
    full_vocab: bool = False,
    localise: bool = False,
    head: str | None = None,
) -> ParityReport:
    """Sample from the engine and compare its logprobs with the trainer's, bit for bit.

    This costs one generation, one forward of the trainer and one pass over its weights:
    cheap enough for a few prompts of every reinforcement learning step.

    Args:
        llm: An engine in batch-invariant mode with the trainer's weights.
        model: The training model. Its gradients, mode and weights stay as they are.
        prompts: Token ids: each prompt is a list, tensor or array of integers,
            shape = [num_tokens]. Or texts, if the engine has a tokenizer.
        max_tokens: Number of tokens to sample for each prompt.
        temperature: Temperature of the sampling.
        full_vocab: Compare the logprobs of the whole vocabulary at every token. The
            engine needs max_logprobs=-1.
        localise: If tokens differ, run the first of them again as a prefill, and name
            the first module whose output differs. For eager engines.
        head: Path of the module in the trainer that gives logits. Default: that of the
            engine's module if the trainer's has it, else as `@model_builder` finds it.

    Raises:
        TypeError: `llm` is not a `vllm.LLM`, `model` is not a module, a prompt is
            neither text nor token ids, or the trainer changes its head's output by
            more than a function of each logit.
        ValueError: Trainer and engine cannot be equal, or there is nothing to compare.
            The message names every reason and the setting to change.
    """
    known = refuse_incomparable(llm, model, full_vocab, localise)
    inputs = engine_prompts(llm, prompts)
    if head is None and known.options.head in dict(model.named_modules()):
        head = known.options.head
    scorer = Scorer(model, replace(known.options, head=head))
    params = _sampling(max_tokens, temperature, full_vocab)
    outputs = llm.generate(inputs, params, use_tqdm=False)
    processed = llm.llm_engine.vllm_config.model_config.logprobs_mode != "raw_logprobs"
    # Greedy sampling does not divide by its temperature, 0. vLLM raises a tiny one.
    scoring_temperature = params.temperature if processed and temperature else 1.0
    report = compare_with(scorer, outputs, full_vocab, scoring_temperature)
    report = replace(
        report,
        weights_compared=not known.weights_note,
        weights_note=known.weights_note,
        next_step=known.next_step,
    )
    if localise and report.first_difference is not None:
        report = report.with_layer(_find_layer(llm, scorer, outputs, report))
    return report


def _sampling(max_tokens: int, temperature: float, full_vocab: bool) -> SamplingParams:
    from vllm import SamplingParams

    # Without a seed: vLLM's CPU engine fails for one where a prefill takes two steps.
    return SamplingParams(
        max_tokens=max_tokens,
        temperature=temperature,
        logprobs=-1 if full_vocab else 0,
        detokenize=False,
    )


def _find_layer(
    llm: LLM, scorer: Scorer, outputs: list[RequestOutput], report: ParityReport
) -> str | None:
    """Path of the first module that differs in a prefill up to the difference."""
    from vllm import SamplingParams

    difference = report.first_difference
    assert difference is not None
    output = outputs[difference.request]
    completion = output.outputs[difference.completion]
    ids = [*(output.prompt_token_ids or ()), *completion.token_ids]
    ids = ids[: difference.position]
    llm.reset_prefix_cache()
    llm.collective_rpc("call_training", args=("start_recording",))
    try:
        params = SamplingParams(max_tokens=1, temperature=0, detokenize=False)
        llm.generate({"prompt_token_ids": ids}, params, use_tqdm=False)
    finally:
        stages = llm.collective_rpc("call_training", args=("stop_recording",))
    recorder = ModuleRecorder(scorer.body.module)
    try:
        scorer.hidden_states([ids], [[0]])
    finally:
        trainer = recorder.finish()
    engine = [entry for stage in stages for entry in stage]
    return first_differing_module(engine, trainer)
