"""FIRE's bias against its formula: values, every gradient, precision; and how biases are built."""

import copy
import math
import sys
from concurrent.futures import ThreadPoolExecutor
from itertools import product
from types import SimpleNamespace

import pytest
import torch
from helpers import tiny_config, tiny_model
from hypothesis import given, settings
from hypothesis import strategies as st
from reference import EPS, assert_close, causal, index
from torch import nn

from modeling_fire import FirePositionBias
from modeling_fire.attention_fire import fire_attention
from modeling_fire.other_biases_fire import AlibiPositionBias, KerplePositionBias, SandwichPositionBias, T5PositionBias
from modeling_fire.position_bias_fire import build_position_bias
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


def random_fire(num_heads: int = 3, mlp_width: int = 5, init_L: float = 7.0, **options) -> FirePositionBias:
    """A bias in float64 with an `f` of no particular shape, whose `c` and `L_multiplier` are negative."""
    torch.manual_seed(0)
    bias = FirePositionBias(num_heads, mlp_width, init_L=init_L, init_f="uniform", **options).double()
    with torch.no_grad():
        for parameter, value in ((bias.c, -0.3), (bias.L_multiplier, -1.1)):
            if parameter is not None:
                parameter.fill_(value)
    return bias


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


def test_log1p_keeps_the_digits_that_log_loses():
    bias = FirePositionBias(1, init_c=1e-7)
    x = torch.arange(1.0, 513.0)
    exact = torch.log1p(bias.c.double() * x.double())

    def relative_error(psi):
        return (psi / exact - 1).abs().max().item()

    assert relative_error(bias.psi(x)) < 4 * EPS
    assert relative_error(torch.log(bias.c * x + 1)) > 1e-4


def test_autocast_does_not_reach_the_bias():
    bias, positions = random_fire().float(), FirePositions.arange(1000)
    with torch.autocast("cpu", torch.bfloat16):
        output = bias(positions)
    assert output.dtype == torch.float32
    assert torch.equal(output, bias(positions))


CASTS = {
    "to": lambda model: model.to(torch.bfloat16),
    "to device": lambda model: model.to("cpu", torch.float16),
    "half": nn.Module.half,
    "bfloat16": nn.Module.bfloat16,
}


@pytest.mark.parametrize("cast", CASTS.values(), ids=CASTS)
@pytest.mark.parametrize("name", ["fire", "kerple_log", "t5"])
def test_casting_a_model_leaves_its_bias_in_float32(name, cast):
    model = tiny_model(position_bias=name)
    model(torch.arange(9)[None]).logits.sum().backward()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    cast(model)
    for key, value in model.state_dict().items():
        kept = "position_bias" in key
        assert (value.dtype == torch.float32) == kept, key
        assert not kept or torch.equal(value, before[key]), key
    for key, parameter in model.named_parameters():
        assert (parameter.grad.dtype == torch.float32) == ("position_bias" in key), key


def test_double_computes_in_float64():
    bias, positions = random_fire(), FirePositions.arange(20)
    assert bias(positions).dtype == torch.float64
    assert bias.bfloat16().c.dtype == torch.float64, "a narrower cast must not round"
    assert bias.float()(positions).dtype == torch.float32


@pytest.mark.parametrize("mlp_depth", [1, 2])
def test_parameters_are_reset_on_any_device(mlp_depth):
    FirePositionBias(4, mlp_depth=mlp_depth).to("meta").reset_parameters()


def test_meta_device_and_back():
    bias = FirePositionBias(4, init_c=0.2, init_L=300.0).to("meta", torch.bfloat16)
    assert {(p.device.type, p.dtype) for p in bias.state_dict().values()} == {("meta", torch.float32)}
    for module in bias.to_empty(device="cpu").modules():
        if hasattr(module, "reset_parameters"):
            module.reset_parameters()
    assert [bias.c.item(), bias.L_multiplier.item(), bias.init_L.item()] == pytest.approx([0.2, 1.0, 300.0])
    assert bias(FirePositions.arange(9)).isfinite().all()


def test_copies_and_state_dicts_are_equal_and_independent():
    bias, positions = random_fire(), FirePositions.arange(20)
    expected = bias(positions)
    loaded = FirePositionBias(3, 5, init_L=99.0).double()
    loaded.load_state_dict(bias.state_dict())
    copied = copy.deepcopy(bias)
    nn.init.ones_(bias.c)
    assert torch.equal(loaded(positions), expected)
    assert torch.equal(copied(positions), expected)
    assert not torch.equal(bias(positions), expected)


