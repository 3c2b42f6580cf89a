# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""What runs in the engine's process; see `engine.py`.

vLLM is imported when the environment is complete.
"""

from typing import Any

import numpy as np

_llm: Any = None


def start(options: dict[str, Any]) -> None:
    """Start an engine in place of the one before."""
    global _llm
    from tests.parity.models import register
    from vllm import LLM

    stop()
    register()
    _llm = LLM(**options, skip_tokenizer_init=True, disable_log_stats=False)


def stop() -> None:
    """End the engine that runs, if any."""
    global _llm
    from vllm.distributed import cleanup_dist_env_and_memory

    if _llm is not None:
        _llm.llm_engine.engine_core.shutdown(timeout=30)
        _llm = None
        cleanup_dist_env_and_memory()


def generate(prompts: list[list[int]], params: dict[str, Any]) -> list[dict[str, Any]]:
    """Each prompt's tokens and logprobs as plain values; see `Sample`."""
    from vllm import SamplingParams

    outputs = _llm.generate(
        [{"prompt_token_ids": prompt} for prompt in prompts],
        SamplingParams(**params, ignore_eos=True, detokenize=False),
        use_tqdm=False,
    )
    full = params["logprobs"] == -1
    return [
        {
            "completion": list(output.outputs[0].token_ids),
            "logprobs": _values(
                output.outputs[0].token_ids, output.outputs[0].logprobs, full
            ),
            "prompt_logprobs": _values(
                output.prompt_token_ids[1:], (output.prompt_logprobs or [None])[1:]
            ),
            "cached": output.num_cached_tokens or 0,
        }
        for output in outputs
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


def preemptions() -> int:
    (counter,) = (m for m in _llm.get_metrics() if m.name == "vllm:num_preemptions")
    return counter.value
