# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""How the engine talks to the module that a builder has returned."""

import inspect
from typing import Any

import torch
from torch import nn

from vllm.model_executor.models.builder.head import HeadTap

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


def call_module(
    module: nn.Module,
    batched: bool,
    input_ids: torch.Tensor | None,
    positions: torch.Tensor,
    hidden_states: torch.Tensor | None = None,
) -> Any:
    """Call a training-only module with packed tokens.

    Args:
        module: Its `forward` takes `(input_ids, positions)` and, on later pipeline
            stages, `hidden_states`.
        batched: Whether it wants `[1, num_tokens]`.
        input_ids: shape = [num_tokens]; None on later pipeline stages.
        positions: shape = [num_tokens].
        hidden_states: What the stage before returned, shape = [num_tokens,
            hidden_size]; None on the first stage.

    Returns:
        What it returned: a row for each token, batched if it is.
    """
    carried = {} if hidden_states is None else {"hidden_states": hidden_states}
    if batched:
        input_ids = None if input_ids is None else input_ids[None]
        positions = positions[None]
        carried = {name: tensor[None] for name, tensor in carried.items()}
    return module(input_ids, positions, **carried)


def check_head_output(output: Any, tap: HeadTap, head_path: str, builder: str) -> None:
    """Refuse a module that changes what its head gives.

    Args:
        output: What the module returned while `tap` stood for its head.
        tap: The head's.
        head_path: The head's path.
        builder: The builder's name, for messages.

    Raises:
        TypeError: The output is not that of the head.
    """
    if tap.hidden_states is not None and output is tap.hidden_states:
        return
    returned = f"forward returned another {type(output).__name__}"
    if tap.hidden_states is None:
        returned = "forward did not call the head"
    raise TypeError(
        f"forward of the module built by {builder} does not return the output of its "
        f"head {head_path!r} unchanged: {returned}. So logits cannot be computed for "
        "the sampled positions alone. Return only the head's output, move what follows "
        "the head into the head module, or return a module with vLLM's interface "
        f"({', '.join(VLLM_INTERFACE)})."
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
