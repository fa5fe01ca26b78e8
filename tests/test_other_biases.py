"""The encodings that FIRE is compared with against their formulas, and as special cases of FIRE."""

import math

import pytest
import torch
from helpers import tiny_config
from reference import EPS, assert_close, causal, index
from torch import nn
from transformers.models.bloom.modeling_bloom import build_alibi_tensor
from transformers.models.mpt.modeling_mpt import build_mpt_alibi_tensor
from transformers.models.t5.modeling_t5 import T5Attention

from modeling_fire import FirePositionBias
from modeling_fire.other_biases_fire import (
    AlibiPositionBias,
    KerplePositionBias,
    SandwichPositionBias,
    T5PositionBias,
    alibi_slopes,
    t5_bucket,
)
from modeling_fire.position_bias_fire import build_position_bias
from modeling_fire.positions_fire import FirePositions


@pytest.mark.parametrize("num_heads", [1, 6, 8])
def test_alibi_is_its_formula(num_heads):
    positions = FirePositions.arange(300)
    expected = -alibi_slopes(num_heads).double()[None, :, None, None] * positions.distance().double()[:, None]
    assert_close(AlibiPositionBias(num_heads)(positions), expected, ulps=1, where=causal(positions))


@pytest.mark.parametrize("variant", ["log", "power"])
def test_kerple_is_its_formula_with_clamped_parameters(variant):
    bias = KerplePositionBias(4, variant).double()
    with torch.no_grad():
        bias.r1.copy_(torch.tensor([0.5, 1.5, -3.0, 0.02]))
        bias.r2.copy_(torch.tensor([0.3, 7.0, 0.5, -1.0]))
    r1 = torch.tensor([0.5, 1.5, 0.01, 0.02], dtype=torch.float64)[None, :, None, None]
    r2 = torch.tensor([0.3, 7.0 if variant == "log" else 2.0, 0.5, 0.01]).double()[None, :, None, None]
    positions = FirePositions.arange(60)
    distance = positions.distance().double()[:, None]
    expected = -r1 * torch.log(1 + r2 * distance) if variant == "log" else -r1 * distance**r2
    visible = causal(positions)
    torch.testing.assert_close(bias(positions) * visible, expected * visible, rtol=1e-7, atol=1e-12)


def test_sandwich_is_its_formula():
    positions = FirePositions.arange(50)
    expected = torch.zeros(1, 6, 50, 50, dtype=torch.float64)
    for i in range(50):
        for j in range(i + 1):
            total = sum(math.cos((i - j) / 10000 ** (k / 64)) for k in range(1, 65)) - 64
            expected[0, :, i, j] = torch.tensor([total * 6 / (8 * h) for h in range(1, 7)])
    assert_close(SandwichPositionBias(6)(positions), expected, ulps=8, where=causal(positions))


def test_t5_looks_up_the_bucket_of_each_distance():
    bias, positions = T5PositionBias(3), FirePositions.arange(200)
    expected = bias.table[t5_bucket(positions.distance())].movedim(-1, 1)
    assert torch.equal(bias(positions), expected)


@pytest.mark.parametrize(("num_buckets", "max_distance"), [(32, 128), (64, 256), (16, 50)])
def test_t5_buckets_are_those_of_transformers(num_buckets, max_distance):
    distance = torch.arange(2001)
    expected = T5Attention._relative_position_bucket(-distance, False, num_buckets, max_distance)
    assert torch.equal(t5_bucket(distance, num_buckets, max_distance), expected)


def test_alibi_slopes_are_those_of_bloom_and_mpt():
    for num_heads in range(1, 65):
        bloom = build_alibi_tensor(torch.ones(1, 2), num_heads, torch.float32)[:, 0, 1]
        mpt = -build_mpt_alibi_tensor(num_heads, 2)[:, 0, 0]
        for expected in (bloom, mpt):  # Bloom takes powers of a rounded base
            torch.testing.assert_close(alibi_slopes(num_heads), expected, rtol=num_heads * EPS, atol=0.0)


@pytest.mark.parametrize("name", ["fire", "kerple_log", "kerple_power", "t5"])
def test_gradients_are_finite_and_alive_at_distance_zero(name):
    torch.manual_seed(1)
    bias = build_position_bias(tiny_config(position_bias=name))
    bias(FirePositions.arange(4)).sum().backward()
    for key, parameter in bias.named_parameters():
        assert parameter.grad.isfinite().all(), key
        assert parameter.grad.any(), key


