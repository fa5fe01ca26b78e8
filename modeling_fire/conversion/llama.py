"""LLaMA, and what shares its weights: Mistral, Ministral, Qwen2, Qwen3 (SmolLM is a LLaMA)."""

from typing import Any

from transformers import PreTrainedConfig

from .family import ConversionError, Family, common_fields


def refuse_sliding_window(config: PreTrainedConfig) -> None:
    """A window at least as long as the training length never hid anything, and may go."""
    layer_types = set(getattr(config, "layer_types", None) or ["sliding_attention"])  # Mistral: every layer
    if unknown := layer_types - {"full_attention", "sliding_attention"}:
        raise ConversionError(f"`layer_types` {sorted(unknown)} are not supported, only 'full_attention'.")
    window = getattr(config, "sliding_window", None)
    if config.model_type == "ministral" and window is None:
        raise ConversionError(
            "`sliding_window=None` is not supported: transformers runs no ministral so. Set it to "
            f"`max_position_embeddings` ({config.max_position_embeddings}), which hides nothing."
        )
    if "sliding_attention" in layer_types and window is not None and window < config.max_position_embeddings:
        if not hasattr(type(config), "sliding_window"):
            raise ConversionError(
                f"`sliding_window={window}` is not supported: it is no field of {config.model_type}, whose attention "
                "ignores it in transformers, while the cache does not. Take it out of the config."
            )
        raise ConversionError(
            f"`sliding_window={window}` is not supported: it is shorter than `max_position_embeddings` "
            f"({config.max_position_embeddings}). If the model was never used past its window, set "
            "`max_position_embeddings` to it."
        )


def fire_fields(config: Any) -> dict[str, Any]:
    refuse_sliding_window(config)
    partial = config.rope_parameters.get("partial_rotary_factor", 1.0)
    if partial != 1.0:
        raise ConversionError(f"`partial_rotary_factor={partial}` is not supported: {config.model_type} ignores it.")
    # Others than these may have the fields too, but transformers makes no biases of them.
    model_type = config.model_type
    attention_bias = model_type == "qwen2" or (model_type in ("llama", "qwen3") and config.attention_bias)
    return common_fields(config) | {
        "intermediate_size": config.intermediate_size,
        "num_key_value_heads": config.num_key_value_heads,
        "head_dim": getattr(config, "head_dim", None),
        "hidden_act": config.hidden_act,
        "max_position_embeddings": config.max_position_embeddings,
        "rms_norm_eps": config.rms_norm_eps,
        "qk_norm": model_type == "qwen3",
        "attention_bias": attention_bias,
        "attention_output_bias": attention_bias and model_type != "qwen2",
        "attention_dropout": config.attention_dropout or 0.0,
        "mlp_bias": model_type == "llama" and config.mlp_bias,
        "rope_parameters": config.rope_parameters,
    }


# FIRE's names are LLaMA's.
MODULES = (
    "model.embed_tokens",
    "model.layers.{i}.input_layernorm",
    "model.layers.{i}.self_attn.q_proj",
    "model.layers.{i}.self_attn.k_proj",
    "model.layers.{i}.self_attn.v_proj",
    "model.layers.{i}.self_attn.q_norm",
    "model.layers.{i}.self_attn.k_norm",
    "model.layers.{i}.self_attn.o_proj",
    "model.layers.{i}.post_attention_layernorm",
    "model.layers.{i}.mlp.gate_proj",
    "model.layers.{i}.mlp.up_proj",
    "model.layers.{i}.mlp.down_proj",
    "model.norm",
    "lm_head",
)

LLAMA = Family(
    model_types=("llama", "mistral", "ministral", "qwen2", "qwen3"),
    prefix="model.",
    weights={name: name for name in MODULES},
    fire_fields=fire_fields,
    ignored=(r"\.rotary_emb\.inv_freq$",),
)
