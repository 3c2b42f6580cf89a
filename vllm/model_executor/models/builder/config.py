# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""Reading the `config.json` of an architecture that no library knows."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from transformers import CONFIG_MAPPING, PreTrainedConfig

from vllm.model_executor import upstream

if TYPE_CHECKING:
    from vllm.config import ModelConfig

CONFIG_FORMAT = "builder"
REQUIRED = ("hidden_size", "num_hidden_layers", "num_attention_heads", "vocab_size")


class BuilderConfigParser(upstream.ConfigParserBase):
    """Takes every field of `config.json` as it stands.

    No `model_type`, no class and no hub is needed. Required are the fields of
    `REQUIRED`, which vLLM sizes the KV cache and the sampler by.
    """

    def parse(
        self,
        model: str | Path,
        trust_remote_code: bool,
        revision: str | None = None,
        code_revision: str | None = None,
        **kwargs: Any,
    ) -> tuple[dict, PreTrainedConfig]:
        path = Path(model) / "config.json"
        fields = read_fields(path)
        overrides = kwargs.get("hf_overrides")
        given = fields | (overrides if isinstance(overrides, dict) else {})
        missing = [name for name in REQUIRED if given.get(name) is None]
        if missing:
            raise ValueError(
                f"{path} lacks {', '.join(missing)}. A builder's model needs "
                f"{', '.join(REQUIRED)} there (and, where they differ from the "
                "defaults, num_key_value_heads, head_dim, max_position_embeddings)."
            )
        check_sizes(given, str(path))
        return fields, config_class(fields).from_dict(dict(fields))


def check_sizes(fields: Mapping[str, Any], where: str) -> None:
    """Refuse sizes that no model can have.

    Args:
        fields: Holds those of `REQUIRED`; others may be None or absent.
        where: Begins the message.

    Raises:
        ValueError: Names the fields and what they have to be.
    """
    counts = (*REQUIRED, "num_key_value_heads", "head_dim")
    given = {n: fields[n] for n in counts if fields.get(n) is not None}
    wrong = {n: value for n, value in given.items() if not _is_count(value)}
    if wrong:
        raise ValueError(f"{where}: {wrong} must be whole numbers of at least 1.")
    heads, hidden = given["num_attention_heads"], given["hidden_size"]
    if "head_dim" not in given and hidden % heads:
        raise ValueError(
            f"{where}: hidden_size {hidden} is not divisible by num_attention_heads "
            f"{heads}. Change one of them or give head_dim."
        )
    kv_heads = given.get("num_key_value_heads", heads)
    if heads % kv_heads:
        raise ValueError(
            f"{where}: num_attention_heads {heads} is not a multiple of "
            f"num_key_value_heads {kv_heads}."
        )


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 1


def config_class(fields: dict[str, Any]) -> type[PreTrainedConfig]:
    """The class that holds `fields`: the generic transformer's own, or the base."""
    from vllm.model_executor.models.generic_transformer import GenericTransformerConfig

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
        or model_type in upstream.CONFIG_REGISTRY
    )


def choose_config_format(
    model_config: "ModelConfig", registered: Sequence[str]
) -> None:
    """Called before vLLM reads the model's config.

    Selects `BuilderConfigParser` if the format was left to vLLM, the directory's
    `config.json` names an architecture of `registered`, and nothing else can read
    it; such a config is refused without it.

    Args:
        model_config: `model` and `config_format` are read, `config_format` is set.
        registered: The architectures registered in this process.
    """
    path = Path(model_config.hf_config_path or model_config.model) / "config.json"
    if model_config.config_format not in ("auto", "hf") or not path.is_file():
        return
    fields = read_fields(path)
    overrides = model_config.hf_overrides
    if isinstance(overrides, dict):
        fields |= overrides
    if is_unknown(fields) and set(fields.get("architectures") or ()) & set(registered):
        if CONFIG_FORMAT not in upstream.CONFIG_PARSERS:
            upstream.register_config_parser(CONFIG_FORMAT)(BuilderConfigParser)
        model_config.config_format = CONFIG_FORMAT
