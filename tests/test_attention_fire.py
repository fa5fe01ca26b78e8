"""Three implementations of one attention: equal values and gradients, bounded rounding, refusals."""

import pytest
import torch
from helpers import random_ids, tiny_config, tiny_model
from scenarios import LENGTH, SCENARIOS, logits_and_gradients, model_and_logits
from torch.nn.attention.flex_attention import create_block_mask

from modeling_fire import FireForCausalLM
from modeling_fire.attention_fire import (
    SUPPORTED_ATTENTION,
    eager_attention_forward,
    flex_attention,
    sdpa_attention,
    sdpa_bias,
)
from modeling_fire.modeling_fire import FireAttention
from modeling_fire.position_bias_fire import FirePositionBias
from modeling_fire.positions_fire import FirePositions


FUNCTIONS = {"eager": eager_attention_forward, "sdpa": sdpa_attention, "flex_attention": flex_attention}
pytestmark = pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")


@pytest.fixture(autouse=True)
def uncompiled_flex():
    """transformers compiles FlexAttention, which takes half a minute; uncompiled it is the same function."""
    with torch.compiler.set_stance("force_eager"):
        yield


# The functions themselves


def naive_attention(query, key, value, bias, visible):
    """`softmax(q k / sqrt(d) + b) v` over the visible keys, in the types of the arguments; heads after queries."""
    groups = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(groups, dim=1), value.repeat_interleave(groups, dim=1)
    scores = query @ key.transpose(2, 3) * query.shape[-1] ** -0.5 + bias
    return (scores.masked_fill(~visible, -torch.inf).softmax(-1) @ value).transpose(1, 2)


class Case:
    """Random states and positions, a bias and a mask for one call of an attention function."""

    def __init__(self, batch, queries, keys, kv_heads=2, head_dim=8, dtype=torch.float64, masked=True):
        generator = torch.Generator().manual_seed(0)
        self.module = FireAttention(tiny_config(num_key_value_heads=kv_heads), 0).eval()
        self.query = torch.randn(batch, 4, queries, head_dim, generator=generator).to(dtype)
        self.key, self.value = torch.randn(2, batch, kv_heads, keys, head_dim, generator=generator).to(dtype)
        torch.manual_seed(0)
        self.bias = FirePositionBias(4, init_L=7.0, init_f="uniform").to(
            dtype if dtype == torch.float64 else torch.float32
        )
        with torch.no_grad():
            self.bias.mlp[2].weight.mul_(5)
        query, key = torch.arange(keys - queries, keys)[None], torch.arange(keys)[None]
        # Sequences that stand at positions of their own, as under left padding.
        absolute = (query - torch.arange(batch)[:, None]).clamp(min=0) if masked else query
        self.positions = FirePositions(absolute, query, key)
        self.visible = (query[:, :, None] >= key[:, None, :])[:, None]
        self.masked = masked
        if masked:
            drawn = torch.rand(batch, 1, queries, keys, generator=generator) > 0.3
            self.visible = self.visible & (drawn | (query[:, :, None] == key[:, None, :])[:, None])

    def mask(self, name: str, dtype: torch.dtype):
        if name == "flex_attention":
            shape = (self.query.shape[0], None, self.query.shape[2], self.key.shape[2])
            return create_block_mask(lambda b, h, q, k: self.visible[b % len(self.visible), 0, q, k], *shape, "cpu")
        if name == "eager":
            return torch.zeros(self.visible.shape, dtype=dtype).masked_fill(~self.visible, torch.finfo(dtype).min)
        return self.visible if self.masked else None

    def run(self, name: str):
        states, mask = (self.query, self.key, self.value), self.mask(name, self.query.dtype)
        scaling = self.query.shape[-1] ** -0.5
        return FUNCTIONS[name](
            self.module, *states, mask, positions=self.positions, position_bias=self.bias, scaling=scaling
        )[0]

    def expected(self, dtype: torch.dtype = torch.float64):
        states = (x.to(dtype) for x in (self.query, self.key, self.value))
        return naive_attention(*states, self.bias(self.positions).to(dtype), self.visible)


SHAPES = [(2, 11, 11), (3, 5, 11), (2, 1, 13)]  # a whole sequence, a chunk after a cache, one token


@pytest.mark.parametrize("name", FUNCTIONS)
@pytest.mark.parametrize("kv_heads", [1, 2, 4])
@pytest.mark.parametrize("shape", SHAPES)
def test_every_function_is_the_formula(name, kv_heads, shape):
    case = Case(*shape, kv_heads=kv_heads)
    torch.testing.assert_close(case.run(name), case.expected(), rtol=1e-10, atol=1e-12)


