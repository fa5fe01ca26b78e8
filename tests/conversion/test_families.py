"""Every family and option: the converted model computes what the original does. Everything else is refused by name."""

import dataclasses
import math

import pytest
import torch
from checkpoints import ROPE, bloom, change_config, gpt_neox, llama, ministral, mistral, mpt, qwen2, qwen3
from helpers import random_ids
from safetensors.torch import load_file
from transformers import LlamaConfig

from modeling_fire import FireForCausalLM
from modeling_fire.conversion import FAMILIES, ConversionError, convert
from modeling_fire.conversion.family import Fused, split_in_thirds
from modeling_fire.other_biases_fire import alibi_slopes


ORIGINAL = {"original_max_position_embeddings": 16}
ROPES = {
    "linear": {"factor": 2.0},
    "dynamic": {"factor": 2.0},
    "yarn": {"factor": 4.0, **ORIGINAL},
    "llama3": {"factor": 4.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, **ORIGINAL},
}
SLIDING = ["full_attention", "sliding_attention"]
ROTATING = {
    "llama": llama,
    **{
        f"llama, {name} rope": lambda name=name: llama(rope_parameters={**ROPE, "rope_type": name, **ROPES[name]})
        for name in ROPES
    },
    "llama, attention biases": lambda: llama(attention_bias=True),
    "llama, MLP biases": lambda: llama(mlp_bias=True),
    "llama, tied": lambda: llama(tie_word_embeddings=True),
    "llama, every head its own keys": lambda: llama(num_key_value_heads=4),
    "llama, wide heads": lambda: llama(head_dim=12),
    "llama, another activation": lambda: llama(hidden_act="gelu"),
    "llama, another epsilon": lambda: llama(rms_norm_eps=1e-2),
    "mistral": mistral,
    "mistral, a window that hides nothing": lambda: mistral(sliding_window=32),
    "ministral": ministral,
    "ministral, a window in some layers that hides nothing": lambda: ministral(layer_types=SLIDING),
    "ministral, a window that is not used": lambda: ministral(sliding_window=4, layer_types=["full_attention"] * 2),
    "qwen2": qwen2,
    "qwen2, tied": lambda: qwen2(tie_word_embeddings=True),
    "qwen2, a window that is not used": lambda: qwen2(sliding_window=4),
    "qwen3": qwen3,
    "qwen3, biases": lambda: qwen3(attention_bias=True),
    "mistral, biases wished for that transformers does not make": lambda: mistral(attention_bias=True, mlp_bias=True),
    "qwen2, biases wished for that transformers does not make": lambda: qwen2(attention_bias=False, mlp_bias=True),
    "qwen3, biases wished for that transformers does not make": lambda: qwen3(mlp_bias=True),
    "gpt_neox": gpt_neox,
    "gpt_neox, whole heads rotate": lambda: gpt_neox(rotary=1.0),
    "gpt_neox, sequential residual": lambda: gpt_neox(use_parallel_residual=False),
    "gpt_neox, no attention biases": lambda: gpt_neox(attention_bias=False),
    "gpt_neox, tied": lambda: gpt_neox(tie_word_embeddings=True),
    "gpt_neox, linear rope": lambda: gpt_neox(
        rope_parameters={**ROPE, "rope_type": "linear", "factor": 2.0, "partial_rotary_factor": 0.5}
    ),
    "gpt_neox, another activation": lambda: gpt_neox(hidden_act="gelu_new"),
}
ALIBI = {
    "bloom": bloom,
    "bloom, 6 heads": lambda: bloom(n_head=6),
    "bloom, not tied": lambda: bloom(tie_word_embeddings=False),
    "mpt": mpt,
    "mpt, 6 heads": lambda: mpt(n_heads=6),
    "mpt, the usual scale spelt out": lambda: mpt(attn_config={"softmax_scale": 12**-0.5}),
    "mpt, not tied": lambda: mpt(tie_word_embeddings=False),
    "mpt, biases wished for that transformers does not make": lambda: mpt(no_bias=False),
}


def assert_same_logits(model, reference, length: int):
    """Compared here once more, with padding, and beyond the training length where the original goes there."""
    ids, mask = random_ids(2, length), torch.ones(2, length, dtype=torch.long)
    mask[0, :5] = 0
    for given in ({}, {"attention_mask": mask}):
        expected, actual = (each(ids, **given).logits[mask.bool()] for each in (reference, model))
        assert expected.std() > 0.1
        torch.testing.assert_close(actual, expected, rtol=0.0, atol=2e-5 * float(expected.abs().max()))