@pytest.mark.parametrize("variant", ["log", "power"])
def test_kerple_parameters_below_their_bound_can_come_back(variant):
    bias = KerplePositionBias(2, variant)
    with torch.no_grad():
        bias.r1.copy_(torch.tensor([0.005, 1.0]))
        bias.r2.copy_(torch.tensor([0.5, 0.005]))
    bias(FirePositions.arange(9)).sum().backward()
    assert bias.r1.grad.all() and bias.r2.grad.all()


# FIRE represents the others, up to `max_length`

HEADS = [1, 6, 12]


@pytest.mark.parametrize("num_heads", HEADS)
@pytest.mark.parametrize("max_length", [16, 300])
def test_alibi_as_fire(num_heads, max_length):
    positions = FirePositions.arange(max_length + 1)
    expected = AlibiPositionBias(num_heads)(positions)
    actual = FirePositionBias.from_alibi(num_heads, max_length)(positions)
    assert_close(actual, expected, ulps=3, where=causal(positions))


def test_alibi_as_fire_takes_other_slopes():
    slopes, positions = torch.tensor([0.3, 2.0]), FirePositions.arange(20)
    expected = -slopes[None, :, None, None] * positions.distance()[:, None]
    assert_close(FirePositionBias.from_alibi(2, 32, slopes)(positions), expected, ulps=3, where=causal(positions))


def test_past_max_length_alibi_as_fire_is_interpolated():
    slopes, row = alibi_slopes(6)[None, :, None, None], torch.arange(300)[None]
    actual = FirePositionBias.from_alibi(6, 100)(FirePositions(row[:, -1:], row[:, -1:], row))
    assert_close(actual, -slopes * (299 - row) * 100 / 299, ulps=4)


def kerple(variant: str, r1: torch.Tensor, r2: float, positions: FirePositions) -> torch.Tensor:
    distance = positions.distance().double()[:, None]
    r1 = r1.double()[None, :, None, None]
    return -r1 * torch.log(1 + r2 * distance) if variant == "log" else -r1 * distance**r2


@pytest.mark.parametrize("num_heads", HEADS)
@pytest.mark.parametrize(("variant", "r2", "max_length"), [("log", 1.0, 300), ("power", 0.7, 300), ("power", 2.0, 64)])
def test_kerple_as_fire(num_heads, variant, r2, max_length):
    r1 = torch.rand(num_heads, generator=torch.Generator().manual_seed(0)) + 0.1
    positions = FirePositions.arange(max_length + 1)
    actual = FirePositionBias.from_kerple(r1, r2, max_length, variant)(positions)
    assert_close(actual, kerple(variant, r1, r2, positions), ulps=12, where=causal(positions))


@pytest.mark.parametrize("encoding", ["alibi", "kerple"])
def test_the_eps_of_the_denominator_is_made_up_for(encoding):
    positions, r1 = FirePositions.arange(5), torch.tensor([1.0, 0.3])
    if encoding == "alibi":
        actual, expected = FirePositionBias.from_alibi(2, 4), AlibiPositionBias(2)(positions)
    else:
        actual, expected = FirePositionBias.from_kerple(r1, 0.01, 4), kerple("log", r1, 0.01, positions)
    assert_close(actual.double()(positions), expected, ulps=1, where=causal(positions))


@pytest.mark.parametrize("num_heads", HEADS)
@pytest.mark.parametrize("max_length", [300, 4096])
def test_t5_as_fire(num_heads, max_length):
    reference = T5PositionBias(num_heads)
    nn.init.normal_(reference.table, generator=torch.Generator().manual_seed(0))
    bias = FirePositionBias.from_t5(reference.table.detach(), max_length)
    last, key = index(0, 1, 15, 16, 17, 100, 127, 128, max_length), torch.arange(max_length + 1)[None]
    positions = FirePositions(last, last, key)
    # The table times a distance of up to 128 tokens to a hinge, whatever the length.
    assert_close(bias(positions), reference(positions), ulps=256, where=causal(positions))


def test_t5_as_fire_fits_the_usual_width():
    assert FirePositionBias.from_t5(torch.randn(32, 2), 128).mlp[0].weight.shape[0] <= 47
