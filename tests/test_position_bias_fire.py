"""FIRE's bias against its formula: values, every gradient, precision; and how `f` starts."""

import copy
from itertools import product
from typing import ClassVar

import pytest
import torch
from helpers import random_fire
from hypothesis import given, settings
from hypothesis import strategies as st
from reference import EPS, assert_close, causal, index
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from modeling_fire import FirePositionBias
from modeling_fire.positions_fire import FirePositions


def naive_fire(parameters, options, distance, absolute):
    """`f(psi(d) / (psi(max(i, L)) + eps))` as it is written down, heads last; `parameters` by their names."""

    def psi(x):
        if options["transform"] == "identity":
            return x
        c = parameters["c"].abs()
        return torch.log(c * x + 1) if options["transform"] == "log" else x**c

    x = psi(distance)
    if options["threshold"]:
        L = (parameters["L_multiplier"] * parameters["init_L"]).abs()
        x = x / (psi(torch.maximum(absolute, L) if options["progressive"] else L) + 1e-6)
    elif options["progressive"]:
        x = x / (psi(absolute) + 1e-6)

    *hidden_layers, last = range(0, 2 * options["mlp_depth"] + 1, 2)
    activation = torch.relu if options["activation"] == "relu" else nn.functional.gelu
    hidden = x[..., None]
    for n in hidden_layers:
        hidden = activation(hidden @ parameters[f"mlp.{n}.weight"].T + parameters[f"mlp.{n}.bias"])
    return hidden @ parameters[f"mlp.{last}.weight"].T + parameters[f"mlp.{last}.bias"]


DEFAULTS = {"mlp_depth": 1, "activation": "relu", "transform": "log", "progressive": True, "threshold": True}


def leaves(bias: nn.Module) -> dict[str, torch.Tensor]:
    """Copies of the parameters and buffers, which take gradients of their own."""
    return {
        name: value.detach().clone().requires_grad_(isinstance(value, nn.Parameter))
        for name, value in [*bias.named_parameters(), *bias.named_buffers()]
    }


# FIRE against its formula


def every_combination(**choices):
    combinations = [dict(zip(choices, values, strict=True)) for values in product(*choices.values())]
    return pytest.mark.parametrize("options", combinations, ids=lambda options: "-".join(map(str, options.values())))


NORMALIZERS = {"transform": ["log", "identity", "power"], "progressive": [True, False], "threshold": [True, False]}


@every_combination(mlp_depth=[1, 2], activation=["relu", "gelu"], **NORMALIZERS)
def test_fire_is_its_formula_in_values_and_every_gradient(options):
    bias = random_fire(**options)
    positions = FirePositions(index(0, 1, 6, 7, 8, 9, 30), index(0, 1, 6, 7, 8, 9, 30), torch.arange(31)[None])
    visible = causal(positions)
    weights = torch.randn(1, 3, 7, 31, dtype=torch.float64) * visible
    parameters = leaves(bias)

    actual = bias(positions)
    expected = naive_fire(parameters, options, positions.distance().double(), positions.absolute[..., None].double())
    expected = expected.movedim(-1, 1)
    torch.testing.assert_close(actual * visible, expected * visible, rtol=1e-12, atol=1e-12)

    (actual * weights).sum().backward()
    (expected * weights).sum().backward()
    for name, parameter in bias.named_parameters():
        assert parameter.grad.abs().max() > 0, name
        torch.testing.assert_close(parameter.grad, parameters[name].grad, rtol=1e-9, atol=1e-12, msg=name)


@every_combination(**NORMALIZERS)
def test_gradcheck(options):
    bias = random_fire(num_heads=2, mlp_width=3, activation="gelu", **options)
    positions = FirePositions(index(4, 9), index(4, 9), index(0, 1, 3, 4))
    names, values = zip(*bias.named_parameters(), strict=True)

    def function(*values):
        return torch.func.functional_call(bias, dict(zip(names, values, strict=True)), (positions,))

    assert torch.autograd.gradcheck(function, values)


@settings(max_examples=40, deadline=None)
@given(
    batch=st.integers(1, 3),
    num_queries=st.integers(1, 9),
    num_keys=st.integers(1, 13),
    longest=st.sampled_from([3, 20, 5000]),
    seed=st.integers(0, 2**31),
)
def test_any_positions_of_a_batch_follow_the_formula(batch, num_queries, num_keys, longest, seed):
    bias = random_fire()
    generator = torch.Generator().manual_seed(seed)
    absolute, query = torch.randint(0, longest, (2, batch, num_queries), generator=generator)
    key = torch.randint(0, longest, (batch, num_keys), generator=generator)
    positions = FirePositions(absolute, query, key)
    distance = (query[:, :, None] - key[:, None, :]).abs().double()
    expected = naive_fire(leaves(bias), DEFAULTS, distance, absolute[..., None].double()).movedim(-1, 1)
    visible = causal(positions)
    torch.testing.assert_close(bias(positions) * visible, expected * visible, rtol=1e-12, atol=1e-12)