@pytest.mark.parametrize("build", ROTATING.values(), ids=ROTATING)
@torch.no_grad()
def test_families_that_rotate(tmp_path, build):
    reference = build()
    reference.save_pretrained(tmp_path / "source")
    kept = convert(tmp_path / "source", tmp_path / "keep", rotation="keep")
    dropped = convert(tmp_path / "source", tmp_path / "drop")
    assert kept.proof == dropped.proof and kept.proof.tokens == 32 and kept.proof.relative < 2e-6

    model = FireForCausalLM.from_pretrained(tmp_path / "keep").eval()
    assert model.config.rope_parameters == reference.config.rope_parameters
    assert model.config.rope_angle_scale == 1.0
    assert_same_logits(model, reference, getattr(reference.config, "sliding_window", None) or 40)

    model = FireForCausalLM.from_pretrained(tmp_path / "drop").eval()
    assert model.config.rope_parameters is None and model.model.rotary_emb is None
    assert model.config.max_position_embeddings == 32
    states = [load_file(tmp_path / name / "model.safetensors") for name in ("keep", "drop")]
    torch.testing.assert_close(*states, rtol=0.0, atol=0.0)
    for layer in model.model.layers:
        mlp = layer.self_attn.position_bias.mlp
        assert mlp[0].weight.count_nonzero() == 32
        assert not mlp[2].weight.any() and not mlp[2].bias.any()


@torch.no_grad()
def test_of_the_rotation_stays_what_is_fast(tmp_path):
    """All but the fast frequencies at nought is what the converted model computes."""
    reference = llama(max_position_embeddings=512, head_dim=16)
    reference.save_pretrained(tmp_path / "source")
    assert convert(tmp_path / "source", tmp_path / "out", rotation="fast").proof.holds
    model = FireForCausalLM.from_pretrained(tmp_path / "out").eval()
    assert model.config.rope_parameters == reference.config.rope_parameters
    assert model.config.rope_max_period == 512
    frequencies = reference.model.rotary_emb.inv_freq
    slow = 2 * math.pi / frequencies > 512
    assert 0 < slow.sum() < 8
    frequencies[slow] = 0
    assert_same_logits(model, reference, 100)


def test_a_bias_of_0_learns(tmp_path):
    llama().save_pretrained(tmp_path / "source")
    convert(tmp_path / "source", tmp_path / "out", verify=False)
    model = FireForCausalLM.from_pretrained(tmp_path / "out")
    ids = random_ids(2, 16)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for _ in range(2):  # the hidden layer moves as soon as the output layer is not 0
        optimizer.zero_grad()
        model(ids, labels=ids).loss.backward()
        optimizer.step()
    for name, parameter in model.model.layers[1].self_attn.position_bias.named_parameters():
        assert parameter.grad.any() or name == "mlp.2.bias", name  # one number for all keys: the softmax takes it out


@pytest.mark.parametrize("build", ALIBI.values(), ids=ALIBI)
@torch.no_grad()
def test_families_with_alibi_are_exact_as_pure_fire(tmp_path, build):
    reference = build()
    reference.save_pretrained(tmp_path / "source")
    result = convert(tmp_path / "source", tmp_path / "out")
    trained = 64 if reference.config.model_type == "mpt" else 2048
    assert result.rotation is None and result.max_length == 64 * trained
    assert result.proof.tokens == min(trained, 256) and result.proof.relative < 2e-6
    model = FireForCausalLM.from_pretrained(tmp_path / "out").eval()
    assert (model.config.position_bias, model.config.rope_parameters) == ("fire", None)
    assert model.config.max_position_embeddings == trained
    assert_same_logits(model, reference, 60)


@torch.no_grad()
def test_alibi_is_exact_up_to_the_chosen_length(tmp_path):
    reference = bloom()
    reference.save_pretrained(tmp_path / "source")
    assert convert(tmp_path / "source", tmp_path / "out", max_length=20).proof.tokens == 20
    model = FireForCausalLM.from_pretrained(tmp_path / "out").eval()
    ids = random_ids(1, 60)
    difference = (model(ids).logits - reference(ids).logits).abs().amax(-1)[0]
    assert difference[:21].max() < 1e-4 < difference[21:].min()


def test_the_length_that_an_older_bloom_names(tmp_path):
    bloom(seq_length=512).save_pretrained(tmp_path / "source")
    assert convert(tmp_path / "source", tmp_path / "out", verify=False).max_length == 64 * 512


