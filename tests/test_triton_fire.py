"""
The Triton kernels beside the plain formula in float64: on a GPU where there is one, else by Triton's interpreter
(`conftest.py`), at small sizes.
"""

import copy
import os
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple
from unittest import mock

import pytest
import torch
from helpers import random_ids, tiny_model
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from layouts import calls, padded, scattered
from reference import dense_attention, dense_bias, double, random_bias
from torch.utils._python_dispatch import TorchDispatchMode

from modeling_fire import FirePositionBias, fire_attention
from modeling_fire.piecewise_fire import PiecewiseBias, psi, psi_slope_in_c
from modeling_fire.positions_fire import FirePositions


pytest.importorskip("triton", reason="Triton is not installed.")
triton_fire = pytest.importorskip("modeling_fire.triton_fire")
LAST_FAR = pytest.importorskip("modeling_fire.triton_tiles_fire").LAST_FAR

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
ROOT = Path(__file__).parents[1]
NAMES = ("query", "key", "value", "slope", "offset", "c", "row_scale")


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch):
    """Tiles of 16 rows and columns, so that short sequences are made of many."""
    blocks = triton_fire.Blocks(16, 16, 4, 1)
    monkeypatch.setattr(triton_fire, "block_sizes_for", lambda *arguments: blocks)


def random_inputs(positions, heads=2, kv_heads=1, head_dim=16, batch=1, dtype=torch.float32, seed=0):
    """Query, key, value and the gradient of the output, in memory as a model has them."""
    generator = torch.Generator().manual_seed(seed)
    queries, keys = positions.query.shape[1], positions.key.shape[1]

    def draw(length, heads):
        return torch.randn(batch, length, heads, head_dim, generator=generator).to(dtype).transpose(1, 2)

    return draw(queries, heads), draw(keys, kv_heads), draw(keys, kv_heads), draw(queries, heads)


class Expected(NamedTuple):
    """Results in float64, and the largest value of each to measure errors by."""

    output: torch.Tensor
    lse: torch.Tensor
    gradients: tuple[torch.Tensor, ...]
    sizes: dict[str, torch.Tensor]


def reference(query, key, value, grad, bias, positions, scaling):
    """Everything by autograd from the plain formula."""
    inputs = [tensor.double().requires_grad_() for tensor in (query, key, value)]
    wide = double(bias)
    output, lse = dense_attention(*inputs, wide, positions, scaling)
    wanted = [*inputs, wide.slope, wide.offset, wide.c, wide.row_scale]
    gradients = torch.autograd.grad(output, wanted, grad.double(), materialize_grads=True)
    with torch.no_grad():
        sizes = {"output": output, "lse": lse[lse > -torch.inf], "value": gradients[2]}
        sizes |= sizes_of_sums(*inputs, grad.double(), wide, positions, scaling, lse)
    return Expected(output.detach(), lse.detach(), gradients, sizes)


def sizes_of_sums(query, key, value, grad, bias, positions, scaling, lse):
    """
    The other gradients, with the absolute value of all that is added up. Much of it cancels (the gradients of a row's
    scores add up to 0), so that an error is to be compared with what was added up, not with the sum.
    """
    groups = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(groups, dim=1), value.repeat_interleave(groups, dim=1)
    scores = query @ key.transpose(-1, -2) * scaling + dense_bias(bias, positions)
    weights = torch.where(positions.mask(), (scores - lse[..., None]).exp(), 0.0)
    change = grad @ value.transpose(-1, -2)
    share = weights * (change.abs() + (weights * change).sum(-1, keepdim=True).abs())
    sizes = {"query": scaling * share @ key.abs(), "key": scaling * share.transpose(-1, -2) @ query.abs()}
    share = share.movedim(1, -1)

    distance = (positions.query[:, :, None] - positions.key[:, None, :]).abs().double()[..., None]
    scale = bias.row_scale[:, :, None, None]
    units = psi(distance, bias.c, bias.transform)
    segment = torch.bucketize((units * scale).contiguous(), bias.knots)
    slope = bias.slope[torch.arange(bias.slope.shape[0]), segment].abs()
    in_c = share * slope * scale * psi_slope_in_c(distance, bias.c, bias.transform)
    in_segment = [(share * (segment == s)).sum() for s in range(bias.slope.shape[1])]
    x_in_segment = [(share * units * scale * (segment == s)).sum() for s in range(bias.slope.shape[1])]
    return sizes | {
        "slope": torch.stack(x_in_segment),
        "offset": torch.stack(in_segment),
        "c": in_c.sum(),
        "row_scale": (share * slope * units).sum((2, 3)),
    }


