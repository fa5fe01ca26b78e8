"""The plain formula of attention with a piecewise-linear bias, which fused paths are compared with; and comparison."""

import torch

from modeling_fire.piecewise_fire import PiecewiseBias, psi, relu_pieces
from modeling_fire.positions_fire import FirePositions


EPS = torch.finfo(torch.float32).eps


def dense_bias(bias: PiecewiseBias, positions: FirePositions) -> torch.Tensor:
    """The bias of every pair, `(batch or 1, heads, queries, keys)`. Distances are `|i - j|`."""
    distance = (positions.query[:, :, None] - positions.key[:, None, :]).abs().to(bias.slope.dtype)[..., None]
    x = psi(distance, bias.c, bias.transform) * bias.row_scale[:, :, None, None]
    # With one `c` for all heads the last dimension is 1, else one for each head.
    heads = torch.arange(bias.slope.shape[0])
    segments = torch.bucketize(x.detach().contiguous(), bias.knots)
    return (bias.slope[heads, segments] * x + bias.offset[heads, segments]).movedim(-1, 1)


def dense_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    bias: PiecewiseBias,
    positions: FirePositions,
    scaling: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """
    Output `(batch, heads, queries, head_dim)` and log-sum-exp `(batch, heads, queries)`, differentiable by autograd.
    A query that sees nothing gets an output of 0 and a log-sum-exp of minus infinity.
    """
    groups = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(groups, dim=1), value.repeat_interleave(groups, dim=1)
    scores = query @ key.transpose(-1, -2) * scaling + dense_bias(bias, positions)
    seen = positions.mask().expand_as(scores)
    scores = torch.where(seen, scores, -torch.inf)
    blind = ~seen.any(-1)
    probabilities = torch.where(blind[..., None], 0.0, scores).softmax(-1).masked_fill(blind[..., None], 0.0)
    return probabilities @ value, scores.logsumexp(-1)


def double(bias: PiecewiseBias) -> PiecewiseBias:
    """The same bias in float64, detached; what takes gradients asks for them."""
    wide = [field.detach().double() if torch.is_floating_point(field) else field for field in bias.tensors]
    wide = PiecewiseBias(*wide, bias.transform)
    for field in (wide.slope, wide.offset, wide.c, wide.row_scale):
        field.requires_grad_()
    return wide


def random_bias(
    heads: int,
    positions: FirePositions,
    *,
    L: float = 37.0,
    c: float = 0.3,
    width: int = 32,
    slope: float = 8.0,
    transform: str = "log",
    dtype: torch.dtype = torch.float64,
    seed: int = 0,
) -> PiecewiseBias:
    """A FIRE bias with steep pieces, half of its knots where the inputs are."""
    generator = torch.Generator().manual_seed(seed)
    weight_in = torch.randn(width, 1, generator=generator, dtype=torch.float64)
    bias_in = -weight_in[:, 0] * (2 * torch.rand(width, generator=generator, dtype=torch.float64) - 0.5)
    weight_out = torch.randn(heads, width, generator=generator, dtype=torch.float64) * slope / max(width, 1) ** 0.5
    bias_out = torch.randn(heads, generator=generator, dtype=torch.float64)
    absolute = positions.absolute.double()
    c_ = torch.tensor([c], dtype=torch.float64)
    scale = 1 / (psi(absolute.clamp(min=L), c_, transform) + 1e-6)
    pieces = relu_pieces(weight_in, bias_in, weight_out, bias_out)
    bias = PiecewiseBias(*pieces, c_, scale, absolute < L, transform)
    return PiecewiseBias(*[f.to(dtype) if torch.is_floating_point(f) else f for f in bias.tensors], transform)


def causal(positions: FirePositions) -> torch.Tensor:
    return (positions.query[:, :, None] >= positions.key[:, None, :])[:, None]


def index(*values: int) -> torch.Tensor:
    return torch.tensor([values])


def assert_close(actual, expected, ulps: float, where=True):
    """Equality within `ulps` float32 roundings of the largest expected value, of the entries that `where` selects."""
    actual, expected = (torch.where(torch.as_tensor(where), x.detach().double(), 0.0) for x in (actual, expected))
    torch.testing.assert_close(actual, expected, rtol=0.0, atol=ulps * EPS * float(expected.abs().max()))
