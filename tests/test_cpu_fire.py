"""The CPU path against the plain formula: values and every gradient."""

import copy

import pytest
import torch
from cpu_checks import LAYOUTS, NAMES, SCALING, cast, check, fused, inputs, merge_shared, plain, set_sizes
from hypothesis import given, settings
from hypothesis import strategies as st
from layouts import calls, padded
from reference import dense_bias, random_bias
from torch.utils._python_dispatch import TorchDispatchMode

from modeling_fire import cpu_fire
from modeling_fire.attention_fire import fire_attention
from modeling_fire.other_biases_fire import KerplePositionBias
from modeling_fire.piecewise_fire import PiecewiseBias
from modeling_fire.position_bias_fire import FirePositionBias
from modeling_fire.positions_fire import FirePositions


@pytest.fixture(params=[(192, 2**20), (16, 2**8), (5, 1)], ids=["default", "chunks", "odd"])
def sizes(request, monkeypatch):
    """The sizes of chunks and blocks."""
    set_sizes(monkeypatch, *request.param)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("kv_heads", [4, 2, 1])
def test_layouts(layout, kv_heads, sizes):
    positions = LAYOUTS[layout]
    check(positions, random_bias(4, positions), kv_heads=kv_heads)


@pytest.mark.parametrize("layout", ["causal", "decoding", "scattered"])
@pytest.mark.parametrize("head_dim", [32, 80, 128, 256])
def test_head_dims(layout, head_dim):
    positions = LAYOUTS[layout]
    check(positions, random_bias(4, positions), kv_heads=2, head_dim=head_dim)


@pytest.mark.parametrize("transform", ["log", "power", "identity"])
@pytest.mark.parametrize("L", [0.3, 1.0, 37.0, 50.5, 1000.0])
def test_transforms_and_thresholds(transform, L, sizes):
    positions = FirePositions.arange(150)
    check(positions, random_bias(3, positions, L=L, transform=transform), heads=3)


@pytest.mark.parametrize("layout", ["causal", "few tokens", "window", "padded", "both ways", "scattered"])
def test_float32(layout, sizes):
    positions = LAYOUTS[layout]
    check(positions, random_bias(4, positions, slope=2.0), dtype=torch.float32, kv_heads=2)


def test_several_chunks_of_the_default_size():
    positions = FirePositions.arange(403)
    check(positions, random_bias(2, positions, L=200), heads=2, batch=1)


def test_batch_of_equal_rows():
    """One chunk serves a row of all items, but each has its gradient."""
    positions = FirePositions.arange(2)
    positions = positions._replace(absolute=positions.absolute.repeat(2, 1))
    check(positions, random_bias(1, positions, L=0.5), heads=1)


def test_batch_of_different_rows():
    positions = padded([0, 13, 5], 61)
    per_item = random_bias(4, positions)
    assert per_item.row_scale.shape[0] == 3
    check(positions, per_item, batch=3)
    same = padded([9, 9], 61)
    check(same, random_bias(4, same))
    check(same, random_bias(4, padded([9], 61)))
    many_scales = random_bias(4, positions)._replace(shared=torch.zeros(1, 61, dtype=torch.bool))
    check(positions._replace(first=positions.first[:1], absolute=positions.absolute[:1]), many_scales, batch=3)


@pytest.mark.parametrize("layout", ["causal", "decoding", "both ways", "scattered"])
def test_kinds_of_knots(layout, sizes):
    positions = LAYOUTS[layout]
    bias = random_bias(4, positions, width=8)
    knots = bias.knots.clone()
    knots[:2], knots[-2:] = -torch.inf, torch.inf
    check(positions, bias._replace(knots=knots))
    # Two units that switch in one place.
    twice = bias.knots.repeat_interleave(2)
    values = torch.arange(9).repeat_interleave(2)[:-1]
    check(positions, bias._replace(knots=twice, slope=bias.slope[:, values], offset=bias.offset[:, values]))
    check(positions, bias._replace(knots=knots[:0], slope=bias.slope[:, :1], offset=bias.offset[:, :1]))


