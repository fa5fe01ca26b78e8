"""FIRE models: a pre-norm decoder whose attention scores carry a learned function of distance (arXiv 2310.04418)."""

import functools
import re
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn
from transformers import GenerationMixin, PreTrainedModel
from transformers.activations import ACT2FN
from transformers.cache_utils import Cache, DynamicCache
from transformers.masking_utils import create_causal_mask
from transformers.modeling_layers import (
    GenericForQuestionAnswering,
    GenericForSequenceClassification,
    GenericForTokenClassification,
    GradientCheckpointingLayer,
)
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
from transformers.models.gpt_neox.modeling_gpt_neox import apply_rotary_pos_emb
from transformers.models.llama.modeling_llama import LlamaRMSNorm
from transformers.processing_utils import Unpack
from transformers.utils import TransformersKwargs, can_return_tuple
from transformers.utils.generic import merge_with_config_defaults
from transformers.utils.output_capturing import capture_outputs

from .attention_fire import ALL_ATTENTION_FUNCTIONS, check_attn_implementation, eager_attention_forward
from .base_bias_fire import PositionBias
from .cache_fire import CACHE, named, takes_cache
from .configuration_fire import FireConfig
from .linear_fire import Float32Linear
from .position_bias_fire import FirePositionBias, build_position_bias
from .positions_fire import FirePositions, has_padding, paged_positions, token_positions
from .rotary_fire import FireRotaryEmbedding


try:
    from transformers.modeling_utils import slice_logits_to_keep
except ImportError:  # transformers 5.17

    def slice_logits_to_keep(hidden_states: torch.Tensor, logits_to_keep: int | torch.Tensor) -> torch.Tensor:
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        return hidden_states[:, kept]


def build_norm(config: FireConfig) -> nn.Module:
    """The norm of the hidden states that `config` asks for."""
    if config.norm_type == "layer_norm":
        return nn.LayerNorm(config.hidden_size, eps=config.rms_norm_eps, bias=config.norm_bias)
    return LlamaRMSNorm(config.hidden_size, eps=config.rms_norm_eps)


class FireMLP(nn.Module):
    """`down(act(gate(x)) * up(x))`, or `down(act(up(x)))` without a gate."""

    def __init__(self, config: FireConfig):
        super().__init__()
        if config.mlp_gated:
            self.gate_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=config.mlp_bias)
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=config.mlp_bias)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=config.mlp_bias)
        self.act_fn = ACT2FN[config.hidden_act]
        self.gated = config.mlp_gated

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        up = self.up_proj(hidden_states)
        return self.down_proj(self.act_fn(self.gate_proj(hidden_states)) * up if self.gated else self.act_fn(up))