def test_unused_parameters_do_not_exist():
    names = {name for name, _ in FirePositionBias(2, transform="identity", threshold=False).named_parameters()}
    assert names == {"mlp.0.weight", "mlp.0.bias", "mlp.2.weight", "mlp.2.bias"}
    assert all(p.ndim > 0 for p in FirePositionBias(2).parameters()), "FSDP2 refuses parameters without dimensions"


# Construction


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("fire", FirePositionBias),
        ("alibi", AlibiPositionBias),
        ("kerple_log", KerplePositionBias),
        ("kerple_power", KerplePositionBias),
        ("t5", T5PositionBias),
        ("sandwich", SandwichPositionBias),
    ],
)
def test_every_name_is_built_and_causes_a_bias_of_its_own(name, expected):
    torch.manual_seed(0)
    bias = build_position_bias(tiny_config(position_bias=name))
    assert type(bias) is expected
    assert getattr(bias, "variant", None) == (name.removeprefix("kerple_") if "kerple" in name else None)
    output = bias(FirePositions.arange(6))
    assert output.shape == (1, 4, 6, 6) and output.dtype == torch.float32
    assert output[0, 0, -1].unique().numel() > 1


def test_no_bias_is_built_for_none():
    assert build_position_bias(tiny_config(position_bias="none")) is None


def test_fire_is_built_with_every_field_of_the_configuration():
    config = tiny_config(
        fire_mlp_width=5,
        fire_mlp_depth=2,
        fire_activation="gelu",
        fire_transform="power",
        fire_init_c=0.3,
        fire_init_L=21.0,
        fire_init_f="uniform",
        fire_eps=1e-3,
        fire_progressive=False,
    )
    bias = build_position_bias(config)
    assert [type(layer) for layer in bias.mlp][1::2] == [nn.GELU, nn.GELU]
    assert [len(layer.bias) for layer in bias.mlp[::2]] == [5, 5, 4]
    assert [bias.c.item(), bias.init_L.item()] == pytest.approx([0.3, 21.0])
    assert (bias.transform, bias.eps, bias.progressive, bias.threshold) == ("power", 1e-3, False, True)
    hidden = build_position_bias(tiny_config(fire_init_c=0.1, fire_init_L=99.0, max_position_embeddings=64)).mlp[0]
    last_knot = -hidden.bias[-1] / hidden.weight[-1]  # where the distance is the training length
    assert last_knot.item() == pytest.approx(math.log1p(6.4) / math.log1p(9.9))
    assert build_position_bias(tiny_config(fire_threshold=False)).L_multiplier is None


@pytest.mark.parametrize(
    ("construct", "argument"),
    [
        (lambda: FirePositionBias(4, activation="tanh"), "activation"),
        (lambda: FirePositionBias(4, transform="sqrt"), "transform"),
        (lambda: FirePositionBias(4, mlp_depth=3), "mlp_depth"),
        (lambda: FirePositionBias(4, init_f="zero"), "init_f"),
        (lambda: FirePositionBias.from_t5(torch.zeros(32, 4), max_length=64), "max_length"),
        (lambda: build_position_bias(SimpleNamespace(num_attention_heads=4, position_bias="rope")), "position_bias"),
        (lambda: FirePositionBias.from_kerple(torch.ones(4), 1.0, 64, variant="identity"), "variant"),
        (lambda: KerplePositionBias(4, "linear"), "variant"),
    ],
)
def test_errors_name_the_argument(construct, argument):
    with pytest.raises(ValueError, match=f"`{argument}`"):
        construct()


@torch.no_grad()
def test_what_inference_remembers_follows_the_parameters():
    torch.manual_seed(0)
    bias, other = FirePositionBias(2, init_L=9.0).eval(), FirePositionBias(2, init_L=9.0, init_f="uniform").eval()
    positions = FirePositions.arange(1, past=5)

    def pieces(module: FirePositionBias) -> list[torch.Tensor]:
        found = module(positions, piecewise=True)
        return [*found.tensors, found.table]

    assert pieces(bias)[1] is pieces(bias)[1], "worked out once"
    several = bias(FirePositions.arange(3, past=5), piecewise=True)
    assert several.slope is pieces(bias)[1] and several.table is None, "also for several tokens of a step"
    for change in (
        lambda: bias.load_state_dict(other.state_dict()),
        lambda: bias.c.mul_(2),
        lambda: bias.mlp[2].weight.add_(1),
        lambda: setattr(bias.L_multiplier, "data", bias.L_multiplier.data * 3),
        lambda: bias.mlp[0].weight.data.mul_(2),
        lambda: bias.mlp[2].bias.data.copy_(torch.ones(2)),
        lambda: bias.init_L.fill_(4.0),
        lambda: nn.utils.parametrizations.weight_norm(bias.mlp[2]),
        lambda: bias.mlp[2].parametrizations.weight.original0.mul_(2),
    ):
        before = pieces(bias)
        change()
        after, fresh = pieces(bias), pieces(copy.deepcopy(bias).train().eval())
        changed = not all(torch.equal(a, b) for a, b in zip(before[:6], after[:6], strict=True))
        assert changed or "parametrizations" in dict(bias.mlp[2].named_children())
        assert all(torch.equal(a, b) for a, b in zip(fresh[:6], after[:6], strict=True))


