"""What the tests of the CPU path share: inputs, sizes of chunks, comparison with the plain formula in float64."""

import torch
from layouts import padded, scattered, side_by_side
from reference import dense_attention, double

from modeling_fire import cpu_fire
from modeling_fire.piecewise_fire import PiecewiseBias
from modeling_fire.positions_fire import FirePositions


SCALING = 0.3
NAMES = ("output", "lse", "query", "key", "value", "slope", "offset", "c", "row_scale")


def set_sizes(monkeypatch, rows: int, max_scores: int = 2**20) -> None:
    monkeypatch.setattr(cpu_fire, "ROWS", rows)
    monkeypatch.setattr(cpu_fire, "MAX_SCORES", max_scores)


def cast(bias: PiecewiseBias, dtype: torch.dtype) -> PiecewiseBias:
    fields = (field.detach().to(dtype) if field.is_floating_point() else field for field in bias.tensors)
    return PiecewiseBias(*fields, bias.transform)


def inputs(positions: FirePositions, *, heads=4, kv_heads=None, batch=2, head_dim=16, seed=1) -> list[torch.Tensor]:
    """Query, key, value and the gradient of the output, in float64 and in the layout of transformers."""
    generator = torch.Generator().manual_seed(seed)
    queries, keys = positions.query.shape[1], positions.key.shape[1]
    shapes = [(queries, heads), (keys, kv_heads or heads), (keys, kv_heads or heads), (queries, heads)]
    return [
        torch.randn(batch, *shape, head_dim, generator=generator, dtype=torch.float64).transpose(1, 2)
        for shape in shapes
    ]


def plain(tensors: list[torch.Tensor], bias: PiecewiseBias, positions: FirePositions) -> list[torch.Tensor]:
    """Everything in `NAMES`, by autograd."""
    *qkv, grad_output = (tensor.detach().requires_grad_() for tensor in tensors)
    bias = double(bias)
    output, lse = dense_attention(*qkv, bias, positions, SCALING)
    leaves = [*qkv, bias.slope, bias.offset, bias.c, bias.row_scale]
    grads = torch.autograd.grad(output, leaves, grad_output, materialize_grads=True)
    return [output.detach(), lse.detach(), *grads]


def fused(tensors: list[torch.Tensor], bias: PiecewiseBias, positions: FirePositions) -> list[torch.Tensor]:
    *qkv, grad_output = tensors
    output, lse = cpu_fire.forward(*qkv, bias, positions, SCALING)
    grads = cpu_fire.backward(grad_output, *qkv, output, lse, bias, positions, SCALING, True)
    return [output, lse, *grads]


def merge_shared(grad: torch.Tensor, shared: torch.Tensor) -> torch.Tensor:
    """Gradient of `row_scale` with those of shared rows, of which only the sum has a meaning, added up."""
    shared = shared.expand_as(grad) if len(shared) <= len(grad) else shared.any(0, keepdim=True)
    return torch.cat([grad[~shared], (grad * shared).sum()[None]])


def check(
    positions: FirePositions, bias: PiecewiseBias, dtype=torch.float64, tolerance: float | None = None, **kwargs
) -> None:
    """Compares everything in `NAMES`, relative to the largest entry."""
    tolerance = tolerance or (1e-12 if dtype == torch.float64 else 2e-5)
    tensors = [tensor.to(dtype) for tensor in inputs(positions, **kwargs)]
    bias = cast(bias, torch.promote_types(dtype, torch.float32))
    expected = plain([tensor.double() for tensor in tensors], bias, positions)
    actual = fused(tensors, bias, positions)
    for name, left, right in zip(NAMES, actual, expected, strict=True):
        assert left.shape == right.shape, name
        assert left.dtype == (dtype if name in NAMES[:1] + NAMES[2:5] else bias.slope.dtype), name
        if name == "row_scale":
            left, right = (merge_shared(grad, bias.shared) for grad in (left, right))
        finite = right.isfinite()
        assert torch.equal(left.isfinite(), finite), name
        error = (left.double() - right)[finite].abs().max() if finite.any() else torch.tensor(0.0)
        scale = right[finite].abs().max().clamp(min=1) if finite.any() else 1.0
        assert error <= tolerance * scale, f"{name}: {error / scale:.1e}"


def static_cache(queries: int, filled: int, capacity: int) -> FirePositions:
    positions = FirePositions.arange(queries, past=filled - queries)
    return positions._replace(key=torch.arange(capacity)[None])


LAYOUTS = {
    "causal": FirePositions.arange(83),
    "one token": FirePositions.arange(1),
    "continued": FirePositions.arange(30, past=53),
    "decoding": FirePositions.arange(1, past=70),
    "decoding before L": FirePositions.arange(1, past=20),
    "few tokens": FirePositions.arange(3, past=70),
    "window": FirePositions.arange(83, window=20),
    "window unclamped": FirePositions.arange(83)._replace(first=torch.arange(83)[None] - 19),
    "both ways": FirePositions.arange(61, causal=False),
    "window both ways": FirePositions.arange(61, causal=False, window=9),
    "packed": FirePositions.packed(torch.tensor([0, 1, 2, 40, 41, 83]), 83),
    "padded": padded([0, 13], 61),
    "all padded": padded([61, 7], 61),
    "continuous batching": side_by_side([(40, 1), (0, 17), (10, 1), (3, 9), (45, 1)]),
    "static cache": static_cache(7, 60, 90),
    "scattered": scattered(61),
}