def fused(query, key, value, grad, bias, positions, scaling, bias_grad=True):
    """Output, log-sum-exp and gradients, computed on `DEVICE`."""
    query, key, value, grad = (tensor.to(DEVICE) for tensor in (query, key, value, grad))
    bias, positions = bias.to(DEVICE), to_device(positions)
    output, lse = triton_fire.forward(query, key, value, bias, positions, scaling)
    gradients = triton_fire.backward(grad, query, key, value, output, lse, bias, positions, scaling, bias_grad)
    return output.cpu(), lse.cpu(), tuple(gradient.cpu() for gradient in gradients)


def to_device(positions):
    return FirePositions(*(x.to(DEVICE) if isinstance(x, torch.Tensor) else x for x in positions))


def row_gradient(gradient, bias):
    """The gradient of `row_scale`, with that of rows that share theirs added up."""
    gradient = gradient.double()
    return torch.cat([gradient[~bias.shared], gradient[bias.shared].sum()[None]])


def errors(output, lse, gradients, expected, bias):
    """The largest error of each result, relative to its size."""
    seen = expected.lse > -torch.inf
    assert torch.equal(lse > -torch.inf, seen)
    pairs = [("output", output, expected.output), ("lse", lse[seen], expected.lse[seen])]
    pairs += list(zip(NAMES, gradients, expected.gradients, strict=True))
    found = {}
    for name, actual, wide in pairs:
        assert actual.shape == wide.shape
        if name == "row_scale":
            actual, wide = row_gradient(actual, bias), row_gradient(wide, bias)
        if wide.numel():  # where nobody sees anything, there is no log-sum-exp
            size = expected.sizes[name].abs().max().clamp(min=1e-3)
            found[name] = float((actual.double() - wide).detach().abs().max() / size)
    return found


def check(positions, bias=None, *, scaling=0.3, tolerance=1e-5, inputs=None, **changes):
    """Compares everything with the plain formula, in float32."""
    sizes = {name: changes.pop(name) for name in ("heads", "kv_heads", "head_dim", "batch") if name in changes}
    inputs = random_inputs(positions, **sizes) if inputs is None else inputs
    if bias is None:
        bias = random_bias(inputs[0].shape[1], positions, dtype=torch.float32, **changes)
    actual = fused(*inputs, bias, positions, scaling)
    found = errors(*actual, reference(*inputs, bias, positions, scaling), bias)
    assert max(found.values()) < tolerance, found
    assert actual[0].transpose(1, 2).is_contiguous() and actual[1].is_contiguous()
    return actual


POSITIONS = {
    "causal": FirePositions.arange(50),
    "one tile": FirePositions.arange(7),
    "continued": FirePositions.arange(21, past=40),
    "window": FirePositions.arange(60, window=18),
    "bidirectional": FirePositions.arange(45, causal=False),
    "bidirectional window": FirePositions.arange(60, causal=False, window=9),
    "packed": FirePositions.packed(torch.tensor([0, 5, 24, 24, 52]), 52),
    "left padding": padded([0, 19], 40),
    "general": scattered(40),
    "general, all visible": scattered(40)._replace(visible=None),
    "hidden keys": FirePositions.arange(40)._replace(visible=torch.arange(40)[None] % 16 < 9),
    "decode, hidden keys": FirePositions.arange(2, past=38)._replace(visible=torch.arange(40)[None] % 16 < 9),
}


@pytest.mark.parametrize("name", POSITIONS)
def test_positions(name):
    positions = POSITIONS[name]
    check(positions, batch=max(positions.query.shape[0], positions.first.shape[0]), L=20.0)


def test_continuous_batching():
    # Two requests side by side among the keys: 30 keys with 6 queries, then 25 with 11.
    query = torch.cat([torch.arange(24, 30), torch.arange(44, 55)])[None]
    first = torch.tensor([0] * 6 + [30] * 11)[None]
    check(FirePositions(query - first, query, torch.arange(55)[None], first, query + 1, consecutive=True), L=9.0)


