# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""Reading the `config.json` of an architecture that no library knows."""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from transformers import CONFIG_MAPPING, PreTrainedConfig

from vllm.logger import init_logger
from vllm.model_executor import vllm_internals
from vllm.model_executor.models.config_sizes import REQUIRED, check_sizes
from vllm.model_executor.models.generic_transformer_config import (
    GenericTransformerConfig,
)

if TYPE_CHECKING:
    from vllm.config import ModelConfig

logger = init_logger(__name__)


class BuilderConfigParser(vllm_internals.HFConfigParser):
    """Takes the place of vLLM's parser of `config.json` once a model is registered.

    A config that names a registered architecture and that nothing else can read (no
    known `model_type`, no class, no hub) is taken as it stands. Required are the fields
    of `REQUIRED`, which vLLM sizes the KV cache and the sampler by. Every other config
    is vLLM's to parse.

    Attributes:
        architectures: The architectures known in this process.
    """

    architectures: set[str] = set()

    def parse(
        self,
        model: str | Path,
        trust_remote_code: bool,
        revision: str | None = None,
        code_revision: str | None = None,
        **kwargs: Any,
    ) -> tuple[dict, PreTrainedConfig]:
        path = Path(model) / "config.json"
        overrides = kwargs.get("hf_overrides")
        fields = read_fields(path) if path.is_file() else {}
        given = fields | (overrides if isinstance(overrides, dict) else {})
        ours = self.architectures & set(given.get("architectures") or ())
        if not (ours and is_unknown(given)):
            return super().parse(
                model, trust_remote_code, revision, code_revision, **kwargs
            )
        missing = [name for name in REQUIRED if given.get(name) is None]
        if missing:
            raise ValueError(
                f"{path} lacks {', '.join(missing)}. A builder's model needs "
                f"{', '.join(REQUIRED)} there (and, where they differ from the "
                "defaults, num_key_value_heads, head_dim, max_position_embeddings)."
            )
        check_sizes(given, str(path))
        return fields, config_class(fields).from_dict(dict(fields))


def config_class(fields: dict[str, Any]) -> type[PreTrainedConfig]:
    """The class that holds `fields`: the generic transformer's own, or the base."""
    if fields.get("model_type") == GenericTransformerConfig.model_type:
        return GenericTransformerConfig
    return PreTrainedConfig


def read_fields(path: Path) -> dict[str, Any]:
    """The object in a JSON file; `ValueError` that names the file if it is not one."""
    try:
        fields = json.loads(path.read_text())
    except ValueError as error:
        raise ValueError(f"{path} is not valid JSON: {error}") from error
    if not isinstance(fields, dict):
        raise ValueError(f"{path} holds a {type(fields).__name__}, not an object.")
    return fields


def is_unknown(fields: dict[str, Any]) -> bool:
    """Whether neither transformers, vLLM nor code in the model directory reads it."""
    model_type = fields.get("model_type")
    return not (
        fields.get("auto_map")
        or model_type in CONFIG_MAPPING
        or model_type in vllm_internals.CONFIG_REGISTRY
    )


def choose_dtype(model_config: "ModelConfig", is_builder: bool) -> None:
    """Let `dtype="auto"` serve a registered model in the dtype of its checkpoint.

    vLLM rounds fp32 to bf16 there. What only we read the config of is served in fp32;
    of other models vLLM's choice stands, and a warning says what it does.

    Args:
        model_config: With the model's config, its own dtype not yet resolved.
        is_builder: Whether the model is registered by a builder, and no class.
    """
    config = model_config.hf_config
    if model_config.dtype != "auto":
        return
    stored = vllm_internals.checkpoint_dtype(model_config)
    if stored not in (torch.float32, torch.float64):
        return
    if is_unknown(config.to_dict()):
        model_config.dtype = torch.float32
        logger.info_once(
            "The checkpoint %s is in %s and is served in float32; dtype='bfloat16' "
            "serves it rounded, in half of the memory.",
            model_config.model,
            stored,
        )
    elif is_builder:
        logger.warning_once(
            "The checkpoint %s is in %s, and dtype='auto' rounds its weights to %s, as "
            "vLLM does for model_type %r. Pass dtype='float32' to serve what was "
            "trained, or name the dtype to serve it rounded without this warning.",
            model_config.model,
            stored,
            vllm_internals.auto_dtype(
                config.model_type, stored, is_pooling_model=False
            ),
            config.model_type,
        )


def tie_as_configured(model_config: "ModelConfig") -> bool:
    """Let a training-only module tie its head as its config says.

    vLLM takes `tie_word_embeddings` back where the checkpoint has an `lm_head` of its
    own, and the engine would serve a head that a trainer's model, tied by the same
    config, does not have. Of a tied module the loader compares the two tensors.

    Returns:
        Whether vLLM had taken it back, so that what was built has to be built again.
    """
    if not model_config.word_embeddings_untied_by_checkpoint:
        return False
    for config in (model_config.hf_config, model_config.hf_text_config):
        config.tie_word_embeddings = True
    model_config.word_embeddings_untied_by_checkpoint = False
    return True


def read_configs_of(architectures: Iterable[str]) -> None:
    """Let vLLM read the configs of these architectures from now on."""
    BuilderConfigParser.architectures |= set(architectures)
    vllm_internals.CONFIG_PARSERS["hf"] = BuilderConfigParser
