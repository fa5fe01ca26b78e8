"""The model as a whole: a cache, padding, packing or a position scheme never changes what it computes."""

import inspect
from unittest import mock

import pytest
import torch
from helpers import random_ids, tiny_config, tiny_model
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import DynamicCache, QuantizedCache, StaticCache, cache_utils

from modeling_fire import (
    FireForCausalLM,
    FireForSequenceClassification,
    FireForTokenClassification,
    FireModel,
    attention_fire,
)
from modeling_fire.cache_fire import CACHE


LENGTH = 24
PARTS = ("model.embed_tokens", "model.layers.0", "model.layers.1", "model.norm", "model.position_bias", "lm_head")


@pytest.fixture(scope="module", params=["fire", "t5"])
def model(request) -> FireForCausalLM:
    return tiny_model(position_bias=request.param).double()


def make_cache(kind: str, config):
    if kind == "dynamic":
        return DynamicCache(config=config)
    if kind == "offloaded":
        with mock.patch("torch.Stream"):  # its copies run on a stream, which the CPU has not
            return DynamicCache(config=config, offloading=True)
    return StaticCache(config=config, max_cache_len=LENGTH + 20)


def run_in_chunks(model, ids, bounds, cache, attention_mask=None, position_ids=None):
    """Logits of `ids` fed in chunks that end at `bounds`, each with the cache of the ones before."""
    logits, start = [], 0
    for stop in [*bounds, ids.shape[1]]:
        mask = None if attention_mask is None else attention_mask[:, :stop]
        positions = None if position_ids is None else position_ids[:, start:stop]
        output = model(ids[:, start:stop], attention_mask=mask, position_ids=positions, past_key_values=cache)
        logits.append(output.logits)
        start = stop
    return torch.cat(logits, dim=1)


@torch.no_grad()
@pytest.mark.parametrize("kind", ["dynamic", "offloaded", "static"])
@pytest.mark.parametrize("bounds", [(), (1,), (10, 11, 12, 20)], ids=["whole", "one-then-rest", "chunks"])
def test_cached_equals_uncached(model, kind, bounds):
    ids = random_ids(2, LENGTH)
    expected = model(ids, use_cache=False).logits
    with mock.patch("torch.cuda.default_stream"):
        actual = run_in_chunks(model, ids, bounds, make_cache(kind, model.config))
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-9)


@torch.no_grad()
def test_the_cache_goes_by_either_name(model):
    """That of transformers from 5.24 on, and that from before."""
    ids, caches = random_ids(2, 9), []
    for decoder in (model, model.model):
        for name in ("past_key_values", "cache"):
            cache = DynamicCache(config=model.config)
            decoder(ids[:, :6], **{name: cache})
            output = decoder(ids[:, 6:], **{name: cache})
            assert output[CACHE] is cache and cache.get_seq_length() == 9
            caches.append(cache.layers[-1].keys)
        assert CACHE in inspect.signature(decoder.forward).parameters
    assert all(torch.equal(keys, caches[0]) for keys in caches)


@torch.no_grad()
def test_quantized_cache(monkeypatch):
    if not hasattr(cache_utils, "Fp8QuantizedLayer"):
        pytest.skip("this version of transformers has no FP8 cache")
    model = tiny_model()
    ids = random_ids(2, LENGTH)
    expected = model(ids).logits
    error = (run_in_chunks(model, ids, (10, 11), QuantizedCache("fp8", model.config)) - expected).abs().mean()
    assert 1e-3 < error < 0.2
    # With a storage type that loses nothing only the positions could differ.
    monkeypatch.setattr(cache_utils.Fp8QuantizedLayer, "fp8_dtype", torch.float32)
    actual = run_in_chunks(model, ids, (10, 11), QuantizedCache("fp8", model.config))
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-4)


