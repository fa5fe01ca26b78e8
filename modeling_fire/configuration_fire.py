"""The configuration of a FIRE model: every architecture and position encoding is a few plainly named fields."""

from typing import Literal

from huggingface_hub.dataclasses import strict
from transformers import PreTrainedConfig
from transformers.activations import ACT2FN


@strict
class FireConfig(PreTrainedConfig):
    r"""
    Configuration of a [`FireModel`]: a pre-norm decoder with FIRE (arXiv 2310.04418) instead of position embeddings.

    The defaults make a LLaMA-shaped decoder. GPT-NeoX, BLOOM and MPT shapes are reached through `norm_type`,
    `norm_bias`, `mlp_gated`, `parallel_residual` and `embedding_norm`.

    Args:
        vocab_size (`int`, *optional*, defaults to 32000): Number of tokens.
        hidden_size (`int`, *optional*, defaults to 4096): Width of the hidden states.
        intermediate_size (`int`, *optional*, defaults to 11008): Width of the MLP.
        num_hidden_layers (`int`, *optional*, defaults to 32): Number of decoder layers.
        num_attention_heads (`int`, *optional*, defaults to 32): Number of query heads.
        num_key_value_heads (`int`, *optional*, defaults to `num_attention_heads`): Number of key and value heads.
        head_dim (`int`, *optional*, defaults to `hidden_size // num_attention_heads`): Width of a head.
        hidden_act (`str`, *optional*, defaults to `"silu"`): Activation of the MLP.
        max_position_embeddings (`int`, *optional*, defaults to 2048): The training length in tokens. Never a limit.
        initializer_range (`float`, *optional*, defaults to 0.02): Standard deviation of the initial weights.
        rms_norm_eps (`float`, *optional*, defaults to 1e-6): Epsilon of every norm, whatever its `norm_type`.
        norm_type (`str`, *optional*, defaults to `"rms_norm"`): `"rms_norm"` or `"layer_norm"`.
        norm_bias (`bool`, *optional*, defaults to `True`): Whether a `"layer_norm"` has a bias.
        embedding_norm (`bool`, *optional*, defaults to `False`): Whether a norm follows the embedding (BLOOM).
        qk_norm (`bool`, *optional*, defaults to `False`): Whether queries and keys are RMS-normalised by head (Qwen3).
        parallel_residual (`bool`, *optional*, defaults to `False`):
            Whether attention and MLP read the same hidden states (GPT-NeoX) rather than one after the other.
        attention_bias (`bool`, *optional*, defaults to `False`): Whether the attention projections have biases.
        attention_output_bias (`bool`, *optional*, defaults to `attention_bias`):
            Whether the output projection has one; Qwen2 has none there.
        attention_dropout (`float`, *optional*, defaults to 0.0): Dropout of the attention probabilities.
        mlp_gated (`bool`, *optional*, defaults to `True`):
            `down(act(gate(x)) * up(x))` rather than `down(act(up(x)))`.
        mlp_bias (`bool`, *optional*, defaults to `False`): Whether the MLP has biases.
        tie_word_embeddings (`bool`, *optional*, defaults to `False`): Whether input and output embeddings are shared.
        use_cache (`bool`, *optional*, defaults to `True`): Whether a forward returns a KV cache.
        pad_token_id (`int`, *optional*): Padding token.
        bos_token_id (`int`, *optional*, defaults to 1): Token that begins a sequence.
        eos_token_id (`int` or `list[int]`, *optional*, defaults to 2): Token or tokens that end one.
        position_bias (`str`, *optional*, defaults to `"fire"`):
            `"fire"`, `"alibi"`, `"kerple_log"`, `"kerple_power"`, `"t5"`, `"sandwich"` or `"none"`.
        fire_mlp_width (`int`, *optional*, defaults to 32): Width of the hidden layers of `f`.
        fire_mlp_depth (`int`, *optional*, defaults to 1):
            Hidden layers of `f`: 1 as in public code, 2 as in the paper's text.
        fire_activation (`str`, *optional*, defaults to `"relu"`): Activation of `f`, `"relu"` or `"gelu"`.
        fire_transform (`str`, *optional*, defaults to `"log"`): `psi`: `"log"`, `"identity"` or `"power"`.
        fire_init_c (`float`, *optional*, defaults to 1.0):
            Initial `c` (with `"power"` the exponent); 0.1 in public code.
        fire_init_L (`float`, *optional*, defaults to `64 * max_position_embeddings`):
            Initial threshold `L`, in tokens; 512 in the paper.
        fire_init_f (`str`, *optional*, defaults to `"decay"`):
            How `f` starts: `"decay"` (see [`FirePositionBias`]) or `"uniform"`, as in public code.
        fire_eps (`float`, *optional*, defaults to 1e-6): Added to the denominator.
        fire_share_layers (`bool`, *optional*, defaults to `False`): One bias for all layers (FIRE-S).
        fire_progressive (`bool`, *optional*, defaults to `True`): Progressive interpolation; `False` for ablations.
        fire_threshold (`bool`, *optional*, defaults to `True`): The threshold `L`; `False` for ablations.
        rope_parameters (`dict`, *optional*):
            transformers' RoPE parameters (`rope_type`, `rope_theta`, `factor`, `partial_rotary_factor`, ...); the
            default is no rotation. Meant for comparisons and for retrofitting, beside or instead of a bias.
        rope_angle_scale (`float`, *optional*, defaults to 1.0):
            Factor in [0, 1] on every rotation angle: 1 is RoPE, 0 rotates nothing. YaRN's temperature goes with it.
        rope_max_period (`float`, *optional*):
            In tokens: pairs of dimensions that take longer for a turn are not rotated. The default is that all are.

    Example:

    ```python
    >>> from modeling_fire import FireConfig, FireForCausalLM

    >>> config = FireConfig(vocab_size=256, hidden_size=64, intermediate_size=128, num_hidden_layers=2)
    >>> model = FireForCausalLM(config)
    ```
    """

    model_type = "fire"
    keys_to_ignore_at_inference = ["past_key_values", "cache"]
    # The bias and the head norms are whole on every rank, which uses its own heads of them: gradients are summed.
    base_model_tp_plan = {
        "layers.*.self_attn.q_proj": "colwise",
        "layers.*.self_attn.k_proj": "colwise",
        "layers.*.self_attn.v_proj": "colwise",
        "layers.*.self_attn.q_norm": "replicated_with_grad_allreduce",
        "layers.*.self_attn.k_norm": "replicated_with_grad_allreduce",
        "layers.*.self_attn.position_bias": "replicated_with_grad_allreduce",
        "layers.*.self_attn.position_bias.mlp.*": "replicated_with_grad_allreduce",
        "layers.*.self_attn.o_proj": "rowwise",
        "layers.*.mlp.gate_proj": "colwise",
        "layers.*.mlp.up_proj": "colwise",
        "layers.*.mlp.down_proj": "rowwise",
        "position_bias": "replicated_with_grad_allreduce",
        "position_bias.mlp.*": "replicated_with_grad_allreduce",
    }
    base_model_pp_plan = {
        "embed_tokens": (["input_ids"], ["inputs_embeds"]),
        "layers": (["hidden_states", "attention_mask"], ["hidden_states"]),
        "norm": (["hidden_states"], ["hidden_states"]),
    }
    ignore_keys_at_rope_validation = {"partial_rotary_factor"}

    vocab_size: int = 32000
    hidden_size: int = 4096
    intermediate_size: int = 11008
    num_hidden_layers: int = 32
    num_attention_heads: int = 32
    num_key_value_heads: int | None = None
    head_dim: int | None = None
    hidden_act: str = "silu"
    max_position_embeddings: int = 2048
    initializer_range: float = 0.02
    rms_norm_eps: float = 1e-6
    norm_type: Literal["rms_norm", "layer_norm"] = "rms_norm"
    norm_bias: bool = True
    embedding_norm: bool = False
    qk_norm: bool = False
    parallel_residual: bool = False
    attention_bias: bool = False
    attention_output_bias: bool | None = None
    attention_dropout: float | int = 0.0
    mlp_gated: bool = True
    mlp_bias: bool = False
    tie_word_embeddings: bool = False
    use_cache: bool = True
    pad_token_id: int | None = None
    bos_token_id: int | None = 1
    eos_token_id: int | list[int] | None = 2
    position_bias: Literal["fire", "alibi", "kerple_log", "kerple_power", "t5", "sandwich", "none"] = "fire"
    fire_mlp_width: int = 32
    fire_mlp_depth: int = 1
    fire_activation: Literal["relu", "gelu"] = "relu"
    fire_transform: Literal["log", "identity", "power"] = "log"
    fire_init_c: float | int = 1.0
    fire_init_L: float | int | None = None
    fire_init_f: Literal["decay", "uniform"] = "decay"
    fire_eps: float = 1e-6
    fire_share_layers: bool = False
    fire_progressive: bool = True
    fire_threshold: bool = True
    rope_parameters: dict | None = None
    rope_angle_scale: float | int = 1.0
    rope_max_period: float | int | None = None

    def __post_init__(self, **kwargs):
        if self.num_key_value_heads is None:
            self.num_key_value_heads = self.num_attention_heads
        if self.head_dim is None and self.num_attention_heads > 0:
            self.head_dim = self.hidden_size // self.num_attention_heads
        if self.fire_init_L is None:
            self.fire_init_L = 64.0 * self.max_position_embeddings
        if self.attention_output_bias is None:
            self.attention_output_bias = self.attention_bias
        # With this map in its config a saved folder loads through every Auto class, whichever class saved it.
        kwargs.setdefault("auto_map", dict(AUTO_MAP))
        rotates = self.rope_parameters is not None
        if rotates:
            self.rope_parameters = dict(self.rope_parameters)  # transformers writes into it
        for name in ("rope_theta", "rope_scaling"):
            if name in kwargs and not rotates:
                raise ValueError(f"A FIRE model rotates only if `rope_parameters` is set: put `{name}` into it.")
        super().__post_init__(**kwargs)
        if not rotates:
            self.rope_parameters = None  # transformers fills in a default rotation

    def validate_architecture(self):
        """Checks the shape; part of the validation that `@strict` runs on construction and on saving."""
        for name in ("vocab_size", "hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads"):
            if getattr(self, name) < 1:
                raise ValueError(f"`{name}` must be at least 1, got {getattr(self, name)}.")
        if self.num_hidden_layers < 0:
            raise ValueError(f"`num_hidden_layers` must not be negative, got {self.num_hidden_layers}.")
        if self.max_position_embeddings < 1:
            raise ValueError(f"`max_position_embeddings` must be at least 1, got {self.max_position_embeddings}.")
        if self.num_attention_heads % self.num_key_value_heads != 0:
            raise ValueError(
                f"`num_attention_heads` ({self.num_attention_heads}) must be a multiple of `num_key_value_heads` "
                f"({self.num_key_value_heads})."
            )
        if self.head_dim is None or self.head_dim < 1:
            raise ValueError(
                f"`head_dim` must be at least 1, got {self.head_dim}: set it, or make `hidden_size` "
                f"({self.hidden_size}) at least `num_attention_heads` ({self.num_attention_heads})."
            )
        for name in ("sliding_window", "attention_chunk_size"):  # of which a cache would drop keys
            if getattr(self, name, None) is not None:
                raise ValueError(f"A FIRE model sees all tokens: leave out `{name}`, got {getattr(self, name)}.")
        if set(getattr(self, "layer_types", None) or ()) - {"full_attention"}:
            raise ValueError(
                f"A FIRE model sees all tokens in every layer: leave out `layer_types` {self.layer_types}."
            )
        if self.pad_token_id is not None and not 0 <= self.pad_token_id < self.vocab_size:
            raise ValueError(
                f"`pad_token_id` must be a token, from 0 to {self.vocab_size - 1}, or `None`; got {self.pad_token_id}."
            )
        if self.hidden_act not in ACT2FN:
            raise ValueError(f"`hidden_act` must be one of {', '.join(ACT2FN)}, got {self.hidden_act!r}.")
        if not self.rms_norm_eps > 0:
            raise ValueError(f"`rms_norm_eps` must be positive, got {self.rms_norm_eps}.")
        if not self.initializer_range >= 0:
            raise ValueError(f"`initializer_range` must not be negative, got {self.initializer_range}.")
        if not 0.0 <= self.attention_dropout < 1.0:
            raise ValueError(f"`attention_dropout` must be in [0, 1), got {self.attention_dropout}.")

    def validate_position_bias(self):
        """Checks the fields of the position bias and of the rotation."""
        if self.fire_mlp_depth not in (1, 2):
            raise ValueError(f"`fire_mlp_depth` must be 1 or 2 hidden layers, got {self.fire_mlp_depth}.")
        if self.fire_mlp_width < 1:
            raise ValueError(f"`fire_mlp_width` must be at least 1, got {self.fire_mlp_width}.")
        for name in ("fire_init_c", "fire_init_L", "fire_eps"):
            if not 0 < getattr(self, name) < float("inf"):
                raise ValueError(f"`{name}` must be positive and finite, got {getattr(self, name)}.")
        if not 0.0 <= self.rope_angle_scale <= 1.0:
            raise ValueError(f"`rope_angle_scale` must be in [0, 1], got {self.rope_angle_scale}.")
        if self.rope_max_period is not None and not 0 < self.rope_max_period < float("inf"):
            raise ValueError(f"`rope_max_period` must be positive and finite, or `None`; got {self.rope_max_period}.")
        if self.rope_parameters is None:
            return
        rope_type = self.rope_parameters.get("rope_type")
        if rope_type not in ("default", "linear", "dynamic", "yarn", "llama3"):
            raise ValueError(
                f"`rope_parameters['rope_type']` must be one of 'default', 'linear', 'dynamic', 'yarn' and 'llama3', "
                f"got {rope_type!r}."
            )
        if rope_type == "dynamic" and self.rope_max_period is not None:
            raise ValueError("`rope_max_period` is not for the `rope_type` 'dynamic', whose periods change.")
        rotary_dim = int(self.head_dim * self.rope_parameters.get("partial_rotary_factor", 1.0))
        if rotary_dim < 2 or rotary_dim % 2 != 0:
            raise ValueError(
                f"RoPE rotates pairs: `head_dim` * `rope_parameters['partial_rotary_factor']` must be even, got "
                f"{rotary_dim}."
            )


AUTO_MAP = {
    "AutoConfig": "configuration_fire.FireConfig",
    "AutoModel": "modeling_fire.FireModel",
    "AutoModelForCausalLM": "modeling_fire.FireForCausalLM",
    "AutoModelForSequenceClassification": "modeling_fire.FireForSequenceClassification",
    "AutoModelForTokenClassification": "modeling_fire.FireForTokenClassification",
    "AutoModelForQuestionAnswering": "modeling_fire.FireForQuestionAnswering",
}

__all__ = ["FireConfig"]