@settings(max_examples=40, deadline=None)
@given(data=st.data(), length=st.integers(1, 40), offset=st.integers(0, 10**6))
def test_a_block_is_the_slice_of_the_whole_wherever_its_frame_begins(data, length, offset):
    bias = random_fire()
    start = data.draw(st.integers(0, length - 1))
    stop, num_keys = data.draw(st.integers(start + 1, length)), data.draw(st.integers(1, length))
    whole = FirePositions.arange(length)
    block = whole.block(start, stop, num_keys)
    shifted = FirePositions(block.absolute, block.query + offset, block.key + offset)
    expected = bias(whole)[:, :, start:stop, :num_keys]
    torch.testing.assert_close(bias(block), expected, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(bias(shifted), expected, rtol=1e-12, atol=1e-12)


def test_the_absolute_position_matters_past_the_threshold_only():
    bias = random_fire()  # |L| is 7.7
    here, below, past = (bias(FirePositions(index(i), index(5), torch.arange(6)[None])) for i in (5, 7, 9))
    assert torch.equal(here, below)
    assert not torch.allclose(here, past)


class PublicListing(nn.Module):
    """The widely copied listing: scalars without dimensions, `init_L` a parameter, `log` rather than `log1p`."""

    def __init__(self, num_heads: int = 12, mlp_width: int = 32, init_c: float = 0.1, init_L: float = 512.0):
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(1, mlp_width), nn.ReLU(), nn.Linear(mlp_width, num_heads))
        self.c = nn.Parameter(torch.tensor(init_c))
        self.init_L = nn.Parameter(torch.tensor(init_L), requires_grad=False)
        self.L_multiplier = nn.Parameter(torch.tensor(1.0))
        self.eps = 1e-6

    def forward(self, length: int) -> torch.Tensor:
        positions = torch.arange(length, dtype=self.c.dtype)
        rel_distance = positions[:, None] - positions[None, :]
        threshold = torch.abs(self.L_multiplier * self.init_L)
        pos_normalizer = torch.max(positions, threshold)[:, None]
        rel_distance = torch.log(torch.abs(self.c * rel_distance) + 1)
        pos_normalizer = torch.log(torch.abs(self.c * pos_normalizer) + 1) + self.eps
        fire_bias = self.mlp((rel_distance / pos_normalizer)[..., None])
        return fire_bias[None].permute(0, 3, 1, 2)


@pytest.mark.parametrize(("c", "multiplier"), [(0.1, 1.0), (-0.25, -0.05)])
def test_loads_the_public_listing(c, multiplier):
    listing = PublicListing()
    with torch.no_grad():
        listing.c.fill_(c)
        listing.L_multiplier.fill_(multiplier)
    state = listing.state_dict()
    bias = FirePositionBias(12)
    bias.load_state_dict(state)
    assert state["c"].ndim == 0, "loading must leave the caller's tensors alone"

    positions = FirePositions.arange(40)
    visible = causal(positions)
    assert_close(bias(positions), listing(40), ulps=64, where=visible)  # its log(1 + x) loses the digits
    expected = listing.double()(40)
    torch.testing.assert_close(bias.double()(positions) * visible, expected * visible, rtol=1e-12, atol=1e-12)


# Where f starts


@pytest.mark.parametrize(
    "mlp_depth",
    [1, 2],
)
@pytest.mark.parametrize("transform", ["log", "identity", "power"])
def test_f_starts_as_decaying_curves(mlp_depth, transform):
    torch.manual_seed(0)
    bias = FirePositionBias(4, init_L=4096.0, mlp_depth=mlp_depth, transform=transform, train_length=64)
    key = torch.arange(400)[None]
    actual, distance = bias(FirePositions(key[:, -1:], key[:, -1:], key))[0, :, 0].flip(-1), key[0].float()
    assert actual[:, 0].abs().max() < 1
    exact = copy.deepcopy(bias).double()(FirePositions(key[:, -1:], key[:, -1:], key))[0, :, 0].flip(-1)
    assert (actual - exact).abs().max() < 2e-4, "steep pieces cost digits, no more than these"
    actual = actual - actual[:, :1]  # a softmax ignores constants
    r = torch.linspace(1.5, 0.3, 4)[:, None]
    expected = -64 / r * torch.log1p(r * distance**r / 64)  # `-d ** r` as long as that is not steep
    noise = (actual - expected)[:, [0, 4, 8, 16, 32, 64]].abs().max()
    assert 0.01 < noise < 0.6, "small terms, for training to shape"

    psi = bias.psi(distance)[64:]
    slope = (actual[:, -1:] - actual[:, 64:65]) / (psi[-1] - psi[0])
    line = actual[:, 64:65] + slope * (psi - psi[0])
    torch.testing.assert_close(actual[:, 64:], line, rtol=1e-5, atol=1e-3)