@torch.no_grad()
@settings(max_examples=20, deadline=None)
@given(
    pads=st.lists(st.integers(0, 8), min_size=1, max_size=3),
    bounds=st.lists(st.integers(9, LENGTH + 7), max_size=3, unique=True).map(sorted),
    kind=st.sampled_from(["dynamic", "static"]),
    explicit=st.booleans(),
)
def test_left_padding_changes_nothing(pads, bounds, kind, explicit):
    model = tiny_model().double()
    ids = random_ids(len(pads), LENGTH)
    expected = model(ids).logits
    width = LENGTH + 8
    padded = torch.zeros(len(pads), width, dtype=torch.long)
    mask = torch.zeros_like(padded)
    for row, pad in enumerate(pads):  # `pad` tokens on the left, the rest of the width on the right
        padded[row, pad : pad + LENGTH] = ids[row]
        mask[row, pad : pad + LENGTH] = 1
    position_ids = (mask.cumsum(-1) - 1).clamp(min=0) if explicit else None
    actual = run_in_chunks(model, padded, bounds, make_cache(kind, model.config), mask, position_ids)
    uncached = model(padded, attention_mask=mask, position_ids=position_ids, use_cache=False).logits
    for row, pad in enumerate(pads):
        torch.testing.assert_close(actual[row, pad : pad + LENGTH], expected[row], rtol=0, atol=1e-9)
        torch.testing.assert_close(uncached[row, pad : pad + LENGTH], expected[row], rtol=0, atol=1e-9)


@torch.no_grad()
def test_right_padded_prompts_can_be_continued(model):
    ids = random_ids(2, LENGTH)
    expected = model(ids).logits
    prompt = torch.cat([ids[:, :15], torch.zeros(2, 4, dtype=torch.long)], dim=1)
    mask = torch.ones(2, 19 + LENGTH - 15, dtype=torch.long)
    mask[:, 15:19] = 0
    cache = DynamicCache(config=model.config)
    first = model(prompt, attention_mask=mask[:, :19], past_key_values=cache).logits[:, :15]
    rest = model(ids[:, 15:], attention_mask=mask, past_key_values=cache).logits
    torch.testing.assert_close(torch.cat([first, rest], dim=1), expected, rtol=0, atol=1e-9)


@torch.no_grad()
@pytest.mark.parametrize("attn_implementation", ["eager", "sdpa", "flex_attention", "fire"])
@pytest.mark.parametrize("use_cache", [False, True])
@pytest.mark.parametrize("told_by", ["position_ids", "cu_seq_lens"])
@torch.compiler.set_stance("force_eager")  # compiling FlexAttention takes a minute
def test_packed_documents_equal_separate_ones(attn_implementation, use_cache, told_by):
    model = tiny_model(attn_implementation=attn_implementation)
    documents = [random_ids(1, n, seed=n) for n in (5, 13, 1, 9)]
    packed = torch.cat(documents, dim=1)
    where = {"position_ids": torch.cat([torch.arange(d.shape[1]) for d in documents])[None]}
    if told_by == "cu_seq_lens":  # as `DataCollatorWithFlattening` does if asked
        starts = torch.tensor([0, 5, 18, 19, 28], dtype=torch.int32)
        where = {"cu_seq_lens_q": starts, "cu_seq_lens_k": starts, "max_length_q": 13, "max_length_k": 13}
    actual = model(packed, **where, use_cache=use_cache).logits
    expected = torch.cat([model(d).logits for d in documents], dim=1)
    torch.testing.assert_close(actual, expected, rtol=0, atol=2e-5)