class FireAttention(nn.Module):
    """Multi-head attention with a position bias added to the scores, optionally beside a rotation."""

    def __init__(self, config: FireConfig, layer_idx: int):
        super().__init__()
        self.config = config
        self.layer_idx = layer_idx
        self.head_dim = config.head_dim
        self.num_key_value_groups = config.num_attention_heads // config.num_key_value_heads
        self.scaling = self.head_dim**-0.5
        self.attention_dropout = config.attention_dropout
        self.is_causal = True

        width, kv_width = (n * self.head_dim for n in (config.num_attention_heads, config.num_key_value_heads))
        self.q_proj = nn.Linear(config.hidden_size, width, bias=config.attention_bias)
        self.k_proj = nn.Linear(config.hidden_size, kv_width, bias=config.attention_bias)
        self.v_proj = nn.Linear(config.hidden_size, kv_width, bias=config.attention_bias)
        self.o_proj = nn.Linear(width, config.hidden_size, bias=config.attention_output_bias)
        if config.qk_norm:
            self.q_norm = LlamaRMSNorm(self.head_dim, eps=config.rms_norm_eps)
            self.k_norm = LlamaRMSNorm(self.head_dim, eps=config.rms_norm_eps)
        self.position_bias = None if config.fire_share_layers else build_position_bias(config)

    def project(
        self, hidden_states: torch.Tensor, position_embeddings: tuple[torch.Tensor, torch.Tensor] | None = None
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Queries, keys and values, of shape `(batch, heads, length, head_dim)` with the heads that each has."""
        hidden_shape = (*hidden_states.shape[:-1], -1, self.head_dim)
        query_states = self.q_proj(hidden_states).view(hidden_shape)
        key_states = self.k_proj(hidden_states).view(hidden_shape)
        value_states = self.v_proj(hidden_states).view(hidden_shape).transpose(1, 2)
        if self.config.qk_norm:
            query_states, key_states = self.q_norm(query_states), self.k_norm(key_states)
        query_states, key_states = query_states.transpose(1, 2), key_states.transpose(1, 2)
        if position_embeddings is not None:
            query_states, key_states = apply_rotary_pos_emb(query_states, key_states, *position_embeddings)
        return query_states, key_states, value_states

    @takes_cache
    def forward(
        self,
        hidden_states: torch.Tensor,
        positions: FirePositions,
        shared_position_bias: PositionBias | None = None,
        position_embeddings: tuple[torch.Tensor, torch.Tensor] | None = None,
        attention_mask: torch.Tensor | None = None,
        cache: Cache | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        query_states, key_states, value_states = self.project(hidden_states, position_embeddings)
        if cache is not None:
            key_states, value_states = cache.update(key_states, value_states, self.layer_idx, kwargs=kwargs)

        attention_interface: Callable = ALL_ATTENTION_FUNCTIONS.get_interface(
            self.config._attn_implementation, eager_attention_forward
        )
        attn_output, attn_weights = attention_interface(
            self,
            query_states,
            key_states,
            value_states,
            attention_mask,
            positions=positions,
            position_bias=self.position_bias if shared_position_bias is None else shared_position_bias,
            dropout=0.0 if not self.training else self.attention_dropout,
            scaling=self.scaling,
            **kwargs,
        )
        return self.o_proj(attn_output.reshape(*hidden_states.shape[:-1], -1).contiguous()), attn_weights


class FireDecoderLayer(GradientCheckpointingLayer):
    """Attention and MLP, each after a norm; one after the other or side by side."""

    def __init__(self, config: FireConfig, layer_idx: int):
        super().__init__()
        self.parallel_residual = config.parallel_residual
        # In the first layer rather than before it, where a pipeline stage would apply it to hidden states.
        self.embed_norm = build_norm(config) if config.embedding_norm and layer_idx == 0 else None
        self.self_attn = FireAttention(config, layer_idx)
        self.mlp = FireMLP(config)
        self.input_layernorm = build_norm(config)
        self.post_attention_layernorm = build_norm(config)

    def forward(self, hidden_states: torch.Tensor, **kwargs: Unpack[TransformersKwargs]) -> torch.Tensor:
        if self.embed_norm is not None:
            hidden_states = self.embed_norm(hidden_states)
        attn_output, _ = self.self_attn(hidden_states=self.input_layernorm(hidden_states), **kwargs)
        if self.parallel_residual:
            return hidden_states + attn_output + self.mlp(self.post_attention_layernorm(hidden_states))
        hidden_states = hidden_states + attn_output
        return hidden_states + self.mlp(self.post_attention_layernorm(hidden_states))


class FirePreTrainedModel(PreTrainedModel):
    """Weights, loading and the flags that tell transformers what a FIRE model can do."""

    config: FireConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules = ["FireDecoderLayer"]
    # With a device map a shared bias stays where it is, and its result moves.
    _skip_keys_device_placement = ["cache", "past_key_values", "shared_position_bias"]
    _supports_sdpa = True
    _supports_flex_attn = True
    _supports_flash_attn = False  # flash attention takes no bias
    _supports_attention_backend = True
    _supports_context_parallel = False
    _can_compile_fullgraph = True
    # Loading reads the strict list; quantisers read the other one, and match it from the start of the name.
    _keep_in_fp32_modules = [r".*position_bias"]
    _keep_in_fp32_modules_strict = ["position_bias"]
    _can_record_outputs = {"hidden_states": FireDecoderLayer, "attentions": FireAttention}

    @torch.no_grad()
    def _init_weights(self, module: nn.Module):
        super()._init_weights(module)
        if isinstance(module, (PositionBias, Float32Linear)):
            module.reset_parameters()

    def _check_and_adjust_attn_implementation(self, attn_implementation: str | None, *args, **kwargs) -> str:
        check_attn_implementation(attn_implementation)
        if attn_implementation is None and self.config.position_bias != "none":
            attn_implementation = "fire"
        return super()._check_and_adjust_attn_implementation(attn_implementation, *args, **kwargs)


class FireModel(FirePreTrainedModel):
    """
    The decoder without a head.

    Args:
        config ([`FireConfig`]): its shape and position encoding.
    """

    def __init__(self, config: FireConfig):
        super().__init__(config)
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size, config.pad_token_id)
        self.layers = nn.ModuleList([FireDecoderLayer(config, i) for i in range(config.num_hidden_layers)])
        self.norm = build_norm(config)
        self.position_bias = build_position_bias(config) if config.fire_share_layers else None
        self.rotary_emb = None
        if config.rope_parameters is not None:
            self.rotary_emb = FireRotaryEmbedding(config)  # type: ignore[arg-type]
        self.gradient_checkpointing = False
        self.post_init()

    def init_parallel_plans(self) -> None:
        """Drops what the plan says of modules that this configuration has not."""
        super().init_parallel_plans()
        names = {re.sub(r"\.\d+(?=\.|$)", ".*", name) for name, _ in self.named_modules()}
        self._tp_plan = {name: style for name, style in self._tp_plan.items() if name in names}

    @takes_cache
    @merge_with_config_defaults
    @capture_outputs
    def forward(  # type: ignore[misc]
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        cache: Cache | None = None,
        inputs_embeds: torch.Tensor | None = None,
        use_cache: bool | None = None,
        key_position_ids: torch.LongTensor | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> BaseModelOutputWithPast:
        r"""
        Args:
            input_ids (`torch.LongTensor` of shape `(batch, length)`, *optional*): Tokens.
            attention_mask (`torch.Tensor` of shape `(batch, past + length)`, *optional*):
                1 for tokens, 0 for padding, on either side. A prepared mask of 4 dimensions is used as it is.
            position_ids (`torch.LongTensor` of shape `(batch or 1, length)`, *optional*):
                Position of each token in its document. By default counted from `attention_mask` and the cache.
                Positions that do not go on by 1, as where they start again at 0, mark packed documents, which do not
                see each other; that needs `attention_mask=None` and no `cache`. Without `position_ids`,
                `cu_seq_lens_q`, of shape `(documents + 1,)`, tells where documents begin.
            cache (`Cache`, *optional*):
                KV cache; any of transformers' classes. Up to transformers 5.23 its name is `past_key_values`.
            inputs_embeds (`torch.Tensor` of shape `(batch, length, hidden_size)`, *optional*): Instead of `input_ids`.
            use_cache (`bool`, *optional*): Whether to return a cache.
            key_position_ids (`torch.LongTensor` of shape `(batch or 1, past + length)`, *optional*):
                Positions of all keys, cached ones included, for positions that are not consecutive (randomised
                positions). Given with `position_ids`; gaps then do not mark packed documents. `generate` has no way
                to extend them, so it takes consecutive positions only.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("Give exactly one of `input_ids` and `inputs_embeds`.")
        if key_position_ids is not None and position_ids is None:
            raise ValueError("`key_position_ids` are for the keys: give the queries' `position_ids` beside them.")
        if inputs_embeds is None:
            inputs_embeds = self.embed_tokens(input_ids)

        # Once for all layers, and before a new cache is made: packed documents are recognised only without one.
        queries: Any = kwargs.get("cu_seq_lens_q")
        keys: Any = kwargs.get("cu_seq_lens_k")
        if isinstance(keys, dict):  # continuous batching
            positions = paged_positions(position_ids, queries, keys["full_attention"], attention_mask)
        else:
            if queries is not None and position_ids is None:
                packed = FirePositions.packed(queries.to(inputs_embeds.device), inputs_embeds.shape[1])
                position_ids = packed.absolute  # type: ignore[assignment]
            # A pipeline stage has not the first layers; all that it has have seen the same tokens.
            layer_idx = next((i for i, layer in enumerate(self.layers) if isinstance(layer, FireDecoderLayer)), 0)
            positions = token_positions(
                inputs_embeds, attention_mask, position_ids, key_position_ids, cache, layer_idx
            )
        causal_mask: Any
        if self.config._attn_implementation == "fire":
            # The positions say who sees whom, unless the caller's own mask does.
            causal_mask = attention_mask if positions.first is None else None
        else:
            causal_mask = create_causal_mask(
                config=self.config,
                inputs_embeds=inputs_embeds,
                attention_mask=attention_mask,
                position_ids=position_ids if key_position_ids is None else None,
                **named(cache),
            )
        if use_cache and cache is None:
            cache = DynamicCache(config=self.config)

        hidden_states = inputs_embeds
        position_embeddings = None
        if self.rotary_emb is not None:
            position_embeddings = self.rotary_emb(hidden_states, position_ids=positions.absolute)

        for decoder_layer in self.layers[: self.config.num_hidden_layers]:  # fewer when it assists itself
            hidden_states = decoder_layer(
                hidden_states,
                attention_mask=causal_mask,
                positions=positions,
                shared_position_bias=self.position_bias,
                position_embeddings=position_embeddings,
                use_cache=use_cache,
                **named(cache),  # which gradient checkpointing looks for
                **kwargs,
            )
        return BaseModelOutputWithPast(last_hidden_state=self.norm(hidden_states), **named(cache))


class FireForCausalLM(FirePreTrainedModel, GenerationMixin):
    """
    The decoder with a language-modelling head.

    Args:
        config ([`FireConfig`]): its shape and position encoding.
    """

    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}
    _tp_plan = {"lm_head": "colwise_gather_output"}
    _pp_plan = {"lm_head": (["hidden_states"], ["logits"])}  # type: ignore[dict-item]
    _fsdp_plan = {"lm_head": "keep_full_weight"}

    def __init__(self, config: FireConfig):
        super().__init__(config)
        self.model = FireModel(config)
        self.vocab_size = config.vocab_size
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    @takes_cache
    @can_return_tuple
    def forward(  # type: ignore[misc]
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        cache: Cache | None = None,
        inputs_embeds: torch.Tensor | None = None,
        labels: torch.LongTensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        **kwargs: Unpack[TransformersKwargs],
    ) -> CausalLMOutputWithPast:
        r"""
        Args:
            labels (`torch.LongTensor` of shape `(batch, length)`, *optional*):
                Tokens to predict, shifted by the loss; -100 is ignored. With `num_items_in_batch` the loss is the sum
                over tokens divided by it.
            logits_to_keep (`int` or `torch.Tensor`, *optional*, defaults to 0):
                Compute logits for the last so many tokens (0: all), or for these indices.

        The other arguments are those of [`FireModel.forward`].
        """
        outputs: BaseModelOutputWithPast = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            cache=cache,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            **kwargs,
        )
        logits = self.lm_head(slice_logits_to_keep(outputs.last_hidden_state, logits_to_keep))
        loss = None
        if labels is not None:
            loss = self.loss_function(logits=logits, labels=labels, vocab_size=self.config.vocab_size, **kwargs)
        return CausalLMOutputWithPast(
            loss=loss,
            logits=logits,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
            **named(getattr(outputs, CACHE)),
        )

    @staticmethod
    @takes_cache
    def create_masks_for_generate(attention_mask: torch.Tensor | None, cache: Cache, **kwargs) -> torch.Tensor | None:
        """
        The padding mask for a static cache, of 2 dimensions, of which `forward` makes positions: as long as the cache,
        so that a compiled `forward` meets one shape, and none where nothing is hidden, which it could not tell.
        """
        if attention_mask is None or not has_padding(attention_mask):
            return None
        return nn.functional.pad(attention_mask, (0, cache.get_max_length() - attention_mask.shape[1]))

    @functools.wraps(GenerationMixin.generate)
    def generate(self, *args, **kwargs):  # type: ignore[override]
        self.forget()
        try:
            for bias in self.biases():
                bias.prepare()
            return super().generate(*args, **kwargs)  # type: ignore[misc]
        finally:
            self.forget()

    def biases(self) -> Iterator[FirePositionBias]:
        return (module for module in self.modules() if isinstance(module, FirePositionBias))

    def forget(self) -> None:
        """Drops what the biases remember of earlier steps of generation."""
        for bias in self.biases():
            bias.memory, bias.prepared = {}, None

    def init_continuous_batching(self, *args, **kwargs):
        """
        See transformers, which knows attention implementations by name here: "fire" and "eager" have to be called
        "sdpa" until a manager that was started stops. With a paged cache that is fused all the same.
        """
        self.forget()
        implementation = self.config._attn_implementation
        if implementation not in ("fire", "eager"):
            return super().init_continuous_batching(*args, **kwargs)
        self.set_attn_implementation("sdpa")
        try:
            manager = super().init_continuous_batching(*args, **kwargs)
        except Exception:
            self.set_attn_implementation(implementation)
            raise
        manager._original_attn_impl = implementation  # which it sets again as it stops
        return manager

    def generate_batch(self, *args, **kwargs):
        """Continuous batching, see transformers and `init_continuous_batching`."""
        implementation = self.config._attn_implementation
        try:
            return super().generate_batch(*args, **kwargs)
        finally:
            self.set_attn_implementation(implementation)


