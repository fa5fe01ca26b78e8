"""GPT-NeoX (Pythia): partial rotation, parallel or sequential residual, query, key and value fused head by head."""

from typing import Any

from .family import QKV, Family, Fused, common_fields, require, split_by_head


def fire_fields(config: Any) -> dict[str, Any]:
    require(config, hidden_dropout=0.0, sliding_window=None)  # of the latter only transformers' cache knows
    return common_fields(config) | {
        "intermediate_size": config.intermediate_size,
        "hidden_act": config.hidden_act,
        "max_position_embeddings": config.max_position_embeddings,
        "rms_norm_eps": config.layer_norm_eps,
        "norm_type": "layer_norm",
        "parallel_residual": config.use_parallel_residual,
        "attention_bias": config.attention_bias,
        "attention_dropout": config.attention_dropout,
        "mlp_gated": False,
        "mlp_bias": True,
        "rope_parameters": config.rope_parameters,
    }


GPT_NEOX = Family(
    model_types=("gpt_neox",),
    prefix="gpt_neox.",
    weights={
        "gpt_neox.embed_in": "model.embed_tokens",
        "gpt_neox.layers.{i}.input_layernorm": "model.layers.{i}.input_layernorm",
        "gpt_neox.layers.{i}.attention.query_key_value": Fused(QKV, split_by_head),
        "gpt_neox.layers.{i}.attention.dense": "model.layers.{i}.self_attn.o_proj",
        "gpt_neox.layers.{i}.post_attention_layernorm": "model.layers.{i}.post_attention_layernorm",
        "gpt_neox.layers.{i}.mlp.dense_h_to_4h": "model.layers.{i}.mlp.up_proj",
        "gpt_neox.layers.{i}.mlp.dense_4h_to_h": "model.layers.{i}.mlp.down_proj",
        "gpt_neox.final_layer_norm": "model.norm",
        "embed_out": "lm_head",
        "lm_head": "lm_head",  # as some versions of transformers 5 may save it
    },
    fire_fields=fire_fields,
    ignored=(r"\.attention\.bias$", r"\.attention\.masked_bias$", r"\.rotary_emb\.inv_freq$"),
)
