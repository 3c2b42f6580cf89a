# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""How the engine talks to the module that a builder has returned."""

import inspect

import torch
from torch import nn

VLLM_INTERFACE = ("embed_input_ids", "forward", "compute_logits", "load_weights")


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


def is_adopted(module: nn.Module) -> bool:
    """Whether a module, or one inside it, runs code that `training.adopt` took over."""
    return any(hasattr(part, "adoption") for part in module.modules())


def check_takes_hidden_states(module: nn.Module, builder: str) -> None:
    """Refuse a pipeline stage whose `forward` cannot be given hidden states."""
    signature = inspect.signature(module.forward)
    if "hidden_states" not in signature.parameters:
        raise TypeError(
            f"forward{signature} of {type(module).__name__}, built by {builder}, has "
            "no parameter hidden_states, in which later pipeline stages are given "
            "what the stage before returned (None on the first stage)."
        )


def check_every_token(output: torch.Tensor, tokens: torch.Size, builder: str) -> None:
    """Refuse a module that gives its head other tokens than it was called with.

    Args:
        output: What the head received.
        tokens: Shape of the input that the module was called with.
        builder: The builder's name, for messages.

    Raises:
        ValueError: The head was not given every token once.
    """
    if output.shape[:-1] != tokens:
        raise ValueError(
            f"forward of the module built by {builder} was called with tokens of shape "
            f"{list(tokens)} and gave its head hidden states of shape "
            f"{list(output.shape)}; they must be {[*tokens, 'hidden_size']}. Give the "
            "head every token, not the last alone (x[:, [-1]]): vLLM applies it only "
            "where a token is sampled."
        )


def check_logits(
    logits: torch.Tensor | None, vocab_size: int, head_path: str, builder: str
) -> None:
    """Refuse a head that does not give the logits of the config's vocabulary.

    Args:
        logits: What the head gave, shape = [num_tokens, vocab_size]; None on a rank
            that samples nothing.
        vocab_size: The config's.
        head_path: The head's path.
        builder: The builder's name, for messages.

    Raises:
        ValueError: There are more or fewer.
    """
    if logits is not None and logits.shape[-1] != vocab_size:
        raise ValueError(
            f"The head {head_path!r} of the module built by {builder} gives logits of "
            f"{logits.shape[-1]} tokens, and vocab_size in config.json is "
            f"{vocab_size}. They have to be the same. A head of your own that uses the "
            "weight of a VocabParallelEmbedding gets its padding in the engine, or one "
            "rank's part: use ParallelLMHead(...).tie_weights(embedding) there."
        )