@pytest.mark.parametrize(("heads", "kv_heads"), [(2, 2), (4, 2), (3, 1)])
def test_groups_of_heads(heads, kv_heads):
    check(FirePositions.arange(33), heads=heads, kv_heads=kv_heads, batch=2)


@pytest.mark.parametrize("head_dim", [1, 48, 128])
def test_head_dims(head_dim):
    check(FirePositions.arange(33), head_dim=head_dim, scaling=head_dim**-0.5)


@pytest.mark.parametrize(
    ("dtype", "head_dim", "capability"),
    [
        (torch.float32, 32, 8),
        (torch.float32, 256, 8),
        (torch.bfloat16, 64, 8),
        (torch.bfloat16, 64, 9),
        (torch.bfloat16, 128, 9),
        (torch.bfloat16, 64, 10),
    ],
)
def test_shipped_tiles(dtype, head_dim, capability, monkeypatch):
    blocks = {
        kernel: triton_fire.block_sizes(kernel, dtype, head_dim, capability) for kernel in ("forward", "query", "key")
    }
    monkeypatch.setattr(triton_fire, "block_sizes_for", lambda kernel, *arguments: blocks[kernel])
    positions = FirePositions.arange(140, past=9)
    bias = random_bias(1, positions, dtype=torch.float32)
    inputs = random_inputs(positions, heads=1, head_dim=head_dim, dtype=dtype)
    found = errors(*fused(*inputs, bias, positions, 0.1), reference(*inputs, bias, positions, 0.1), bias)
    assert max(found.values()) < (1e-5 if dtype == torch.float32 else 2e-2), found


@pytest.mark.parametrize("memory", ["heads first", "scattered"])
def test_strides(memory):
    positions = FirePositions.arange(20)
    inputs = random_inputs(positions, batch=2)
    if memory == "heads first":
        inputs = [tensor.contiguous() for tensor in inputs]
    else:
        inputs = [tensor.transpose(-1, -2).contiguous().transpose(-1, -2) for tensor in inputs]
    gradients = check(positions, inputs=inputs)[2]
    # What `torch.compile` is told beforehand.
    assert all(grad.stride() == tensor.stride() for grad, tensor in zip(gradients, inputs[:3], strict=False))


def test_rows_far_apart():
    """Further than 32 bits count within a tile."""
    far = torch.empty(1, 1, 3, 16, device="meta").as_strided((1, 1, 3, 16), (0, 0, 2**24, 1))
    assert triton_fire.dense_rows(far).is_contiguous()
    near = torch.empty(1, 1, 3, 16, device="meta")
    assert triton_fire.dense_rows(near) is near


@pytest.mark.parametrize("queries", [1, 20])
@pytest.mark.parametrize("poison", [torch.nan, torch.inf])
def test_what_is_no_number_stays_so(queries, poison):
    positions = FirePositions.arange(queries, past=20)
    query, key, value, grad = random_inputs(positions)
    key[:, :, 5] = poison
    output, lse, _ = fused(query, key, value, grad, random_bias(2, positions, dtype=torch.float32), positions, 0.3)
    assert output.isnan().all() and not lse.isfinite().any()


def test_no_bias():
    positions = FirePositions.arange(33, past=7)
    inputs = random_inputs(positions)
    bias = PiecewiseBias.straight(torch.zeros(2), "none", positions.query)
    check(positions, bias, inputs=inputs)
    few = FirePositions.arange(1, past=39)
    check(few, PiecewiseBias.straight(torch.zeros(2), "none", few.query))


@pytest.mark.parametrize("transform", ["log", "power", "identity"])
@pytest.mark.parametrize("per_head", [False, True])
def test_transforms(transform, per_head):
    positions = FirePositions.arange(50)
    bias = random_bias(2, positions, transform=transform, dtype=torch.float32)
    if per_head:
        bias = bias._replace(c=torch.tensor([0.2, 0.7]), row_scale=0.3 * bias.row_scale)
    check(positions, bias)


@pytest.mark.parametrize("c", [0.0, 1e-6, 30.0])
@pytest.mark.parametrize("L", [1e-3, 20.0, 1000.0])
def test_extremes_of_c_and_L(c, L):
    check(FirePositions.arange(33), c=c, L=L)


