# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""What runs in the engine's process; see `engine.py`.

vLLM is imported when the environment is complete.
"""

import json
import os
from pathlib import Path
from typing import Any

import numpy as np

_llm: Any = None


def start(options: dict[str, Any]) -> None:
    """Start an engine in place of the one before."""
    global _llm
    import torch

    from tests.parity.models import register
    from vllm import LLM

    stop()
    register()
    # Nothing but the sampler would compile in an eager engine, in each of its workers.
    eager = options["enforce_eager"]
    os.environ["TORCH_COMPILE_DISABLE"] = str(int(eager))
    torch._dynamo.config.disable = eager
    _llm = LLM(**options, skip_tokenizer_init=True, disable_log_stats=False)


def stop() -> None:
    """End the engine that runs, if any."""
    global _llm
    from vllm.distributed import cleanup_dist_env_and_memory

    if _llm is not None:
        _llm.llm_engine.engine_core.shutdown(timeout=30)
        _llm = None
        cleanup_dist_env_and_memory()


def generate(
    prompts: list[list[int]], params: list[dict[str, Any]]
) -> list[list[dict[str, Any]]]:
    """Of each prompt its completions' fields of `Sample`, as plain values.

    Args:
        prompts: token ids.
        params: of `SamplingParams`, for each prompt.
    """
    from vllm import SamplingParams

    outputs = _llm.generate(
        [{"prompt_token_ids": prompt} for prompt in prompts],
        [SamplingParams(**each, ignore_eos=True, detokenize=False) for each in params],
        use_tqdm=False,
    )
    return [
        [
            {
                "completion": list(completion.token_ids),
                "logprobs": _values(
                    completion.token_ids,
                    completion.logprobs,
                    full=each["logprobs"] == -1,
                ),
                "prompt_logprobs": _values(
                    output.prompt_token_ids[1:], (output.prompt_logprobs or [None])[1:]
                ),
                "cached": output.num_cached_tokens or 0,
            }
            for completion in output.outputs
        ]
        for output, each in zip(outputs, params, strict=True)
    ]


def _values(tokens: Any, logprobs: Any, full: bool = False) -> np.ndarray:
    values = [
        [entry[i].logprob for i in range(len(entry))] if full else entry[token].logprob
        for token, entry in zip(tokens, logprobs)
    ]
    return np.array(values, dtype=np.float32)


def reload_weights() -> None:
    """From the model's directory."""
    _llm.collective_rpc("reload_weights")
    _llm.reset_prefix_cache()


def counter(name: str) -> int:
    """The value of one of vLLM's counters, without the "vllm:" before its name."""
    (found,) = (m for m in _llm.get_metrics() if m.name == f"vllm:{name}")
    return found.value


def check(
    subject: tuple[Path, str, str, str, str | None],
    prompts: list[list[int]],
    options: dict[str, Any],
) -> dict[str, Any]:
    """Fields of the report of `parity.check`, with a trainer in this process.

    Args:
        subject: directory, name, dtype, device and attention of the model.
        prompts: token ids.
        options: of `parity.check`.
    """
    from tests.parity.models import load
    from vllm.model_executor.parallel_context import ParallelContext
    from vllm.training import parity

    directory, name, dtype, device, implementation = subject
    context = ParallelContext.single(device)
    model = load(directory, name, dtype, context, device, implementation)
    return json.loads(parity.check(_llm, model, prompts, **options).to_json())