@pytest.mark.parametrize("layout", ["causal", "one token", "decoding", "both ways", "scattered"])
def test_c_of_each_head(layout, sizes):
    positions = LAYOUTS[layout]
    kerple = KerplePositionBias(4, "log").double()(positions, backend="cpu")
    check(positions, kerple)
    own = kerple._replace(row_scale=random_bias(4, positions).row_scale, shared=torch.zeros_like(kerple.shared))
    check(positions, own)
    check(positions, random_bias(4, positions)._replace(c=torch.tensor([0.1, 0.3, 0.5, 2.0]).double()))


def test_knots_at_integer_distances():
    positions = FirePositions.arange(70)
    bias = FirePositionBias.from_t5(torch.randn(8, 2), 64, 32).double()(positions, backend="cpu")
    check(positions, bias, heads=2)


@pytest.mark.parametrize("transform", ["log", "power"])
def test_c_of_zero(transform, sizes):
    positions = FirePositions.arange(50)
    bias = random_bias(4, positions, c=0.0, transform=transform)
    check(positions, bias._replace(row_scale=torch.where(bias.shared, 1.0, bias.row_scale.clamp(max=2.0))))


def test_coordinates_of_a_million():
    index, far = torch.arange(40)[None], 1_000_000
    positions = FirePositions(index + far, index + far, index + far, torch.zeros_like(index), index + 1)
    check(positions, random_bias(4, positions, L=far + 20), dtype=torch.float32)
    # As one of many requests that share a cache.
    window = FirePositions.arange(40, past=100)
    shifted = window._replace(absolute=window.absolute + far)
    check(shifted, random_bias(4, shifted, L=far), dtype=torch.float32)


