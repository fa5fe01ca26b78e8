"""What the Triton kernels round: low precision, repeats to the bit, sums of rows, and extreme values."""

import copy
from unittest import mock

import pytest
import torch
from reference import dense_attention, double, random_bias
from triton_checks import (
    DEVICE,
    POSITIONS,
    check,
    check_low_precision,
    fused,
    low_precision_attention,
    random_inputs,
    small_tiles,  # noqa: F401
    triton_fire,
)

from modeling_fire import FirePositionBias, fire_attention
from modeling_fire.positions_fire import FirePositions


@pytest.mark.parametrize("queries", [1, 20])
@pytest.mark.parametrize("poison", [torch.nan, torch.inf])
def test_what_is_no_number_stays_so(queries, poison):
    positions = FirePositions.arange(queries, past=20)
    query, key, value, grad = random_inputs(positions)
    key[:, :, 5] = poison
    output, lse, _ = fused(query, key, value, grad, random_bias(2, positions, dtype=torch.float32), positions, 0.3)
    assert output.isnan().all() and not lse.isfinite().any()


@pytest.mark.parametrize("c", [0.0, 1e-6, 30.0])
@pytest.mark.parametrize("L", [1e-3, 20.0, 1000.0])
def test_extremes_of_c_and_L(c, L):
    check(FirePositions.arange(33), c=c, L=L)


@pytest.mark.parametrize("queries", [1, 30])
@pytest.mark.parametrize("general", [False, True])
def test_coordinates_of_a_million(general, queries):
    positions = FirePositions.arange(queries, past=30 - queries)
    far = positions.query + 10**6
    positions = positions._replace(absolute=far, query=far)
    if general:
        positions = positions._replace(key=positions.key + 10**6, consecutive=False)
    check(positions)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision(dtype):
    positions = FirePositions.arange(40, past=20)
    inputs = random_inputs(positions, head_dim=32, dtype=dtype)
    check_low_precision(inputs, random_bias(2, positions, dtype=torch.float32), positions, 0.2)


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
