# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""The sizes of a generic transformer."""

from typing import Any

from transformers import PreTrainedConfig

from vllm.model_executor.models.config_sizes import check_sizes


class GenericTransformerConfig(PreTrainedConfig):
    """Sizes of a `GenericTransformerForCausalLM`.

    Args:
        vocab_size: Number of tokens.
        hidden_size: Width of the residual stream.
        intermediate_size: Width of the gated MLP. Default: 8/3 of `hidden_size`,
            rounded up to a multiple of 64.
        num_hidden_layers: Number of blocks.
        num_attention_heads: Number of query heads.
        num_key_value_heads: Number of key and value heads. Default:
            `num_attention_heads`.
        head_dim: Size of a head. Default: `hidden_size // num_attention_heads`.
        max_position_embeddings: Longest sequence, in tokens.
        rope_theta: Base of the rotary frequencies.
        rope_parameters: How rotary positions are scaled, as in Hugging Face's configs
            (`rope_scaling` in older ones); what `RotaryEmbedding` takes.
        rms_norm_eps: Added to the mean square before its root is taken.
        initializer_range: Standard deviation of the initial weights.
        tie_word_embeddings: Whether the head uses the embedding's weight.

    Raises:
        ValueError: The sizes do not fit each other.
    """

    model_type = "generic_transformer"

    vocab_size: int = 32000
    hidden_size: int = 512
    intermediate_size: int | None = None
    num_hidden_layers: int = 8
    num_attention_heads: int = 8
    num_key_value_heads: int | None = None
    head_dim: int | None = None
    max_position_embeddings: int = 2048
    rope_theta: float = 10000.0
    rope_parameters: dict[str, Any] | None = None
    rms_norm_eps: float = 1e-6
    initializer_range: float = 0.02
    tie_word_embeddings: bool = False

    def __post_init__(self, **kwargs: Any) -> None:
        check_sizes(vars(self), type(self).__name__)
        heads = self.num_attention_heads
        if self.num_key_value_heads is None:
            self.num_key_value_heads = heads
        if self.intermediate_size is None:
            self.intermediate_size = -(-self.hidden_size * 8 // 3 // 64) * 64
        if self.head_dim is None:
            self.head_dim = self.hidden_size // heads
        if self.architectures is None:
            self.architectures = ["GenericTransformerForCausalLM"]
        super().__post_init__(**kwargs)

    @classmethod
    def of(cls, config: PreTrainedConfig) -> "GenericTransformerConfig":
        """The same sizes from another class of config, such as transformers' Llama's.

        Raises:
            ValueError: It asks for something that the model does not have.
        """
        if isinstance(config, cls):
            return config
        fields = config.to_dict()
        rope = fields.get("rope_parameters") or {}
        fields.setdefault("rope_theta", rope.get("rope_theta", cls.rope_theta))
        wanted = {
            "hidden_act": (fields.get("hidden_act", "silu"), "silu"),
            "attention_bias": (fields.get("attention_bias", False), False),
            "mlp_bias": (fields.get("mlp_bias", False), False),
        }
        other = {name: given for name, (given, has) in wanted.items() if given != has}
        if other:
            raise ValueError(
                f"A generic transformer cannot be built from this "
                f"{type(config).__name__}: it asks for {other}, but the model has "
                f"{ {name: wanted[name][1] for name in other} }."
            )
        fields.pop("architectures", None)
        return cls.from_dict(fields)