@torch.no_grad()
def test_randomised_positions():
    model = tiny_model().double()
    ids = random_ids(2, LENGTH)
    positions = torch.randperm(200, generator=torch.Generator().manual_seed(0))[:LENGTH].sort()[0][None]
    actual = model(ids, position_ids=positions, key_position_ids=positions).logits
    # The same tokens at the same places of a long text whose other tokens are masked.
    long_ids = torch.full((2, 200), 5)
    long_ids[:, positions[0]] = ids
    mask = torch.zeros_like(long_ids)
    mask[:, positions[0]] = 1
    expected = model(long_ids, attention_mask=mask, position_ids=torch.arange(200)[None]).logits[:, positions[0]]
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-9)
    # A mask says as well that the gaps do not part documents.
    masked = model(ids, position_ids=positions, attention_mask=torch.ones_like(ids), use_cache=False).logits
    torch.testing.assert_close(masked, expected, rtol=0, atol=1e-9)
    # A cache does not know the keys' positions: they are told.
    cache = DynamicCache(config=model.config)
    logits = [
        model(
            ids[:, start:stop],
            position_ids=positions[:, start:stop],
            key_position_ids=positions[:, :stop],
            past_key_values=cache,
        ).logits
        for start, stop in ((0, 9), (9, LENGTH))
    ]
    torch.testing.assert_close(torch.cat(logits, dim=1), expected, rtol=0, atol=1e-9)


@torch.no_grad()
@pytest.mark.parametrize("attn_implementation", ["eager", "sdpa", "fire"])
def test_randomised_positions_in_a_static_cache(attn_implementation):
    model = tiny_model(attn_implementation=attn_implementation).double()
    ids, positions = random_ids(2, LENGTH), 3 * torch.arange(LENGTH)[None]
    expected = model(ids, position_ids=positions, key_position_ids=positions).logits
    cache = make_cache("static", model.config)
    actual = model(ids, position_ids=positions, key_position_ids=positions, past_key_values=cache).logits
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-9)


@torch.no_grad()
def test_inputs_embeds_and_logits_to_keep(model):
    ids = random_ids(2, LENGTH)
    expected = model(ids).logits
    actual = model(inputs_embeds=model.get_input_embeddings()(ids), logits_to_keep=3).logits
    torch.testing.assert_close(actual, expected[:, -3:], rtol=0, atol=1e-12)
    actual = model(ids, logits_to_keep=torch.tensor([1, 5])).logits
    torch.testing.assert_close(actual, expected[:, [1, 5]], rtol=0, atol=1e-12)


def test_bad_input_is_refused():
    model = tiny_model(FireModel)
    ids = random_ids(1, 4)
    with pytest.raises(ValueError, match="exactly one of `input_ids` and `inputs_embeds`"):
        model()
    with pytest.raises(ValueError, match="exactly one of `input_ids` and `inputs_embeds`"):
        model(ids, inputs_embeds=model.embed_tokens(ids))
    with pytest.raises(ValueError, match="`position_ids` beside them"):
        model(ids, key_position_ids=torch.arange(4)[None])
    for length in (3, 5):
        with pytest.raises(ValueError, match=f"of {length} keys: give those of all 4"):
            model(ids, position_ids=torch.arange(4)[None], key_position_ids=torch.arange(length)[None])


@pytest.mark.parametrize("packed", [False, True])
def test_a_training_step_reads_no_values(packed, monkeypatch):
    """None that lies on a device, for which it would wait: on "meta" there are none."""
    monkeypatch.setenv("FIRE_BACKEND", "cpu")  # the operator is not entered, but asked for
    model = tiny_model(attn_implementation="fire").train().to("meta")
    ids = torch.zeros(2, 16, dtype=torch.long, device="meta")
    position_ids = torch.zeros_like(ids) if packed else None
    with mock.patch.object(attention_fire, "fused_attention", wraps=attention_fire.fused_attention) as fused:
        model(ids, position_ids=position_ids, labels=ids).loss.backward()
    assert fused.called and all(parameter.grad is not None for parameter in model.parameters())


# The house-keeping of a transformers model.


def test_num_items_in_batch_scales_the_loss():
    model = tiny_model()
    ids = random_ids(2, LENGTH)
    plain = model(ids, labels=ids).loss
    summed = model(ids, labels=ids, num_items_in_batch=2 * (LENGTH - 1)).loss
    torch.testing.assert_close(summed, plain)
    torch.testing.assert_close(model(ids, labels=ids, num_items_in_batch=100).loss, plain * 2 * (LENGTH - 1) / 100)