@pytest.mark.parametrize("layer_types", [None, ["full_attention"] * 2])
def test_a_mistral_with_layer_types_is_a_ministral(tmp_path, monkeypatch, layer_types):
    """So transformers reads it; here nothing is read as what has not been looked at."""
    ministral().save_pretrained(tmp_path / "source")
    change_config(tmp_path / "source", model_type="mistral", layer_types=layer_types)
    result = convert(tmp_path / "source", tmp_path / "out")
    assert result.model_type == "ministral" and result.proof.relative < 2e-6
    others = {name: family for name, family in FAMILIES.items() if name != "ministral"}
    monkeypatch.setattr("modeling_fire.conversion.FAMILIES", others)
    with pytest.raises(ConversionError, match="The architecture 'ministral' is not supported"):
        convert(tmp_path / "source", tmp_path / "again")


# What the model lacks is refused

REFUSED = {
    "a window": (lambda: mistral(sliding_window=31), "`sliding_window=31` is not supported"),
    "a window that only the cache of LLaMA knows": (
        lambda: llama(sliding_window=31),
        "`sliding_window=31` is not supported: it is no field of llama, .* Take it out of the config",
    ),
    "no window for Ministral": (
        lambda: ministral(sliding_window=None),
        r"`sliding_window=None` .* Set it to `max_position_embeddings` \(32\)",
    ),
    "windows of Ministral": (
        lambda: ministral(sliding_window=31, layer_types=SLIDING),
        "`sliding_window=31` is not supported: it is shorter",
    ),
    "windows in some layers": (
        lambda: qwen3(use_sliding_window=True, sliding_window=8, layer_types=SLIDING),
        "`sliding_window=8` is not supported",
    ),
    "other attention": (
        lambda: qwen2(layer_types=["full_attention", "chunked_attention"]),
        r"`layer_types` \['chunked_attention'\] are not supported",
    ),
    "rope type": (
        lambda: llama(
            rope_parameters={
                **ROPE,
                "rope_type": "longrope",
                "factor": 2.0,
                "short_factor": [1.0] * 4,
                "long_factor": [1.0] * 4,
                **ORIGINAL,
            }
        ),
        "llama: .*'default', 'linear', 'dynamic', 'yarn' and 'llama3', got 'longrope'.*Supported are llama, mistral",
    ),
    "partial rotation of LLaMA": (
        lambda: llama(rope_parameters={**ROPE, "partial_rotary_factor": 0.5}),
        "`partial_rotary_factor=0.5` is not supported",
    ),
    "gpt_neox dropout": (lambda: gpt_neox(hidden_dropout=0.1), "`hidden_dropout=0.1` is not supported"),
    "gpt_neox, a window that its attention ignores": (lambda: gpt_neox(sliding_window=4), "`sliding_window=4` is not"),
    "bloom residual": (
        lambda: bloom(apply_residual_connection_post_layernorm=True),
        "bloom: `apply_residual_connection_post_layernorm=True` is not supported",
    ),
    "mpt clipping": (lambda: mpt(attn_config={"clip_qkv": 8.0}), "`clip_qkv=8.0` is not supported"),
    "mpt scale": (lambda: mpt(attn_config={"softmax_scale": 0.5}), "`softmax_scale=0.5` is not supported"),
    "mpt norms of queries": (lambda: mpt(attn_config={"qk_ln": True}), "`qk_ln=True` is not supported"),
    "mpt without ALiBi": (lambda: mpt(attn_config={"alibi": False}), "`alibi=False` is not supported"),
    "mpt slopes": (lambda: mpt(attn_config={"alibi_bias_max": 4}), "`alibi_bias_max=4` is not supported"),
    "mpt prefix": (lambda: mpt(attn_config={"prefix_lm": True}), "`prefix_lm=True` is not supported"),
    "mpt multi-query": (
        lambda: mpt(attn_config={"attn_type": "multiquery_attention"}),
        "`attn_type='multiquery_attention'` is not supported",
    ),
    "mpt logits": (lambda: mpt(logit_scale=0.5), "`logit_scale=0.5` is not supported"),
}


