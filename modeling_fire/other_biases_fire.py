"""The position biases that FIRE is compared with: ALiBi, KERPLE, T5's and Sandwich."""

import math

import torch
from torch import nn
from transformers import initialization as init

from .base_bias_fire import PositionBias
from .linear_fire import parameter_dtype
from .piecewise_fire import PiecewiseBias, psi
from .positions_fire import FirePositions


def alibi_slopes(num_heads: int, device: torch.device | None = None) -> torch.Tensor:
    """
    The slopes of ALiBi (Press et al., arXiv 2108.12409), of shape `(num_heads,)`: `2 ** (-8 h / H)` for a power of
    two, else those of the power of two below, then every other one of the power of two above.
    """
    power = 2 ** math.floor(math.log2(num_heads))
    # There, so that no copy from the host holds a forward up.
    heads = torch.arange(num_heads, dtype=torch.float32, device=device)
    exponents = torch.where(heads < power, 8 * (heads + 1), 4 * (2 * (heads - power) + 1)) / power
    return torch.exp2(-exponents)


def t5_bucket(distance: torch.Tensor, num_buckets: int = 32, max_distance: int = 128) -> torch.Tensor:
    """
    The causal buckets of T5 (Raffel et al., arXiv 1910.10683): the first half are exact distances, the second half
    spread logarithmically up to `max_distance`, beyond which everything shares the last one.
    """
    exact = num_buckets // 2
    logarithmic = torch.log(distance.clamp(min=exact).float() / exact) / math.log(max_distance / exact)
    logarithmic = exact + (logarithmic * (num_buckets - exact)).long()
    return torch.where(distance < exact, distance, logarithmic.clamp(max=num_buckets - 1))


class AlibiPositionBias(PositionBias):
    """ALiBi (arXiv 2108.12409): `-m_h d`, without parameters."""

    def __init__(self, num_heads: int):
        super().__init__()
        self.num_heads = num_heads

    def compute(self, positions: FirePositions, dtype: torch.dtype) -> torch.Tensor:
        slopes = alibi_slopes(self.num_heads, positions.query.device).to(dtype)
        return -positions.distance().to(dtype)[..., None] * slopes

    def pieces(self, positions: FirePositions, dtype: torch.dtype, backend: str) -> PiecewiseBias:
        slopes = alibi_slopes(self.num_heads, positions.query.device).to(dtype)
        return PiecewiseBias.straight(-slopes, "identity", positions.query)


def clamp_value(parameter: torch.Tensor, low: float, high: float | None = None) -> torch.Tensor:
    """`clamp` that lets the gradient pass, so that a parameter that has left its range can come back."""
    return parameter + (parameter.clamp(low, high) - parameter).detach()


class KerplePositionBias(PositionBias):
    """
    KERPLE (Chi et al., arXiv 2205.09921): `-r1_h log(1 + r2_h d)`, or `-r1_h d ** r2_h` with `0 < r2 <= 2`.

    Args:
        num_heads (`int`): number of attention heads.
        variant (`str`): `"log"` or `"power"`.
    """

    def __init__(self, num_heads: int, variant: str):
        super().__init__()
        if variant not in ("log", "power"):
            raise ValueError(f"`variant` must be 'log' or 'power', got {variant!r}.")
        self.variant = variant
        self.r1 = nn.Parameter(torch.empty(num_heads, dtype=parameter_dtype()))
        self.r2 = nn.Parameter(torch.empty(num_heads, dtype=parameter_dtype()))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        init.uniform_(self.r1, 0.0, 2.0)
        init.uniform_(self.r2, 0.0, 1.0)

    def compute(self, positions: FirePositions, dtype: torch.dtype) -> torch.Tensor:
        r1, r2 = self.clamped(dtype)
        return -r1 * psi(positions.distance().to(dtype)[..., None], r2, self.variant)

    def pieces(self, positions: FirePositions, dtype: torch.dtype, backend: str) -> PiecewiseBias:
        r1, r2 = self.clamped(dtype)
        return PiecewiseBias.straight(-r1, self.variant, positions.query, r2)

    def clamped(self, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
        """`r1` and `r2` within their ranges."""
        r1 = clamp_value(self.r1.to(dtype), 0.01)
        return r1, clamp_value(self.r2.to(dtype), 0.01, None if self.variant == "log" else 2.0)


class T5PositionBias(PositionBias):
    """
    T5's relative bias (arXiv 1910.10683): a learned table over 32 causal buckets of distance.

    Args:
        num_heads (`int`): number of attention heads.
    """

    def __init__(self, num_heads: int):
        super().__init__()
        self.table = nn.Parameter(torch.empty(32, num_heads, dtype=parameter_dtype()))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        init.normal_(self.table, std=0.02)

    def compute(self, positions: FirePositions, dtype: torch.dtype) -> torch.Tensor:
        return nn.functional.embedding(t5_bucket(positions.distance()), self.table.to(dtype))


class SandwichPositionBias(PositionBias):
    """
    Sandwich (Chi et al., arXiv 2212.10356): the inner product of two sinusoidal position embeddings of width 128,
    `(sum_k cos(d / 10000 ** (k / 64)) - 64) / (8 h / H)` over `k = 1 ... 64`, without parameters.
    """

    half_width = 64

    def __init__(self, num_heads: int):
        super().__init__()
        self.num_heads = num_heads

    def compute(self, positions: FirePositions, dtype: torch.dtype) -> torch.Tensor:
        distance = positions.distance().to(dtype)
        total = torch.full_like(distance, -self.half_width)
        for k in range(1, self.half_width + 1):  # one frequency at a time: all at once would take 64 times the memory
            total += torch.cos(distance * 10000 ** (-k / self.half_width))
        heads = torch.arange(1, self.num_heads + 1, device=distance.device, dtype=dtype)
        return total[..., None] * (self.num_heads / (8 * heads))
