"""MPT: ALiBi, norms without bias, query, key and value in thirds."""

from typing import Any

from ..other_biases_fire import alibi_slopes
from .family import QKV, Family, Fused, common_fields, require, split_in_thirds


def fire_fields(config: Any) -> dict[str, Any]:
    attention = config.attn_config
    require(config, logit_scale=None, resid_pdrop=0.0, emb_pdrop=0.0, expansion_ratio=4)
    require(attention, alibi=True, attn_type="multihead_attention", clip_qkv=None, qk_ln=False, prefix_lm=False)
    require(attention, attn_uses_sequence_id=False, attn_pdrop=0)
    require(attention, alibi_bias_max=8)  # transformers has 8 whatever the config says
    if attention.softmax_scale != (config.d_model / config.n_heads) ** -0.5:
        require(attention, softmax_scale=None)
    return common_fields(config) | {
        "intermediate_size": 4 * config.d_model,
        "hidden_act": "gelu",
        "max_position_embeddings": config.max_seq_len,
        "rms_norm_eps": config.layer_norm_epsilon,
        "norm_type": "layer_norm",
        "norm_bias": False,
        "mlp_gated": False,
    }


MPT = Family(
    model_types=("mpt",),
    prefix="transformer.",
    weights={
        "transformer.wte": "model.embed_tokens",
        "transformer.blocks.{i}.norm_1": "model.layers.{i}.input_layernorm",
        "transformer.blocks.{i}.attn.Wqkv": Fused(QKV, split_in_thirds),
        "transformer.blocks.{i}.attn.out_proj": "model.layers.{i}.self_attn.o_proj",
        "transformer.blocks.{i}.norm_2": "model.layers.{i}.post_attention_layernorm",
        "transformer.blocks.{i}.ffn.up_proj": "model.layers.{i}.mlp.up_proj",
        "transformer.blocks.{i}.ffn.down_proj": "model.layers.{i}.mlp.down_proj",
        "transformer.norm_f": "model.norm",
        "lm_head": "lm_head",
    },
    fire_fields=fire_fields,
    alibi_slopes=lambda config: alibi_slopes(config.n_heads),
)