# Here Trainer looks up whether labels are to be shifted, where it smooths them.
MODEL_FOR_CAUSAL_LM_MAPPING_NAMES["fire"] = "FireForCausalLM"


# The heads take transformers' generic forward, but not its constructor: that asks AutoModel for the decoder, which
# knows nothing of it where this file was loaded as remote code. The losses of two of them are means over the batch
# whatever `num_items_in_batch` says, which Trainer has to know, or it scales them once more.
class FireForSequenceClassification(GenericForSequenceClassification, FirePreTrainedModel):
    """The decoder with a linear layer on the last token of each sequence (`pad_token_id` tells which that is)."""

    accepts_loss_kwargs = False

    def __init__(self, config: FireConfig):
        FirePreTrainedModel.__init__(self, config)
        self.num_labels = config.num_labels
        self.model = FireModel(config)
        self.score = nn.Linear(config.hidden_size, config.num_labels, bias=False)
        self.post_init()


class FireForTokenClassification(GenericForTokenClassification, FirePreTrainedModel):
    """The decoder with a linear layer on every token, after a dropout of `classifier_dropout` (0.1 if not set)."""

    accepts_loss_kwargs = False

    def __init__(self, config: FireConfig):
        FirePreTrainedModel.__init__(self, config)
        self.num_labels = config.num_labels
        self.model = FireModel(config)
        dropout = getattr(config, "classifier_dropout", None)
        self.dropout = nn.Dropout(0.1 if dropout is None else dropout)
        self.score = nn.Linear(config.hidden_size, config.num_labels)
        self.post_init()


class FireForQuestionAnswering(GenericForQuestionAnswering, FirePreTrainedModel):
    """The decoder with a linear layer that scores every token as the start and as the end of an answer."""

    def __init__(self, config: FireConfig):
        FirePreTrainedModel.__init__(self, config)
        self.model = FireModel(config)
        self.qa_outputs = nn.Linear(config.hidden_size, 2)
        self.post_init()


__all__ = [
    "FireForCausalLM",
    "FireForQuestionAnswering",
    "FireForSequenceClassification",
    "FireForTokenClassification",
    "FireModel",
    "FirePreTrainedModel",
]
