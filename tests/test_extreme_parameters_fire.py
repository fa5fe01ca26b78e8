"""Parameters of FIRE at the limits of its formula: the fused paths, end to end, against the formula in float64."""

import copy

import pytest
import torch

from modeling_fire import FirePositionBias, attention_fire, fire_attention
from modeling_fire.positions_fire import FirePositions


LENGTH = 35
# Hidden units whose weight is exactly 0: the sign of their bias says whether they are always or never active.
FLAT = {"mlp.0.weight": 0.0, "mlp.0.bias": torch.tensor([0.5, -0.5, 0.0])}
EXTREMES = {
    "c < 0": {"c": -0.3},
    "w1 = 0": FLAT,
    "L < 0": {"L_multiplier": -1.1},
    "L near 0": {"L_multiplier": 1e-2},
    "L all but 0": {"L_multiplier": 1e-6},
    "L = 0": {"L_multiplier": 0.0},
    "all of them": {**FLAT, "c": -0.3, "L_multiplier": 1e-6},
}
# Where L is 0, a query at position 0 divides by `eps` alone. It must see no key but its own: others would get scores
# of a million, which leave float32 no digits for a softmax.
CASES = [(name, True) for name in EXTREMES] + [(name, False) for name in ("c < 0", "w1 = 0", "L < 0", "L near 0")]


@pytest.fixture(params=["cpu", "triton"])
def backend(request, monkeypatch):
    """Each backend in turn: the type that it is compared in, its device, and how far off it may be."""
    monkeypatch.setenv("FIRE_BACKEND", request.param)
    monkeypatch.setattr(attention_fire, "sdpa_attention", None)  # nothing takes the general path
    if request.param == "cpu":
        return torch.float64, "cpu", 1e-12
    triton_fire = pytest.importorskip("modeling_fire.triton_fire", reason="Triton is not installed.")
    blocks = triton_fire.Blocks(16, 16, 4, 1)
    monkeypatch.setattr(triton_fire, "block_sizes_for", lambda *arguments: blocks)
    return torch.float32, "cuda" if torch.cuda.is_available() else "cpu", 1e-5


@pytest.mark.parametrize(("name", "causal"), CASES)
def test_values_and_every_gradient(name, causal, backend):
    torch.manual_seed(0)
    layer, positions = (
        FirePositionBias(4, 9, init_L=7.0, init_f="uniform"),
        FirePositions.arange(LENGTH, causal=causal),
    )
    with torch.no_grad():
        for parameter, value in EXTREMES[name].items():
            layer.get_parameter(parameter)[:3] = value
    dtype, device, tolerance = backend
    # Of query, key, value and the gradient of the output.
    tensors = [torch.randn(2, heads, LENGTH, 16, dtype=torch.float64).to(dtype) for heads in (4, 2, 2, 4)]

    def formula(query, key, value, bias):
        key, value = key.repeat_interleave(2, dim=1), value.repeat_interleave(2, dim=1)
        scores = (query @ key.mT * 16**-0.5 + bias(positions)).masked_fill(~positions.mask(), -torch.inf)
        return scores.softmax(-1) @ value

    def results(attend, device, dtype):
        *inputs, grad = (tensor.to(device, dtype).requires_grad_() for tensor in tensors)
        bias = copy.deepcopy(layer).to(device, dtype)
        output = attend(*inputs, bias)
        return [output, *torch.autograd.grad(output, [*inputs, *bias.parameters()], grad)]

    expected = results(formula, "cpu", torch.float64)
    actual = results(lambda *arguments: fire_attention(*arguments, causal=causal), device, dtype)
    names = ["output", "query", "key", "value", *dict(layer.named_parameters())]
    for key, found, wanted in zip(names, actual, expected, strict=True):
        error = (found.cpu().double() - wanted).abs().max() / wanted.abs().max().clamp(min=1)
        assert error <= tolerance, f"{key}: {error:.1e}"
