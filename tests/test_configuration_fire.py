"""Configurations: fields, validation, saving; and that they express LLaMA, Qwen, GPT-NeoX, BLOOM and MPT exactly."""

import importlib
import inspect
import math
import re

import pytest
import torch
from helpers import random_ids, tiny_config, tiny_model
from huggingface_hub.errors import StrictDataclassError
from transformers import (
    BloomConfig,
    BloomForCausalLM,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MptConfig,
    MptForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from modeling_fire import FireConfig, FireForCausalLM


ROPE = {"rope_type": "default", "rope_theta": 10000.0}

# Every field, each away from what it would be beside the others by default.
CHANGED = {
    "vocab_size": 101,
    "hidden_size": 36,
    "intermediate_size": 40,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "head_dim": 10,
    "hidden_act": "gelu",
    "max_position_embeddings": 77,
    "initializer_range": 0.5,
    "rms_norm_eps": 1e-5,
    "norm_type": "layer_norm",
    "norm_bias": False,
    "embedding_norm": True,
    "qk_norm": True,
    "parallel_residual": True,
    "attention_bias": True,
    "attention_output_bias": False,
    "attention_dropout": 0.1,
    "mlp_gated": False,
    "mlp_bias": True,
    "tie_word_embeddings": True,
    "use_cache": False,
    "pad_token_id": 3,
    "bos_token_id": 4,
    "eos_token_id": [5, 6],
    "position_bias": "kerple_power",
    "fire_mlp_width": 7,
    "fire_mlp_depth": 2,
    "fire_activation": "gelu",
    "fire_transform": "identity",
    "fire_init_c": 0.3,
    "fire_init_L": 99.0,
    "fire_init_f": "uniform",
    "fire_eps": 1e-4,
    "fire_share_layers": True,
    "fire_progressive": False,
    "fire_threshold": False,
    "rope_parameters": {**ROPE, "partial_rotary_factor": 0.4},
    "rope_angle_scale": 0.5,
    "rope_max_period": 40.0,
}


def test_defaults_are_a_decoder_like_llama_with_fire():
    config, llama = FireConfig(), LlamaConfig()
    for name in ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_key_value_heads"):
        assert getattr(config, name) == getattr(llama, name), name
    for name in ("head_dim", "hidden_act", "rms_norm_eps", "initializer_range", "attention_bias", "mlp_bias"):
        assert getattr(config, name) == getattr(llama, name), name
    assert config.model_type == "fire"
    assert (config.position_bias, config.fire_transform, config.rope_parameters) == ("fire", "log", None)
    assert (config.fire_mlp_width, config.fire_mlp_depth, config.fire_activation) == (32, 1, "relu")
    assert (config.fire_init_c, config.fire_eps, config.fire_init_f) == (1.0, 1e-6, "decay")
    assert config.fire_progressive and config.fire_threshold and not config.fire_share_layers


def test_fields_that_follow_others():
    config = tiny_config(num_key_value_heads=None, attention_bias=True, fire_init_L=None)
    assert (config.num_key_value_heads, config.head_dim, config.attention_output_bias) == (4, 8, True)
    assert config.fire_init_L == 64 * config.max_position_embeddings


def test_every_field_survives_saving(tmp_path):
    assert CHANGED.keys() == inspect.get_annotations(FireConfig).keys()
    for name, value in CHANGED.items():
        others = {key: changed for key, changed in CHANGED.items() if key != name}
        assert getattr(FireConfig(**others), name) != value, f"saving {name} would go untested"
    config = FireConfig(**CHANGED)
    config.save_pretrained(tmp_path)
    loaded = FireConfig.from_pretrained(tmp_path)
    assert loaded.to_dict() == config.to_dict()
    assert {name: getattr(loaded, name) for name in CHANGED} == CHANGED
    assert FireForCausalLM(loaded)(torch.arange(9)[None]).logits.isfinite().all()


def test_no_rotation_survives_saving(tmp_path):
    FireConfig().save_pretrained(tmp_path)
    assert FireConfig.from_pretrained(tmp_path).rope_parameters is None
    assert FireConfig.from_dict(FireConfig().to_dict()).rope_parameters is None


def test_auto_map_names_what_exists(tmp_path):
    tiny_config().save_pretrained(tmp_path)
    auto_map = FireConfig.from_pretrained(tmp_path).auto_map
    heads = (
        "ForCausalLM",
        "ForSequenceClassification",
        "ForTokenClassification",
        "ForQuestionAnswering",
        "",
        "Config",
    )
    assert auto_map.keys() == {f"AutoModel{head}" if head != "Config" else "AutoConfig" for head in heads}
    for auto_class, reference in auto_map.items():
        module, name = reference.split(".")
        assert inspect.isclass(getattr(importlib.import_module(f"modeling_fire.{module}"), name)), auto_class


@pytest.mark.parametrize("legacy", [{"rope_theta": 1e4}, {"rope_scaling": {"rope_type": "linear", "factor": 2.0}}])
def test_a_rotation_is_never_dropped_silently(legacy):
    with pytest.raises(ValueError, match=f"`rope_parameters` is set: put `{next(iter(legacy))}` into it"):
        tiny_config(**legacy)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"vocab_size": 0}, "`vocab_size` must be at least 1, got 0"),
        ({"hidden_size": 0}, "`hidden_size` must be at least 1"),
        ({"hidden_size": "32"}, "'hidden_size' expected int, got str"),
        ({"intermediate_size": 0}, "`intermediate_size` must be at least 1"),
        ({"num_hidden_layers": -1}, "`num_hidden_layers` must not be negative"),
        ({"num_attention_heads": 0}, "`num_attention_heads` must be at least 1"),
        ({"num_key_value_heads": 0}, "`num_key_value_heads` must be at least 1"),
        ({"num_key_value_heads": 3}, r"`num_attention_heads` \(4\) must be a multiple of `num_key_value_heads` \(3\)"),
        ({"sliding_window": 4}, "sees all tokens: leave out `sliding_window`, got 4"),
        ({"layer_types": ["sliding_attention"] * 2}, "sees all tokens in every layer: leave out `layer_types`"),
        ({"head_dim": 0}, "`head_dim` must be at least 1, got 0: set it, or make `hidden_size`"),
        ({"hidden_size": 3}, r"make `hidden_size` \(3\) at least `num_attention_heads` \(4\)"),
        ({"max_position_embeddings": 0}, "`max_position_embeddings` must be at least 1"),
        ({"pad_token_id": 99}, "`pad_token_id` must be a token, from 0 to 98"),
        ({"hidden_act": "bogus"}, "`hidden_act` must be one of .*silu.*, got 'bogus'"),
        ({"rms_norm_eps": -1e-6}, "`rms_norm_eps` must be positive"),
        ({"initializer_range": -0.1}, "`initializer_range` must not be negative"),
        ({"fire_init_L": float("inf")}, "`fire_init_L` must be positive and finite"),
        ({"attention_dropout": 1.0}, r"`attention_dropout` must be in \[0, 1\)"),
        ({"attention_dropout": -0.1}, r"`attention_dropout` must be in \[0, 1\)"),
        ({"norm_type": "batch_norm"}, r"'norm_type' expected one of \('rms_norm', 'layer_norm'\)"),
        ({"position_bias": "rope"}, "'position_bias' expected one of .*'alibi'"),
        ({"fire_activation": "tanh"}, r"'fire_activation' expected one of \('relu', 'gelu'\)"),
        ({"fire_transform": "sqrt"}, r"'fire_transform' expected one of \('log', 'identity', 'power'\)"),
        ({"fire_init_f": "zero"}, r"'fire_init_f' expected one of \('decay', 'uniform'\)"),
        ({"fire_mlp_depth": 3}, "`fire_mlp_depth` must be 1 or 2"),
        ({"fire_mlp_width": 0}, "`fire_mlp_width` must be at least 1"),
        ({"fire_init_c": 0.0}, "`fire_init_c` must be positive"),
        ({"fire_init_L": -512.0}, "`fire_init_L` must be positive"),
        ({"fire_init_L": float("nan")}, "`fire_init_L` must be positive"),
        ({"fire_eps": 0.0}, "`fire_eps` must be positive"),
        ({"rope_angle_scale": 1.5}, r"`rope_angle_scale` must be in \[0, 1\]"),
        ({"rope_max_period": 0}, "`rope_max_period` must be positive and finite"),
        (
            {"rope_max_period": 9, "rope_parameters": {**ROPE, "rope_type": "dynamic", "factor": 2.0}},
            "is not for the `rope_type` 'dynamic'",
        ),
        (
            {"rope_parameters": {**ROPE, "rope_type": "su"}},
            r"`rope_parameters\['rope_type'\]` must be one of 'default'",
        ),
        ({"rope_parameters": ROPE, "head_dim": 7}, "`head_dim` .* must be even, got 7"),
        ({"rope_parameters": {**ROPE, "partial_rotary_factor": 0.1}}, "'partial_rotary_factor'.* must be even, got 0"),
    ],
)
def test_validation_names_the_field_and_what_it_takes(changes, message):
    with pytest.raises(StrictDataclassError, match=message):
        tiny_config(**changes)


