"""What the tests of the Triton kernels share: inputs, small tiles, comparison with the plain formula in float64."""

from typing import NamedTuple

import pytest
import torch
from layouts import padded, scattered
from reference import dense_attention, dense_bias, double, random_bias

from modeling_fire.piecewise_fire import psi, psi_slope_in_c
from modeling_fire.positions_fire import FirePositions


pytest.importorskip("triton", reason="Triton is not installed.")
triton_fire = pytest.importorskip("modeling_fire.triton_fire")

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
NAMES = ("query", "key", "value", "slope", "offset", "c", "row_scale")


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch):
    """Tiles of 16 rows and columns, so that short sequences are made of many."""
    blocks = triton_fire.Blocks(16, 16, 1, 1)
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
            size = expected.sizes[name].detach().abs().max().clamp(min=1e-3)
            found[name] = float((actual.double() - wide).detach().abs().max() / size)
    return found


def low_precision_attention(query, key, value, bias, positions, scaling):
    """The plain formula with products of low precision: scores and probabilities rounded, as PyTorch's layers do."""
    key, value = (tensor.repeat_interleave(query.shape[1] // key.shape[1], dim=1) for tensor in (key, value))
    scores = query @ key.transpose(-1, -2) * scaling + dense_bias(bias, positions)
    scores = torch.where(positions.mask(), scores, -torch.inf)
    blind = ~positions.mask().any(-1, keepdim=True)
    probabilities = scores.masked_fill(blind, 0.0).softmax(-1).masked_fill(blind, 0.0)
    return probabilities.to(query.dtype) @ value, scores.logsumexp(-1)


def check_low_precision(inputs, bias, positions, scaling):
    """
    Each error is at most twice that of the plain formula in the same precision (the bias in float32), and those of the
    gradients of the bias are of another order: the rounding of the output does not come in. On a GPU there is room:
    the interpreter cuts bfloat16 off instead of rounding it, which doubles an error.
    """
    dtype, expected = inputs[0].dtype, reference(*inputs, bias, positions, scaling)
    wanted = [tensor.detach().requires_grad_() for tensor in inputs[:3]]
    output, _ = low_precision_attention(*wanted, bias, positions, scaling)
    plain = output.detach(), *torch.autograd.grad(output, wanted, inputs[3])

    output, lse, gradients = fused(*inputs, bias, positions, scaling)
    assert output.dtype == dtype and lse.dtype == torch.float32
    assert [gradient.dtype for gradient in gradients] == [dtype] * 3 + [torch.float32] * 4
    exact = expected.output, *expected.gradients[:3]
    for name, found, rounded, right in zip(("output", *NAMES), (output, *gradients), plain, exact, strict=False):
        allowed = 2 * (rounded.double() - right).norm() + torch.finfo(dtype).tiny
        assert (found.double() - right).norm() <= allowed, name
    found = errors(output, lse, gradients, expected, bias)
    assert max(found[name] for name in ("lse", *NAMES[3:])) < 1e-5, found


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