def test_sdpa_without_a_mask_is_causal():
    case = Case(2, 11, 11, masked=False)
    torch.testing.assert_close(case.run("sdpa"), case.expected(), rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("name", FUNCTIONS)
@pytest.mark.parametrize("masked", [True, False])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_is_at_most_twice_as_far_off_as_the_plain_formula(name, masked, dtype):
    case = Case(2, 65, 65, head_dim=32, dtype=dtype, masked=masked)
    exact = case.expected()
    actual, plain = case.run(name), case.expected(dtype)
    assert actual.dtype == dtype
    assert (actual.double() - exact).abs().max() <= 2 * (plain.double() - exact).abs().max()


@pytest.mark.parametrize("name", FUNCTIONS)
def test_a_bias_that_rules_the_scores_is_not_rounded(name):
    case = Case(2, 65, 65, head_dim=32, dtype=torch.bfloat16)
    with torch.no_grad():
        case.bias.mlp[2].weight.mul_(20)
    exact, plain = case.expected(), case.expected(torch.bfloat16)
    assert (case.run(name).double() - exact).abs().max() < 0.3 * (plain.double() - exact).abs().max()


# The bias that GPU kernels take is in the type of the query. Only the type and the device of the query are read.


def gpu_query(dtype: torch.dtype) -> torch.Tensor:
    return torch.empty(0, dtype=dtype, device="meta")


def random_bias(length: int = 256, **options) -> torch.Tensor:
    torch.manual_seed(0)
    return FirePositionBias(4, init_f="uniform", **options)(FirePositions.arange(length)).detach()


def causal_softmax_error(bias: torch.Tensor, exact: torch.Tensor) -> float:
    """How far the attention of `bias` alone is from that of `exact`."""
    hidden = torch.ones(exact.shape[-2:], dtype=torch.bool).triu(1)
    rounded, exact = (x.double().masked_fill(hidden, -torch.inf).softmax(-1) for x in (bias, exact))
    return float((rounded - exact).abs().sum(-1).max())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_bias_of_a_gpu_kernel_is_rounded_after_a_shift_that_softmax_ignores(dtype):
    bias = random_bias() + 20  # what is common to all keys would be paid for in digits
    shifted = sdpa_bias(bias, gpu_query(dtype))
    assert shifted.dtype == dtype
    assert shifted.max() == 0
    assert causal_softmax_error(shifted, bias) < 0.1 * causal_softmax_error(bias.to(dtype), bias)


@pytest.mark.parametrize("options", [{"init_L": 7.0}, {"threshold": False}])
def test_keys_ahead_do_not_cost_precision(options):
    bias = random_bias(**options)
    visible = bias.masked_fill(torch.ones(256, 256, dtype=torch.bool).triu(1), -torch.inf)
    best = (bias - visible.amax(-1, keepdim=True)).bfloat16()
    actual = sdpa_bias(bias, gpu_query(torch.bfloat16))
    assert causal_softmax_error(actual, bias) <= 2 * causal_softmax_error(best, bias)


def test_the_bias_stays_wide_where_the_kernel_takes_it():
    bias = random_bias(length=9)
    assert torch.equal(sdpa_bias(bias, gpu_query(torch.float32)), bias)
    for dtype in (torch.bfloat16, torch.float32):
        assert torch.equal(sdpa_bias(bias, torch.empty(0, dtype=dtype)), bias)
    assert sdpa_bias(bias, torch.empty(0, dtype=torch.float64)).dtype == torch.float64


# Whole models


@pytest.mark.parametrize("scenario", SCENARIOS)
@pytest.mark.parametrize("position_bias", ["fire", "alibi", "none"])
def test_implementations_agree(scenario, position_bias):
    changes = {"position_bias": position_bias, "num_key_value_heads": 1}
    with torch.no_grad():
        expected, *others = (model_and_logits(name, scenario, **changes)[1] for name in SUPPORTED_ATTENTION)
    assert expected.abs().max() > 0.1
    for actual in others:
        torch.testing.assert_close(actual, expected, rtol=0.0, atol=1e-10)


@pytest.mark.parametrize("scenario", SCENARIOS)
@pytest.mark.parametrize("shared", [True, False])
@pytest.mark.parametrize("name", ["fire", "sdpa"])
def test_every_gradient_is_that_of_the_plain_formula(name, scenario, shared):
    expected, actual = (logits_and_gradients(n, scenario, fire_share_layers=shared) for n in ("eager", name))
    for key, wanted in expected.items():
        # The last bias of f shifts whole rows of scores, which a softmax ignores.
        assert (wanted.abs().max() > 1e-9) != ("position_bias.mlp.2.bias" in key), key
        torch.testing.assert_close(actual[key], wanted, rtol=1e-8, atol=1e-10, msg=key)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("name", SUPPORTED_ATTENTION)
@torch.no_grad()
def test_no_token_sees_the_ones_ahead_however_large_their_bias(name, dtype):
    # Without a threshold the first row is normalised by psi(0) + eps, a millionth.
    model = tiny_model(attn_implementation=name, fire_threshold=False, fire_init_f="uniform").to(dtype)
    ids = random_ids(1, 60)
    other = torch.cat([ids[:, :30], random_ids(1, 30, seed=1)], dim=1)
    assert torch.equal(model(ids).logits[:, :30], model(other).logits[:, :30])


@pytest.mark.parametrize("dtype", [torch.bool, torch.long, torch.float32])
@pytest.mark.parametrize("name", ["eager", "sdpa", "fire"])
@pytest.mark.parametrize("precision", [torch.float32, torch.float64])
@torch.no_grad()
def test_masks_of_the_callers_own(name, dtype, precision):
    model, ids = tiny_model(attn_implementation=name).to(precision), random_ids(2, LENGTH)
    causal = torch.ones(2, 1, LENGTH, LENGTH, dtype=torch.bool).tril()
    mask = (
        causal.float().log().clamp(min=torch.finfo(torch.float32).min) if dtype.is_floating_point else causal.to(dtype)
    )
    torch.testing.assert_close(model(ids, attention_mask=mask).logits, model(ids).logits, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("shape", [(2, LENGTH + 1), (2, LENGTH - 1), (1, LENGTH)])
def test_masks_of_another_shape_are_refused(shape):
    with pytest.raises(ValueError, match=rf"`attention_mask` has shape \({shape[0]}, {shape[1]}\)"):
        tiny_model()(random_ids(2, LENGTH), attention_mask=torch.ones(shape))


@pytest.mark.parametrize("given", ["position_ids", "key_position_ids"])
@torch.no_grad()
def test_coordinates_that_do_not_ascend(given):
    ids, positions = random_ids(1, 8), torch.tensor([[0, 1, 2, 0, 1, 2, 3, 0]])
    arguments = {"position_ids": positions, "attention_mask": torch.ones_like(positions)}
    if given == "key_position_ids":
        arguments = {"position_ids": positions.flip(1), "key_position_ids": positions.flip(1)}
    expected, *others = (tiny_model(attn_implementation=name)(ids, **arguments).logits for name in SUPPORTED_ATTENTION)
    for actual in others:
        torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-4)


# Choice of an implementation


@pytest.mark.parametrize(
    "name", ["flash_attention_2", "flash_attention_3", "paged|eager", "kernels-community/flash-attn"]
)
def test_an_implementation_that_drops_the_bias_is_refused(name):
    model = tiny_model(attn_implementation="sdpa")
    config = tiny_config()
    config._attn_implementation = name
    for attempt in (
        lambda: tiny_model(attn_implementation=name),
        lambda: FireForCausalLM(config),
        lambda: model.set_attn_implementation(name),
    ):
        with pytest.raises(ValueError, match="would drop the position bias") as error:
            attempt()
        assert name in str(error.value)
        assert all(repr(alternative) in str(error.value) for alternative in SUPPORTED_ATTENTION)
    assert model.config._attn_implementation == "sdpa"


def test_the_fused_path_is_the_default_where_there_is_a_bias():
    assert FireForCausalLM(tiny_config(position_bias="none")).config._attn_implementation == "sdpa"
    model, ids = FireForCausalLM(tiny_config()).eval(), random_ids(1, LENGTH)
    assert model.config._attn_implementation == "fire"
    expected = model(ids)
    assert expected.attentions is None
    model.set_attn_implementation("eager")
    actual = model(ids, output_attentions=True)
    assert actual.attentions is not None
    torch.testing.assert_close(actual.logits, expected.logits, rtol=1e-4, atol=1e-4)


def test_eager_returns_attentions():
    attentions = tiny_model(attn_implementation="eager")(random_ids(2, LENGTH), output_attentions=True).attentions
    assert [layer.shape for layer in attentions] == [(2, 4, LENGTH, LENGTH)] * 2
    for layer in attentions:
        torch.testing.assert_close(layer.sum(-1), torch.ones(2, 4, LENGTH))
        assert not layer.triu(1).any()


@pytest.mark.parametrize("name", ["eager", "sdpa", "fire"])
def test_dropout_is_active_in_training_only(name):
    model, ids = tiny_model(attn_implementation=name, attention_dropout=0.5), random_ids(2, LENGTH)
    expected = tiny_model(attn_implementation=name)(ids).logits
    assert torch.equal(model(ids).logits, expected)
    model.train()
    assert not torch.allclose(model(ids).logits, model(ids).logits)


def test_dropout_scales_what_it_keeps():
    model, ids = (
        tiny_model(attn_implementation="eager", attention_dropout=0.25, num_hidden_layers=1),
        random_ids(2, 40),
    )
    (expected,) = model(ids, output_attentions=True).attentions
    (dropped,) = model.train()(ids, output_attentions=True).attentions
    kept = dropped != 0
    torch.testing.assert_close(dropped[kept], expected[kept] / 0.75)
    assert 0.7 < float(kept.sum() / (expected != 0).sum()) < 0.8
