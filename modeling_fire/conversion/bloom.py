"""BLOOM: ALiBi, a norm after the embedding, query, key and value fused head by head."""

from typing import Any

from ..other_biases_fire import alibi_slopes
from .family import QKV, Family, Fused, common_fields, require, split_by_head


def fire_fields(config: Any) -> dict[str, Any]:
    require(config, apply_residual_connection_post_layernorm=False, hidden_dropout=0.0)
    return common_fields(config) | {
        "intermediate_size": 4 * config.hidden_size,
        "hidden_act": "gelu_pytorch_tanh",
        "max_position_embeddings": getattr(config, "seq_length", 2048),  # not every BLOOM says it; all had 2048
        "rms_norm_eps": config.layer_norm_epsilon,
        "norm_type": "layer_norm",
        "embedding_norm": True,
        "attention_bias": True,
        "attention_dropout": config.attention_dropout,
        "mlp_gated": False,
        "mlp_bias": True,
    }


BLOOM = Family(
    model_types=("bloom",),
    prefix="transformer.",
    weights={
        "transformer.word_embeddings": "model.embed_tokens",
        "transformer.word_embeddings_layernorm": "model.layers.0.embed_norm",
        "transformer.h.{i}.input_layernorm": "model.layers.{i}.input_layernorm",
        "transformer.h.{i}.self_attention.query_key_value": Fused(QKV, split_by_head),
        "transformer.h.{i}.self_attention.dense": "model.layers.{i}.self_attn.o_proj",
        "transformer.h.{i}.post_attention_layernorm": "model.layers.{i}.post_attention_layernorm",
        "transformer.h.{i}.mlp.dense_h_to_4h": "model.layers.{i}.mlp.up_proj",
        "transformer.h.{i}.mlp.dense_4h_to_h": "model.layers.{i}.mlp.down_proj",
        "transformer.ln_f": "model.norm",
        "lm_head": "lm_head",
    },
    fire_fields=fire_fields,
    alibi_slopes=lambda config: alibi_slopes(config.num_attention_heads),
)