@torch.no_grad()
def test_what_inference_remembers_goes_by_the_types_and_options():
    bias = FirePositionBias(2, init_L=9.0, init_f="uniform").eval()
    generator = torch.Generator().manual_seed(0)
    query, key, value = (torch.randn(1, 2, n, 8, generator=generator, dtype=torch.float64) for n in (1, 6, 6))

    def attend(dtype: torch.dtype) -> torch.Tensor:
        return fire_attention(query.to(dtype), key.to(dtype), value.to(dtype), bias)

    def check() -> None:
        expected = copy.deepcopy(bias).double()(FirePositions.arange(1, past=5))
        expected = (query @ key.mT * 8**-0.5 + expected).softmax(-1) @ value
        for dtype, tolerance in ((torch.float32, 1e-5), (torch.float64, 1e-5), (torch.bfloat16, 0.05)) * 2:
            torch.testing.assert_close(attend(dtype).double(), expected, rtol=0.0, atol=tolerance)

    for change in (bias.eval, bias.double, bias.float, lambda: setattr(bias, "eps", 0.5)):
        change()
        check()
    # What a GPU leaves, which watches versions rather than values.
    bias.memory["state"] = [(p.data_ptr(), p._version) for p in bias.parameters()]
    check()


@torch.no_grad()
def test_what_a_device_without_cheap_comparisons_remembers():
    # Not on a GPU, but told apart by the versions of the parameters all the same.
    bias = FirePositionBias(2, init_L=9.0).to("meta").eval()
    assert bias.remembered() is not None
    bias.memory["constants"] = "kept"
    assert bias.remembered() is not None and "constants" in bias.memory
    for change in (lambda: bias.c.mul_(2), lambda: setattr(bias, "eps", 0.5), lambda: bias.init_L.fill_(4.0)):
        change()
        assert bias.remembered() is not None and "constants" not in bias.memory
        bias.memory["constants"] = "kept"
    bias.c.data.mul_(2)  # shows in no version
    assert bias.remembered() is not None and "constants" in bias.memory
    bias(FirePositions.arange(2, "meta"), piecewise=True)
    assert bias.memory["constants"] != "kept", "a text that begins is read anew"
    bias.eval()
    assert "constants" not in bias.memory
    bias.to_empty(device="cpu")
    assert bias.remembered() is not None


def test_threads_share_what_inference_remembers():
    """Texts that begin and steps that go on, side by side, as in a server."""
    bias = FirePositionBias(2, init_L=9.0).eval()
    calls = FirePositions.arange(5), FirePositions.arange(1, past=5), FirePositions.arange(1, past=20)
    with torch.no_grad():
        expected = [bias(positions, piecewise=True).slope for positions in calls]

    @torch.no_grad()
    def work(number: int) -> bool:
        turns = [(number + turn) % 3 for turn in range(300)]
        return all(torch.equal(bias(calls[turn], piecewise=True).slope, expected[turn]) for turn in turns)

    before = sys.getswitchinterval()
    try:
        sys.setswitchinterval(1e-6)
        with ThreadPoolExecutor(4) as pool:
            assert all(pool.map(work, range(4)))
    finally:
        sys.setswitchinterval(before)


@torch.no_grad()
def test_the_table_of_inference_is_the_dense_bias():
    bias = FirePositionBias(2, init_L=9.0).double().eval()
    table = bias(FirePositions.arange(1, past=5), piecewise=True).table
    torch.testing.assert_close(table[:, -6:], bias(FirePositions.arange(1, past=5))[0, :, 0], rtol=1e-12, atol=1e-12)


@torch.no_grad()
def test_what_inference_remembers_is_not_saved():
    bias = FirePositionBias(2, init_L=9.0).eval()
    bias(FirePositions.arange(1, past=5), piecewise=True)
    assert bias.memory and not copy.deepcopy(bias).memory