@pytest.mark.parametrize(("build", "message"), REFUSED.values(), ids=REFUSED)
def test_options_that_the_model_lacks_are_refused_by_name(tmp_path, build, message):
    build().config.save_pretrained(tmp_path / "source")  # refused before weights are looked for
    with pytest.raises(ConversionError, match=message):
        convert(tmp_path / "source", tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


@pytest.mark.parametrize("model_type", ["mixtral", "fire", "never-heard-of"])
def test_other_architectures_are_refused_by_name(tmp_path, model_type):
    (tmp_path / "config.json").write_text(f'{{"model_type": "{model_type}"}}')
    supported = "llama, mistral, ministral, qwen2, qwen3, gpt_neox, bloom, mpt"
    with pytest.raises(ConversionError, match=f"'{model_type}' is not supported. Supported are {supported}"):
        convert(tmp_path, tmp_path / "out")


def test_quantised_weights_are_refused(tmp_path):
    LlamaConfig(quantization_config={"quant_method": "gptq", "bits": 4}).save_pretrained(tmp_path)
    with pytest.raises(ConversionError, match="`quantization_config` is not supported"):
        convert(tmp_path, tmp_path / "out")


def test_a_rotation_is_not_kept_where_there_is_none(tmp_path):
    bloom().save_pretrained(tmp_path / "source")
    with pytest.raises(ConversionError, match="bloom has ALiBi, not RoPE"):
        convert(tmp_path / "source", tmp_path / "out", rotation="keep")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rotation": "half"}, "'drop', 'fast' or 'keep', got 'half'"),
        ({"max_length": 0}, "`fire_init_L` must be positive"),
    ],
)
def test_options_of_the_conversion_are_checked(tmp_path, options, message):
    llama().save_pretrained(tmp_path / "source")
    with pytest.raises(ConversionError, match=message):
        convert(tmp_path / "source", tmp_path / "out", **options)


# What a wrong family would do, the proof finds out, and nothing else


def test_the_bound_knows_how_far_rounding_goes_in_this_model(tmp_path):
    """Key biases of Qwen2 and a channel of massive activations, which rounding grows in."""
    torch.manual_seed(1)
    sizes = {"hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 24, "num_attention_heads": 8}
    reference = qwen2(**sizes, max_position_embeddings=256)
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for layer in reference.model.layers:
            layer.self_attn.k_proj.bias.normal_(std=20.0, generator=generator)
            layer.mlp.down_proj.weight[7] *= 30
    reference.save_pretrained(tmp_path / "source")
    proof = convert(tmp_path / "source", tmp_path / "out").proof
    # The conversion's own error is anything from 0, on CPUs where both models compute alike, to 1e-3.
    assert proof.relative < proof.rounding and proof.rounding > 1e-3 and proof.bound == 1e-2

    llama().save_pretrained(tmp_path / "usual")
    assert convert(tmp_path / "usual", tmp_path / "usual-out").proof.bound < 5e-5


def wrong(family, **changes):
    return dataclasses.replace(family, weights={**family.weights, **changes.pop("weights", {})}, **changes)


LAYER = "model.layers.{i}"
NEOX_QKV = "gpt_neox.layers.{i}.attention.query_key_value"
LLAMA_FAMILY, NEOX_FAMILY, MPT_FAMILY = (FAMILIES[name] for name in ("llama", "gpt_neox", "mpt"))
WRONG = {
    "queries and keys swapped": (
        lambda: llama(num_key_value_heads=4),
        wrong(
            LLAMA_FAMILY,
            weights={
                f"{LAYER}.self_attn.q_proj": f"{LAYER}.self_attn.k_proj",
                f"{LAYER}.self_attn.k_proj": f"{LAYER}.self_attn.q_proj",
            },
        ),
    ),
    "norms swapped": (
        llama,
        wrong(
            LLAMA_FAMILY,
            weights={
                f"{LAYER}.input_layernorm": f"{LAYER}.post_attention_layernorm",
                f"{LAYER}.post_attention_layernorm": f"{LAYER}.input_layernorm",
            },
        ),
    ),
    "heads not taken apart": (
        gpt_neox,
        wrong(NEOX_FAMILY, weights={NEOX_QKV: Fused(NEOX_FAMILY.weights[NEOX_QKV].targets, split_in_thirds)}),
    ),
    "slopes in another order": (
        lambda: mpt(n_heads=6),
        wrong(MPT_FAMILY, alibi_slopes=lambda config: alibi_slopes(6).flip(0)),
    ),
    "another epsilon": (
        lambda: llama(rms_norm_eps=1e-2),
        wrong(
            LLAMA_FAMILY,
            fire_fields=lambda config: LLAMA_FAMILY.fire_fields(config) | {"rms_norm_eps": 1e-3},
        ),
    ),
    "another base of the rotation": (
        llama,
        wrong(
            LLAMA_FAMILY,
            fire_fields=lambda config: (
                LLAMA_FAMILY.fire_fields(config) | {"rope_parameters": {**ROPE, "rope_theta": 10100.0}}
            ),
        ),
    ),
}


@pytest.mark.parametrize(("build", "family"), WRONG.values(), ids=WRONG)
def test_the_proof_finds_a_wrong_family(tmp_path, monkeypatch, build, family):
    reference = build()
    reference.save_pretrained(tmp_path / "source")
    monkeypatch.setitem(FAMILIES, reference.config.model_type, family)
    with pytest.raises(ConversionError, match=r"not the original: largest difference .* Nothing was written"):
        convert(tmp_path / "source", tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["source"]