@pytest.mark.parametrize("knots", [0, 1, 64])
def test_numbers_of_knots(knots):
    check(FirePositions.arange(40), width=knots)


@pytest.mark.parametrize(
    "positions", [FirePositions.arange(35), FirePositions.arange(2, past=60)], ids=["long", "decode"]
)
def test_duplicate_and_infinite_knots(positions):
    knots = torch.tensor([-torch.inf, -torch.inf, -0.5, 0.0, 0.3, 0.3, 0.6, 1.0, torch.inf])
    generator = torch.Generator().manual_seed(1)
    slope = torch.randn(2, 10, generator=generator)
    slope[:, 6] = slope[:, 5]
    # Continuous at the finite knots; between two equal ones nothing is seen of the segment.
    offset = torch.zeros(2, 10)
    for segment in range(1, 10):
        jump = (slope[:, segment - 1] - slope[:, segment]) * knots[segment - 1]
        offset[:, segment] = offset[:, segment - 1] + (jump if knots[segment - 1].isfinite() else 0.0)
    template = random_bias(2, positions, L=20.0, dtype=torch.float32)
    check(positions, template._replace(knots=knots, slope=slope, offset=offset))


def test_far_tiles():
    """With gentle slopes tiles are expanded near enough that a short sequence has some."""
    positions = FirePositions.arange(24, past=180)
    bias = random_bias(1, positions, L=100.0, slope=0.02, dtype=torch.float32)
    inputs = random_inputs(positions, heads=1)
    rows = triton_fire.Rows.of(bias.to(DEVICE), to_device(positions))
    query, key = (tensor.to(DEVICE) for tensor in inputs[:2])
    plan = triton_fire.make_plan(query, key, bias, rows, triton_fire.Blocks(16, 16, 4, 1), False)
    fields = plan.tensors[2]
    assert 50 < fields[0, 0, 0, LAST_FAR.value] < 100
    check(positions, bias, inputs=inputs)
    check(positions, heads=1, c=1e-4, L=1000.0)


def test_rows_that_see_nothing():
    index = torch.arange(40)[None]
    last = index + 1
    last = torch.where((index % 5 == 2) | (index > 33), 0, last)
    first = torch.where(index == 20, 35, 0)
    positions = FirePositions(index, index, index, first, last, consecutive=True)
    output, lse, gradients = check(positions)
    blind = (last <= first)[0]
    assert (output[:, :, blind] == 0).all() and (lse[:, :, blind] == -torch.inf).all()
    assert (gradients[0][:, :, blind] == 0).all()
    invisible = torch.zeros(2, 30, dtype=torch.bool).index_fill(1, torch.tensor([19, 22]), True)
    check(scattered(30)._replace(visible=invisible), batch=2)
    check(FirePositions.arange(3)._replace(last=torch.tensor([[0, 2, 0]])))


@pytest.mark.parametrize("queries", [1, 20])
def test_static_cache(queries):
    """Beyond `last` a cache holds anything, which must not matter."""
    positions = FirePositions.arange(queries, past=33 - queries)
    query, key, value, grad = random_inputs(positions)
    bias = random_bias(2, positions, dtype=torch.float32)
    exact = fused(query, key, value, grad, bias, positions, 0.3)
    capacity = positions._replace(key=torch.arange(60)[None])
    junk = torch.full((1, 1, 27, 16), 3e38)
    results = [
        fused(query, torch.cat([key, fill], 2), torch.cat([value, fill], 2), grad, bias, capacity, 0.3)
        for fill in (junk, torch.full_like(junk, torch.nan))
    ]
    for output, lse, gradients in results:
        torch.testing.assert_close(output, exact[0], rtol=0, atol=1e-6)
        torch.testing.assert_close(lse, exact[1], rtol=0, atol=1e-6)
        for name, gradient, expected in zip(NAMES, gradients, exact[2], strict=True):
            kept = gradient[:, :, :33] if name in ("key", "value") else gradient
            torch.testing.assert_close(kept, expected, rtol=0, atol=1e-5)
            if name in ("key", "value"):
                assert (gradient[:, :, 33:] == 0).all()