def test_a_field_changed_later_is_validated_on_saving(tmp_path):
    config = tiny_config()
    config.fire_mlp_depth = 3
    with pytest.raises(StrictDataclassError, match="`fire_mlp_depth` must be 1 or 2"):
        config.save_pretrained(tmp_path)


# Other architectures: the same weights give the same logits

LENGTH = 24
SIZES = {"vocab_size": 99, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
SPECIAL = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
LLAMA = {**SIZES, **SPECIAL, "intermediate_size": 48, "num_key_value_heads": 2, "max_position_embeddings": 16}
# Layer norms with biases and a plain MLP four times as wide, with exact or approximate GELU.
OLDER = {"intermediate_size": 128, "rms_norm_eps": 1e-5, "norm_type": "layer_norm", "mlp_gated": False}
BIASES = {"attention_bias": True, "mlp_bias": True}

ROPES = {
    "default": ROPE,
    "linear": {**ROPE, "rope_type": "linear", "factor": 2.0},
    "dynamic": {**ROPE, "rope_type": "dynamic", "factor": 2.0},
    "yarn": {**ROPE, "rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16},
    "llama3": {
        **ROPE,
        "rope_type": "llama3",
        "factor": 4.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 16,
    },
}


def randomised(model):
    """Moves every parameter away from its initial value, which for norms and biases would hide a mix-up."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn(parameter.shape, generator=generator))
    return model.eval()


def renamed(model, names: list[tuple[str, str]], split=None) -> dict[str, torch.Tensor]:
    """The state dict of `model` under FIRE's names; `split` divides a projection that is named `qkv` by then."""
    state = {}
    for key, value in model.state_dict().items():
        for pattern, replacement in names:
            key = re.sub(pattern, replacement, key)
        if "qkv" in key:
            state |= {key.replace("qkv", f"{n}_proj"): part for n, part in zip("qkv", split(value), strict=True)}
        else:
            state[key] = value
    return state


def split_by_head(fused: torch.Tensor) -> list[torch.Tensor]:
    """GPT-NeoX and BLOOM keep query, key and value of one head together."""
    return [part.flatten(0, 1) for part in fused.unflatten(0, (SIZES["num_attention_heads"], 3, -1)).unbind(1)]


def split_in_thirds(fused: torch.Tensor) -> tuple[torch.Tensor, ...]:
    return fused.chunk(3)


def llama(rope_type: str = "default"):
    reference = LlamaForCausalLM(LlamaConfig(**LLAMA, rope_parameters=dict(ROPES[rope_type])))
    return reference, tiny_config(**LLAMA, position_bias="none", rope_parameters=dict(ROPES[rope_type])), ([],)


def llama_with_biases():
    reference = LlamaForCausalLM(LlamaConfig(**LLAMA, **BIASES, rope_parameters=dict(ROPE)))
    return reference, tiny_config(**LLAMA, **BIASES, position_bias="none", rope_parameters=dict(ROPE)), ([],)


def qwen2():
    reference = Qwen2ForCausalLM(Qwen2Config(**LLAMA, rope_parameters=dict(ROPE), tie_word_embeddings=True))
    biases = {"attention_bias": True, "attention_output_bias": False, "tie_word_embeddings": True}
    return reference, tiny_config(**LLAMA, **biases, position_bias="none", rope_parameters=dict(ROPE)), ([],)


def qwen3():
    shape = {**LLAMA, "head_dim": 12}
    reference = Qwen3ForCausalLM(Qwen3Config(**shape, rope_parameters=dict(ROPE)))
    return reference, tiny_config(**shape, qk_norm=True, position_bias="none", rope_parameters=dict(ROPE)), ([],)


def gpt_neox(parallel_residual: bool = True):
    rope = {**ROPE, "partial_rotary_factor": 0.5}
    shape = {**SIZES, **SPECIAL, "intermediate_size": 128, "hidden_act": "gelu", "tie_word_embeddings": False}
    reference = GPTNeoXForCausalLM(
        GPTNeoXConfig(**shape, rope_parameters=dict(rope), use_parallel_residual=parallel_residual)
    )
    config = tiny_config(
        **{**OLDER, **BIASES, **shape},
        num_key_value_heads=None,
        parallel_residual=parallel_residual,
        position_bias="none",
        rope_parameters=dict(rope),
    )
    names = [
        ("^gpt_neox", "model"),
        ("embed_in", "embed_tokens"),
        ("embed_out", "lm_head"),
        ("final_layer_norm", "norm"),
        ("attention.query_key_value", "self_attn.qkv"),
        ("attention.dense", "self_attn.o_proj"),
        ("dense_h_to_4h", "up_proj"),
        ("dense_4h_to_h", "down_proj"),
    ]
    return reference, config, (names, split_by_head)


def bloom():
    reference = BloomForCausalLM(BloomConfig(vocab_size=99, hidden_size=32, n_layer=2, n_head=4, **SPECIAL))
    config = tiny_config(
        **{**SIZES, **SPECIAL, **OLDER, **BIASES},
        num_key_value_heads=None,
        hidden_act="gelu_pytorch_tanh",
        embedding_norm=True,
        tie_word_embeddings=True,
        position_bias="alibi",
    )
    names = [
        ("^transformer.word_embeddings_layernorm", "model.layers.0.embed_norm"),
        ("^transformer.word_embeddings", "model.embed_tokens"),
        ("^transformer.h", "model.layers"),
        ("^transformer.ln_f", "model.norm"),
        ("self_attention.query_key_value", "self_attn.qkv"),
        ("self_attention.dense", "self_attn.o_proj"),
        ("dense_h_to_4h", "up_proj"),
        ("dense_4h_to_h", "down_proj"),
    ]
    return reference, config, (names, split_by_head)


def mpt():
    reference = MptForCausalLM(MptConfig(d_model=32, n_heads=4, n_layers=2, vocab_size=99, max_seq_len=64, **SPECIAL))
    config = tiny_config(
        **{**SIZES, **SPECIAL, **OLDER},
        num_key_value_heads=None,
        hidden_act="gelu",
        norm_bias=False,
        tie_word_embeddings=True,
        position_bias="alibi",
    )
    names = [
        ("^transformer.wte", "model.embed_tokens"),
        ("^transformer.blocks", "model.layers"),
        ("^transformer.norm_f", "model.norm"),
        ("attn.Wqkv", "self_attn.qkv"),
        ("attn.out_proj", "self_attn.o_proj"),
        ("ffn", "mlp"),
        ("norm_1", "input_layernorm"),
        ("norm_2", "post_attention_layernorm"),
    ]
    return reference, config, (names, split_in_thirds)


ARCHITECTURES = {
    **{f"llama, {rope_type} rope": lambda rope_type=rope_type: llama(rope_type) for rope_type in ROPES},
    "llama with biases": llama_with_biases,
    "qwen2": qwen2,
    "qwen3": qwen3,
    "gpt_neox": gpt_neox,
    "gpt_neox, sequential residual": lambda: gpt_neox(False),
    "bloom": bloom,
    "mpt": mpt,
}


@pytest.mark.parametrize("build", ARCHITECTURES.values(), ids=ARCHITECTURES)
@torch.no_grad()
def test_other_architectures_are_configurations_of_this_one(build):
    torch.manual_seed(0)
    reference, config, conversion = build()
    state = renamed(randomised(reference), *conversion)
    model = FireForCausalLM(config).eval()
    model.load_state_dict(state)

    ids, mask = random_ids(2, LENGTH), torch.ones(2, LENGTH, dtype=torch.long)
    mask[0, :5] = 0
    for given in ({}, {"attention_mask": mask}):
        expected, actual = (each(ids, **given).logits[mask.bool()] for each in (reference, model))
        assert expected.std() > 0.1
        torch.testing.assert_close(actual, expected, rtol=0.0, atol=2e-5 * float(expected.abs().max()))


# The rotation


@pytest.mark.parametrize("rope_type", ROPES)
@pytest.mark.parametrize("position_bias", ["fire", "none"])
def test_every_rope_type_survives_saving_and_rotates(tmp_path, rope_type, position_bias):
    rope = dict(ROPES[rope_type])
    model = tiny_model(position_bias=position_bias, rope_parameters=rope, max_position_embeddings=16)
    model.save_pretrained(tmp_path)
    loaded = FireForCausalLM.from_pretrained(tmp_path).eval()
    assert loaded.config.rope_parameters == rope == ROPES[rope_type]
    ids = random_ids(2, LENGTH)
    expected = model(ids).logits
    assert torch.equal(loaded(ids).logits, expected)
    still = tiny_model(position_bias=position_bias)
    still.load_state_dict(model.state_dict())
    assert not torch.allclose(still(ids).logits, expected, atol=1e-2)


def logits_of_scaled_angles(scale: float, rope: dict | None) -> torch.Tensor:
    return tiny_model(position_bias="none", rope_parameters=rope, rope_angle_scale=scale)(random_ids(2, LENGTH)).logits


@pytest.mark.parametrize("rope_type", ROPES)
def test_a_scale_of_0_is_no_rotation(rope_type):
    """YaRN has a temperature beside its angles, which goes with them: removing the rotation then changes nothing."""
    assert torch.equal(logits_of_scaled_angles(0.0, dict(ROPES[rope_type])), logits_of_scaled_angles(1.0, None))


def test_the_scale_of_the_angles_leaves_dynamic_scaling_to_the_true_length():
    rotary = tiny_model(position_bias="none", rope_parameters=dict(ROPES["dynamic"])).model.rotary_emb
    position_ids = torch.arange(200)[None]
    angle = torch.atan2(*reversed(rotary(torch.zeros(1), position_ids)))
    rotary.config.rope_angle_scale = 0.5
    half = torch.atan2(*reversed(rotary(torch.zeros(1), position_ids)))
    torch.testing.assert_close(half[0, 1], angle[0, 1] / 2)


@pytest.mark.parametrize("rope_type", [name for name in ROPES if name != "dynamic"])
def test_what_turns_slower_than_the_longest_period_stands_still(rope_type):
    rotary = tiny_model(position_bias="none", rope_parameters=dict(ROPES[rope_type]), head_dim=32).model.rotary_emb
    position_ids = torch.arange(200)[None]
    whole = rotary(torch.zeros(1), position_ids)
    periods = 2 * math.pi / rotary.inv_freq.repeat(2)
    rotary.config.rope_max_period = 50.0
    cos, sin = rotary(torch.zeros(1), position_ids)
    fast = periods <= 50
    assert 0 < fast.sum() < 32
    assert torch.equal(cos[..., fast], whole[0][..., fast]) and torch.equal(sin[..., fast], whole[1][..., fast])
    assert (cos[..., ~fast] == whole[0][0, 0, 0]).all() and not sin[..., ~fast].any()


def test_a_scale_of_one_half_halves_every_angle():
    half, linear = logits_of_scaled_angles(0.5, dict(ROPE)), logits_of_scaled_angles(1.0, dict(ROPES["linear"]))
    torch.testing.assert_close(half, linear, rtol=0.0, atol=1e-5)
    assert not torch.allclose(half, logits_of_scaled_angles(1.0, dict(ROPE)), atol=1e-2)


def test_the_callers_rope_parameters_are_left_alone():
    rope_parameters = {"rope_type": "default"}
    tiny_config(rope_parameters=rope_parameters)
    assert rope_parameters == {"rope_type": "default"}