@pytest.mark.parametrize("layout", ["causal", "padded", "decoding", "scattered"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision(layout, dtype):
    """Errors, those of all gradients too, are at most twice those of PyTorch's dense attention in the same type."""
    positions = LAYOUTS[layout]
    bias = cast(random_bias(4, positions, slope=2.0), torch.float32)
    tensors = [tensor.to(dtype) for tensor in inputs(positions)]
    expected = plain([tensor.double() for tensor in tensors], bias, positions)

    *qkv, grad_output = (tensor.clone().requires_grad_() for tensor in tensors)
    fields = [field.clone().requires_grad_() for field in (bias.slope, bias.offset, bias.c, bias.row_scale)]
    differentiable = bias._replace(**dict(zip(NAMES[5:], fields, strict=True)))
    scores = qkv[0] @ qkv[1].mT * SCALING + dense_bias(differentiable, positions)
    seen = positions.mask()
    probabilities = scores.masked_fill(~seen, -torch.inf).softmax(-1).masked_fill(~seen, 0.0)
    output = probabilities.to(dtype) @ qkv[2]
    dense = [output, None, *torch.autograd.grad(output, [*qkv, *fields], grad_output)]

    actual = fused(tensors, bias, positions)
    for i in (0, 2, 3, 4, 5, 6, 7, 8):
        assert actual[i].dtype == (dtype if i < 5 else torch.float32)
        of_dense, of_actual, exact = dense[i].double(), actual[i].double(), expected[i]
        if NAMES[i] == "row_scale":
            of_dense, of_actual, exact = (merge_shared(x, bias.shared) for x in (of_dense, of_actual, exact))
        allowed = 2 * (of_dense - exact).norm() + torch.finfo(dtype).tiny
        assert (of_actual - exact).norm() <= allowed, NAMES[i]


@pytest.mark.parametrize("length", [40.0, 4000.0])
@pytest.mark.parametrize("init_f", ["decay", "uniform"])
def test_low_precision_of_the_parameters(length, init_f):
    """The same of what the parameters of FIRE get, as long as sequences of training are."""
    torch.manual_seed(0)
    layer, positions = FirePositionBias(4, init_L=length, init_f=init_f, train_length=256), FirePositions.arange(256)
    parameters = {name: p for name, p in layer.named_parameters() if name != "mlp.2.bias"}
    tensors = [tensor.bfloat16() for tensor in inputs(positions, batch=1, head_dim=64)]

    def gradients(attend, module, dtype):
        *qkv, grad_output = (tensor.to(dtype) for tensor in tensors)
        wanted = [p for name, p in module.named_parameters() if name in parameters]
        return torch.autograd.grad(attend(*qkv, module), wanted, grad_output)

    def dense(query, key, value, module):
        scores = (query @ key.mT * 64**-0.5 + module(positions)).masked_fill(~positions.mask(), -torch.inf)
        return scores.softmax(-1).to(query.dtype) @ value

    exact = gradients(dense, copy.deepcopy(layer).double(), torch.float64)
    plain = gradients(dense, layer, torch.bfloat16)
    actual = gradients(fire_attention, layer, torch.bfloat16)
    for name, found, low, right in zip(parameters, actual, plain, exact, strict=True):
        assert (found - right).norm() <= 2 * (low - right).norm(), name


def test_what_no_query_sees_does_not_matter(sizes):
    for layout in ("static cache", "padded"):
        positions = LAYOUTS[layout]
        tensors, bias = inputs(positions), random_bias(4, positions)
        expected = fused(tensors, bias, positions)
        seen = positions.mask().any(2)[:, 0]
        for tensor in tensors[1:3]:
            tensor.masked_fill_(~seen[:, None, :, None], torch.nan)
        for name, left, right in zip(NAMES, fused(tensors, bias, positions), expected, strict=True):
            assert torch.equal(left, right), name


def test_blind_queries():
    positions = padded([61, 7], 61)
    output, lse, grad_query, *_ = fused(inputs(positions), random_bias(4, positions), positions)
    assert output[0].eq(0).all()
    assert lse[0].eq(-torch.inf).all()
    assert grad_query[0].eq(0).all()
    assert output[1, :, :7].eq(0).all()


def test_without_gradient_of_the_bias():
    positions = LAYOUTS["causal"]
    tensors, bias = inputs(positions), random_bias(4, positions)
    *qkv, grad_output = tensors
    output, lse = cpu_fire.forward(*qkv, bias, positions, SCALING)
    grads = cpu_fire.backward(grad_output, *qkv, output, lse, bias, positions, SCALING, False)
    for left, right in zip(grads[:3], fused(tensors, bias, positions)[2:5], strict=True):
        assert torch.equal(left, right)
    for grad, field in zip(grads[3:], (bias.slope, bias.offset, bias.c, bias.row_scale), strict=True):
        assert torch.equal(grad, torch.zeros_like(field))


@pytest.mark.parametrize("layout", ["causal", "scattered"])
def test_deterministic(layout):
    positions = LAYOUTS[layout]
    tensors = [tensor.float() for tensor in inputs(positions)]
    bias = cast(random_bias(4, positions), torch.float32)
    for left, right in zip(fused(tensors, bias, positions), fused(tensors, bias, positions), strict=True):
        assert torch.equal(left, right)


class NoSubnormals(TorchDispatchMode):
    """Refuses products whose factors hold numbers below the smallest normal one."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func in (torch.ops.aten.bmm.out, torch.ops.aten.bmm.default, torch.ops.aten.baddbmm_.default):
            for factor in args[-2:]:
                assert not ((factor != 0) & (factor.abs() < torch.finfo(factor.dtype).tiny)).any(), func
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_weights_that_all_but_vanish(dtype):
    """A bias that falls through the range of the type: exact all the same, and no numbers that slow a CPU down."""
    positions = FirePositions.arange(200)
    bias = PiecewiseBias.straight(torch.tensor([-1.0, -30.0], dtype=dtype), "identity", positions.query)
    check(positions, bias, dtype, heads=2)
    tensors = [tensor.to(dtype) for tensor in inputs(positions, heads=2)]
    with NoSubnormals():
        fused(tensors, bias, positions)


@pytest.mark.parametrize("size", [1e-30, 1e30])
def test_values_of_any_size(size):
    positions = FirePositions.arange(70)
    tensors, bias = inputs(positions), cast(random_bias(4, positions), torch.float32)
    query, key, value, _ = (tensor.float() for tensor in tensors)
    expected, _ = cpu_fire.forward(query, key, value, bias, positions, SCALING)
    actual, _ = cpu_fire.forward(query, key, value * size, bias, positions, SCALING)
    torch.testing.assert_close(actual / size, expected, rtol=1e-4, atol=1e-6)


@settings(max_examples=300, deadline=None, derandomize=True)
@given(calls(), st.integers(1, 50), st.sampled_from([1, 500, 2**20]))
def test_anything(call, rows, max_scores):
    positions, bias, *sizes = call
    with pytest.MonkeyPatch.context() as monkeypatch:
        set_sizes(monkeypatch, rows, max_scores)
        check(positions, bias, **dict(zip(call._fields[2:], sizes, strict=True)), head_dim=8, tolerance=1e-11)