@pytest.mark.parametrize("general", [False, True])
def test_coordinates_of_a_million(general):
    positions = FirePositions.arange(30)
    if general:
        far = positions.query + 10**6
        positions = positions._replace(absolute=far, query=far, key=far, consecutive=False)
    else:
        positions = positions._replace(absolute=positions.query + 10**6, query=positions.query + 10**6)
    check(positions)


@pytest.mark.parametrize("L", [12.0, 0.5, 500.0])
def test_threshold(L):
    """Below, at (tied with position 12) and above the positions."""
    check(FirePositions.arange(30), L=L)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision(dtype):
    """
    Errors are at most twice those of the plain formula in the same precision (the bias in float32), and those of the
    gradients of the bias are of another order: the rounding of the output does not come in.
    """
    positions = FirePositions.arange(40, past=20)
    bias = random_bias(2, positions, dtype=torch.float32)
    inputs = random_inputs(positions, head_dim=32, dtype=dtype)
    expected = reference(*inputs, bias, positions, 0.2)

    wanted = [tensor.detach().requires_grad_() for tensor in inputs[:3]]
    wanted += [field.requires_grad_() for field in (bias.slope, bias.offset, bias.c, bias.row_scale)]
    output, lse = low_precision_attention(*wanted[:3], bias, positions, 0.2)
    plain = output.detach(), lse.detach(), torch.autograd.grad(output, wanted, inputs[3])

    actual = fused(*inputs, bias, positions, 0.2)
    assert actual[0].dtype == dtype and actual[1].dtype == torch.float32
    assert [gradient.dtype for gradient in actual[2]] == [dtype] * 3 + [torch.float32] * 4
    limits, found = errors(*plain, expected, bias), errors(*actual, expected, bias)
    limit = 2 * max(limits[name] for name in ("output", "query", "key", "value"))
    assert max(found[name] for name in ("output", "query", "key", "value")) < limit, (found, limits)
    assert max(found[name] for name in NAMES[3:]) < 1e-5, found


@pytest.mark.parametrize("init_f", ["decay", "uniform"])
@pytest.mark.parametrize("length", [40.0, 4000.0])
def test_parameters_of_the_bias_in_low_precision(init_f, length, monkeypatch):
    """Not against sums of magnitudes but itself: no gradient is further off than the plain formula's."""
    monkeypatch.setenv("FIRE_BACKEND", "triton")
    torch.manual_seed(0)
    layer, positions = FirePositionBias(2, init_L=length, init_f=init_f, train_length=96), FirePositions.arange(96)
    names = [name for name, _ in layer.named_parameters() if name != "mlp.2.bias"]  # 0 but for rounding
    inputs = random_inputs(positions, kv_heads=2, head_dim=32, dtype=torch.bfloat16)

    def gradients(layer, attend, dtype):
        query, key, value, grad = (tensor.to(dtype) for tensor in inputs)
        return torch.autograd.grad(attend(query, key, value, layer), [layer.get_parameter(n) for n in names], grad)

    def plain(query, key, value, layer):
        scores = (query @ key.mT * 32**-0.5 + layer(positions)).masked_fill(~positions.mask(), -torch.inf)
        return scores.softmax(-1).to(query.dtype) @ value

    actual = gradients(layer.to(DEVICE), lambda q, k, v, bias: fire_attention(q, k, v, bias), torch.bfloat16)
    rounded = gradients(layer.cpu(), plain, torch.bfloat16)
    exact = gradients(copy.deepcopy(layer).double(), plain, torch.float64)
    for name, found, limit, wanted in zip(names, actual, rounded, exact, strict=True):
        assert (found.cpu() - wanted).norm() <= (limit - wanted).norm(), name


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_decoding_in_low_precision(dtype):
    positions = FirePositions.arange(1, past=60)
    bias = random_bias(2, positions, dtype=torch.float32)
    query, key, value, grad = random_inputs(positions, head_dim=32, batch=2, dtype=dtype)
    expected, _ = dense_attention(query.double(), key.double(), value.double(), double(bias), positions, 0.2)
    plain, _ = low_precision_attention(query, key, value, bias, positions, 0.2)
    output = fused(query, key, value, grad, bias, positions, 0.2)[0]
    assert output.dtype == dtype
    assert (output - expected).abs().max() <= 2 * (plain - expected).abs().max()