def test_tied_embeddings(tmp_path):
    model = tiny_model(tie_word_embeddings=True)
    assert model.lm_head.weight is model.get_input_embeddings().weight
    model.save_pretrained(tmp_path)
    loaded = FireForCausalLM.from_pretrained(tmp_path)
    assert loaded.lm_head.weight is loaded.get_input_embeddings().weight
    loaded.resize_token_embeddings(120)
    assert loaded.lm_head.weight.shape[0] == 120


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_bias_stays_in_float32(dtype, tmp_path):
    model = tiny_model()
    model.save_pretrained(tmp_path)
    for low in (
        FireForCausalLM.from_pretrained(tmp_path, dtype=dtype),
        FireForCausalLM._from_config(tiny_config(), dtype=dtype),
        tiny_model().to(dtype),
    ):
        for name, parameter in low.named_parameters():
            assert parameter.dtype == (torch.float32 if "position_bias" in name else dtype), name
    for name, parameter in model.named_parameters():
        if "position_bias" in name:
            loaded = FireForCausalLM.from_pretrained(tmp_path, dtype=dtype).get_parameter(name)
            assert torch.equal(loaded, parameter), name


@pytest.mark.parametrize(
    "changes",
    [
        {"fire_share_layers": True},
        {"fire_mlp_depth": 2, "fire_activation": "gelu"},
        {"fire_transform": "power", "fire_progressive": False},
        {"fire_transform": "identity", "fire_threshold": False},
        {"position_bias": "t5"},
        {"position_bias": "kerple_power"},
        {"position_bias": "none", "rope_parameters": {"rope_type": "yarn", "factor": 2.0}},
        {"norm_type": "layer_norm", "norm_bias": False, "mlp_gated": False, "parallel_residual": True},
        {"attention_bias": True, "attention_output_bias": False, "mlp_bias": True, "qk_norm": True},
        {"embedding_norm": True, "head_dim": 16, "num_key_value_heads": 1},
    ],
    ids=lambda changes: "-".join(changes),
)
def test_every_option_survives_saving(changes, tmp_path):
    model = tiny_model(**changes)
    with torch.no_grad():  # what initialisation would not restore by chance
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.rand_like(parameter))
    model.save_pretrained(tmp_path)
    loaded = FireForCausalLM.from_pretrained(tmp_path)
    ids = random_ids(2, LENGTH)
    assert torch.equal(loaded(ids).logits, model(ids).logits)


@pytest.mark.parametrize("changes", [{}, {"fire_share_layers": True}], ids=["fire", "fire_s"])
@torch.no_grad()
def test_device_map_with_offloading(changes, tmp_path):
    model, ids = tiny_model(**changes), random_ids(2, LENGTH)
    model.save_pretrained(tmp_path / "saved")
    device_map = {name: "disk" if name.endswith(("1", "position_bias")) else "cpu" for name in PARTS if "." in name}
    if not changes:
        device_map.pop("model.position_bias")
    loaded = FireForCausalLM.from_pretrained(
        tmp_path / "saved", device_map={**device_map, "lm_head": "cpu"}, offload_folder=tmp_path / "offloaded"
    )
    torch.testing.assert_close(loaded(ids).logits, model(ids).logits)


def test_token_classification_without_a_dropout_of_its_own():
    model = tiny_model(FireForTokenClassification, classifier_dropout=None)
    assert model.dropout.p == 0.1  # as transformers has it


def test_sequence_classification_reads_the_last_token():
    model = tiny_model(FireForSequenceClassification, num_labels=3)
    ids = random_ids(2, 10)
    expected = model(ids).logits
    padded = torch.cat([ids, torch.zeros(2, 4, dtype=torch.long)], dim=1)
    torch.testing.assert_close(model(padded, attention_mask=(padded != 0).long()).logits, expected)