def test_a_width_of_one_starts_as_a_line():
    bias = FirePositionBias(2, mlp_width=1, init_L=4096.0, train_length=64)
    distance = torch.tensor([0.0, 64.0])
    start, end = bias.mlp((bias.psi(distance) / bias.psi(torch.tensor(4096.0)))[:, None])
    torch.testing.assert_close(end - start, torch.tensor([-106.0, -3.3]), rtol=0.1, atol=0)


def test_a_uniform_start_is_that_of_linear_layers():
    for layer in FirePositionBias(64, 64, init_f="uniform", mlp_depth=2).mlp[::2]:
        for parameter in layer.parameters():
            assert 0.9 < parameter.abs().max() * layer.weight.shape[1] ** 0.5 <= 1


# Numerics

MILLION = index(0, 1, 2, 511, 999_999, 1_000_000)


@pytest.mark.parametrize("transform", ["log", "identity", "power"])
@pytest.mark.parametrize("multiplier", [0.0, 1e-6, -1e-6, -1.0])
@pytest.mark.parametrize("c", [0.0, 1e-8, -1e-8, -0.1])
def test_degenerate_parameters_stay_finite(c, multiplier, transform):
    torch.manual_seed(0)
    bias = FirePositionBias(3, transform=transform, init_f="uniform")
    with torch.no_grad():
        if bias.c is not None:
            bias.c.fill_(c)
        bias.L_multiplier.fill_(multiplier)
    output = bias(FirePositions(MILLION, MILLION, MILLION))  # keys ahead of the query too: a mask is not a shield
    output.sum().backward()
    assert output.isfinite().all()
    for name, parameter in bias.named_parameters():
        assert parameter.grad.isfinite().all(), name


@pytest.mark.parametrize("transform", ["log", "identity", "power"])
def test_float32_is_accurate_at_a_million_positions(transform):
    torch.manual_seed(0)
    bias = FirePositionBias(12, transform=transform, init_f="uniform")
    positions = FirePositions(MILLION, MILLION, torch.arange(0, 1_000_001, 997)[None])
    assert_close(bias(positions), copy.deepcopy(bias).double()(positions), ulps=8, where=causal(positions))


def test_pieces_are_as_exact_as_float32_holds_them():
    """Large units cancel in their slopes, whose products GPUs may be set to round to ten bits (TF32)."""
    bias = FirePositionBias(12, init_c=1.0, init_L=64 * 2048, train_length=2048)
    positions = FirePositions.arange(4)
    exact = copy.deepcopy(bias).double()(positions, backend="cpu")
    pieces = bias(positions, backend="cpu")
    assert_close(pieces.slope, exact.slope, ulps=1)
    assert_close(pieces.offset, exact.offset, ulps=1)


def test_devices_without_float64():
    """Apple's, for instance: meta tensors stand in."""

    class Types(TorchDispatchMode):
        found: ClassVar[set] = set()

        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            result = function(*args, **(kwargs or {}))
            self.found |= {x.dtype for x in tree_leaves(result) if isinstance(x, torch.Tensor)}
            return result

    with Types() as types:
        FirePositionBias(4).to("meta")(FirePositions.arange(4, "meta"), backend="cpu")
    assert torch.float32 in types.found and torch.float64 not in types.found


@pytest.mark.skipif(not torch.cuda.is_available(), reason="TF32 is of GPUs.")
def test_tf32_leaves_the_dense_bias_alone():
    bias = FirePositionBias(12, init_c=1.0, init_L=64 * 2048, train_length=2048).to("cuda")
    positions = FirePositions.arange(1, "cuda", past=2047)
    expected = bias(positions)
    precision = torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision("high")
        assert torch.equal(bias(positions), expected)
    finally:
        torch.set_float32_matmul_precision(precision)


def test_log1p_keeps_the_digits_that_log_loses():
    bias = FirePositionBias(1, init_c=1e-7)
    x = torch.arange(1.0, 513.0)
    exact = torch.log1p(bias.c.double() * x.double())

    def relative_error(psi):
        return (psi / exact - 1).abs().max().item()

    assert relative_error(bias.psi(x)) < 4 * EPS
    assert relative_error(torch.log(bias.c * x + 1)) > 1e-4