def low_precision_attention(query, key, value, bias, positions, scaling):
    """The plain formula with products of low precision: scores and probabilities rounded, as PyTorch's layers do."""
    key, value = (tensor.repeat_interleave(query.shape[1] // key.shape[1], dim=1) for tensor in (key, value))
    scores = query @ key.transpose(-1, -2) * scaling + dense_bias(bias, positions)
    scores = torch.where(positions.mask(), scores, -torch.inf)
    return scores.softmax(-1).to(query.dtype) @ value, scores.logsumexp(-1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_repeats_bitwise(dtype):
    positions = POSITIONS["packed"]
    inputs = random_inputs(positions, dtype=dtype)
    bias = random_bias(2, positions, dtype=torch.float32)
    first, second = (fused(*inputs, bias, positions, 0.3) for _ in range(2))
    assert torch.equal(first[0], second[0]) and torch.equal(first[1], second[1])
    assert all(torch.equal(*pair) for pair in zip(first[2], second[2], strict=True))


def test_row_sums_do_not_depend_on_their_order(monkeypatch):
    """What is added to a row is a multiple of one power of two, and far from what float64 would round."""
    positions = FirePositions.arange(90)
    inputs = random_inputs(positions, heads=1, dtype=torch.bfloat16)
    kept, kernel = {}, triton_fire._key_gradient_kernel

    def keep(grid):
        def launch(*arguments, **constants):
            kept["excess"], kept["grid"] = arguments[8:10]
            kernel[grid](*arguments, **constants)

        return launch

    monkeypatch.setattr(triton_fire, "_key_gradient_kernel", mock.MagicMock(__getitem__=lambda self, grid: keep(grid)))
    fused(*inputs, random_bias(1, positions, dtype=torch.float32), positions, 0.3)
    excess, step = kept["excess"].cpu(), kept["grid"].cpu().double() * 2.0**-24 / 1.5
    assert (excess != 0).any() and torch.equal((excess / step).round() * step, excess)
    assert (excess.abs() < step * 2.0**40).all()


def test_flat_slopes_at_small_psi():
    """The gradient of a slope of 0 needs an accurate `x`, though scores do not."""
    positions = FirePositions.arange(20)
    bias = random_bias(2, positions, c=1e-3, L=1.0, width=0, dtype=torch.float32)
    assert (bias.slope == 0).all()
    check(positions, bias, tolerance=2e-6)


def test_without_gradients_of_the_bias():
    positions = FirePositions.arange(20)
    inputs = random_inputs(positions)
    bias = random_bias(2, positions, dtype=torch.float32)
    with_bias, without = (fused(*inputs, bias, positions, 0.3, bias_grad)[2] for bias_grad in (True, False))
    assert all(torch.equal(*pair) for pair in zip(without[:3], with_bias[:3], strict=True))
    for gradient, expected in zip(without[3:], with_bias[3:], strict=True):
        assert gradient.shape == expected.shape and (gradient == 0).all()


class NoValues(TorchDispatchMode):
    """Refuses operations that would wait for a GPU, to read a value from it."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if torch.Tag.data_dependent_output in func.tags or torch.Tag.dynamic_output_shape in func.tags:
            raise AssertionError(f"{func} waits for the device.")
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("positions", [FirePositions.arange(20), scattered(20), FirePositions.arange(1, past=20)])
def test_nothing_waits_for_the_device(positions, monkeypatch):
    """Around the kernels, which are left out: their interpreter reads values all the time."""
    for name in ("_plan_kernel", "_forward_kernel", "_decode_kernel", "_combine_kernel", "_delta_kernel"):
        monkeypatch.setattr(triton_fire, name, mock.MagicMock())
    for name in ("_query_gradient_kernel", "_key_gradient_kernel"):
        monkeypatch.setattr(triton_fire, name, mock.MagicMock())
    query, key, value, grad = random_inputs(positions, batch=2)
    bias = random_bias(2, positions, dtype=torch.float32)
    with NoValues():
        output, lse = triton_fire.forward(query, key, value, bias, positions, 0.3)
        triton_fire.backward(grad, query, key, value, output, lse, bias, positions, 0.3, True)
    with pytest.raises(AssertionError, match="waits"), NoValues():
        bool(lse.any())


@pytest.mark.parametrize("queries", [1, 2])
@pytest.mark.parametrize("splits", [1, 3])
def test_decoding(queries, splits, monkeypatch):
    """Sequences of different lengths in one cache, heads in groups, and as many parts as there may be."""
    monkeypatch.setattr(triton_fire, "num_splits", lambda *arguments: splits)
    last = torch.tensor([70, 4])[:, None] + 1 + torch.arange(queries)
    positions = FirePositions(last - 1, last - 1, torch.arange(75)[None], last * 0, last, consecutive=True)
    bias = random_bias(4, positions, dtype=torch.float32)
    check(positions, bias, heads=4, kv_heads=2, batch=2)
    check(positions, bias._replace(c=torch.tensor([0.1, 0.2, 0.3, 0.4])), heads=4, kv_heads=2, batch=2)
    window = positions._replace(first=(last - 20).clamp(min=0))
    check(window, bias._replace(transform="power", row_scale=0.3 * bias.row_scale), heads=4, kv_heads=2, batch=2)


@pytest.mark.parametrize("keys_per_query", [8, 100])
def test_requests_side_by_side(keys_per_query, monkeypatch):
    """Continuous batching: each query sees the keys of its own request, or it is one of several of a request."""
    monkeypatch.setattr(triton_fire, "KEYS_PER_QUERY", keys_per_query)
    starts, lengths = torch.tensor([[0, 30, 34, 51, 51, 60]]), torch.tensor([[30, 4, 17, 6, 9, 1]])
    query = starts + lengths - 1
    positions = FirePositions(lengths - 1, query, torch.arange(61)[None], starts, query + 1, consecutive=True)
    with mock.patch.object(triton_fire, "decode", wraps=triton_fire.decode) as decode:
        check(positions, heads=4, kv_heads=2)
    assert decode.called == (keys_per_query == 8)


def test_decoding_with_invisible_keys():
    whole = scattered(70)
    positions = whole._replace(absolute=whole.absolute[:, -2:], query=whole.query[:, -2:])
    check(positions._replace(first=whole.first[:, -2:], last=whole.last[:, -2:]), batch=2)


@settings(
    max_examples=15, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(calls(), st.integers(1, 40))
def test_anything(call, head_dim):
    bias = PiecewiseBias(*(x.float() if x.is_floating_point() else x for x in call.bias.tensors), call.bias.transform)
    sizes = {name: getattr(call, name) for name in ("heads", "kv_heads", "batch", "seed")}
    inputs = random_inputs(call.positions, **sizes, head_dim=head_dim)
    check(call.positions, bias, inputs=inputs, scaling=head_dim**-0.5)


def test_a_model_on_the_kernels(monkeypatch):
    """Loss and every gradient of a training step, and generation, are those of the plain formula."""
    monkeypatch.setenv("FIRE_BACKEND", "triton")
    ids, mask = random_ids(2, 20).to(DEVICE), torch.ones(2, 20, dtype=torch.long, device=DEVICE)
    mask[0, :5] = 0
    labels = ids.masked_fill(mask.cumsum(-1) <= 1, -100)  # not what follows padding
    results = []
    for name, dtype in (("eager", torch.float64), ("fire", torch.float32)):
        model = tiny_model(attn_implementation=name).to(DEVICE, dtype)
        loss = model(ids, attention_mask=mask, labels=labels).loss
        loss.backward()
        tokens = model.generate(ids, attention_mask=mask, max_new_tokens=4, do_sample=False)
        results.append((loss, tokens, {key: value.grad for key, value in model.named_parameters()}))
    (expected, tokens, gradients), (loss, found, actual) = results
    torch.testing.assert_close(loss.double(), expected.double(), rtol=1e-5, atol=1e-6)
    assert torch.equal(found, tokens)
    for key, value in gradients.items():
        if not key.endswith("mlp.2.bias"):  # rounding errors of 0
            assert (actual[key] - value).abs().max() <= 1e-4 * value.abs().max() + 1e-7, key


def test_compiles_for_gpus():
    """Without a GPU: no hot loop spills registers, nothing wants more shared memory than there is."""
    command = [sys.executable, "benchmarks/offline_compile.py", "--arch", "90", "--head_dim", "64", "--dtype", "bf16"]
    command += ["--form", "fire", "general", "--processes", "1"]
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = str(ROOT)
    result = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr
    assert {line.split()[2] for line in result.stdout.splitlines()[1:]} >= {"forward", "query", "key", "decode"}
