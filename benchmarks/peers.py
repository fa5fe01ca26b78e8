"""
Ways to compute causal attention with FIRE, and what it is compared with.

Each takes `query`, `key`, `value` of shape `(batch, heads, length, head_dim)` and a `FirePositionBias`, and returns
the output. All but those without a bias return the same.
"""

from collections.abc import Callable
from functools import cache

import torch
from torch import nn
from torch.nn.attention.flex_attention import create_block_mask, flex_attention

from modeling_fire import FirePositionBias, FirePositions, fire_attention
from modeling_fire.attention_fire import piecewise_bias
from modeling_fire.operator_fire import backend_name, fused_attention


def fire(query, key, value, bias: FirePositionBias) -> torch.Tensor:
    """The fused path."""
    return fire_attention(query, key, value, bias)


def fire_without_bias(query, key, value, bias) -> torch.Tensor:
    """The fused path with a bias of nought."""
    positions = FirePositions.arange(query.shape[2], query.device)
    pieces = piecewise_bias(None, None, positions, query, backend_name(query))
    return fused_attention(query, key, value, pieces, positions, query.shape[-1] ** -0.5)


def sdpa(query, key, value, bias) -> torch.Tensor:
    """PyTorch's causal attention without a bias: the limit."""
    return nn.functional.scaled_dot_product_attention(query, key, value, is_causal=True)


def rope_sdpa(query, key, value, bias) -> torch.Tensor:
    """Rotary embeddings, then PyTorch's causal attention."""
    length, head_dim = query.shape[2:]
    frequencies = 10000 ** -(torch.arange(0, head_dim, 2, device=query.device) / head_dim)
    angles = torch.arange(length, device=query.device)[:, None] * frequencies.repeat(2)
    cos, sin = angles.cos().to(query.dtype), angles.sin().to(query.dtype)

    def rotate(x: torch.Tensor) -> torch.Tensor:
        first, second = x.chunk(2, dim=-1)
        return x * cos + torch.cat((-second, first), dim=-1) * sin

    return sdpa(rotate(query), rotate(key), value, bias)


def listing_bias(length: int, bias: FirePositionBias) -> torch.Tensor:
    """The bias as public code computes it, the whole square at once: `(heads, length, length)`."""
    index = torch.arange(length, device=bias.c.device)
    distance = (index[:, None] - index).clamp(min=0).float()
    threshold = (bias.L_multiplier * bias.init_L).abs()
    normalizer = torch.log1p(bias.c.abs() * torch.maximum(index.float(), threshold))[:, None] + bias.eps
    return bias.mlp((torch.log1p(bias.c.abs() * distance) / normalizer)[..., None]).permute(2, 0, 1)


def listing(query, key, value, bias: FirePositionBias) -> torch.Tensor:
    """The plain formula: scores, bias, mask, softmax."""
    length = query.shape[2]
    scores = query @ key.transpose(-1, -2) * query.shape[-1] ** -0.5 + listing_bias(length, bias)
    hidden = torch.ones(length, length, dtype=torch.bool, device=query.device).triu(1)
    return scores.masked_fill(hidden, -torch.inf).softmax(-1).to(query.dtype) @ value


def sdpa_dense(query, key, value, bias: FirePositionBias) -> torch.Tensor:
    """PyTorch's attention with the dense bias as its mask."""
    length = query.shape[2]
    hidden = torch.ones(length, length, dtype=torch.bool, device=query.device).triu(1)
    mask = listing_bias(length, bias).masked_fill(hidden, -torch.inf)
    return nn.functional.scaled_dot_product_attention(query, key, value, attn_mask=mask.to(query.dtype)[None])


compiled_flex = torch.compile(flex_attention, dynamic=False)


@cache
def causal_blocks(length: int, device: torch.device):
    return create_block_mask(lambda b, h, q, k: q >= k, None, None, length, length, device=device)


def add_from_table(pieces) -> Callable:
    """The bias by distance: where no row is past L."""
    distance = torch.arange(pieces.row_scale.shape[1], device=pieces.c.device)
    x = torch.log1p(pieces.c * distance) * pieces.row_scale[0, 0]
    segments = torch.bucketize(x, pieces.knots)
    bias = pieces.slope[:, segments] * x + pieces.offset[:, segments]

    def add(score, b, head, i, j):
        return score + bias[head, (i - j).clamp(min=0)]

    return add


def add_hinges(pieces, reached: slice) -> Callable:
    """psi by distance, and one hinge for each knot that some distance reaches: its argument is at most 1."""
    psi = torch.log1p(pieces.c * torch.arange(pieces.row_scale.shape[1], device=pieces.c.device))
    scale, knots, steps = pieces.row_scale[0], pieces.knots[reached], pieces.slope.diff(dim=1)[:, reached]
    first, start = pieces.slope[:, reached.start].contiguous(), pieces.offset[:, reached.start].contiguous()
    knots, steps = knots.contiguous(), steps.contiguous()

    def add(score, b, head, i, j):
        x = psi[(i - j).clamp(min=0)] * scale[i]
        score = score + start[head] + first[head] * x
        for k in range(knots.shape[0]):
            score = score + steps[head, k] * (x - knots[k]).clamp(min=0)
        return score

    return add


@cache
@torch.no_grad()
def reached_knots(bias: FirePositionBias, length: int, device: torch.device) -> slice | None:
    """The knots that some distance reaches; `None` if no query is past L. Read once: each time would be a wait."""
    pieces = bias(FirePositions.arange(length, device), backend="triton")
    if bool(pieces.shared.all()):
        return None
    return slice(int((pieces.knots <= 0).sum()), int((pieces.knots < 1).sum()))


def flex(query, key, value, bias: FirePositionBias, learns: bool = True) -> torch.Tensor:
    """PyTorch's FlexAttention, compiled, with captured tables, which get gradients if they ask for them."""
    length, device = query.shape[2], query.device
    reached = reached_knots(bias, length, device)
    with torch.set_grad_enabled(learns and torch.is_grad_enabled()):
        pieces = bias(FirePositions.arange(length, device), backend="triton")
        add = add_from_table(pieces) if reached is None else add_hinges(pieces, reached)
    return compiled_flex(query, key, value, score_mod=add, block_mask=causal_blocks(length, device))


def flex_constant(query, key, value, bias: FirePositionBias) -> torch.Tensor:
    """The same with tables that do not learn."""
    return flex(query, key, value, bias, learns=False)


PEERS: dict[str, Callable] = {
    "FIRE, fused": fire,
    "same code, no bias": fire_without_bias,
    "SDPA, no bias": sdpa,
    "RoPE + SDPA": rope_sdpa,
    "FlexAttention, FIRE": flex,
    "FlexAttention, constant": flex_constant,
    "SDPA, dense FIRE": sdpa_dense,
    "plain listing": listing,
}
# What each is to compute: the formula, if it is not here.
WITHOUT_BIAS = {"same code, no bias": sdpa, "SDPA, no bias": sdpa, "RoPE + SDPA": rope_sdpa}
# Whose bias gets no gradient.
CONSTANT = ("FlexAttention, constant", *WITHOUT_BIAS)
# PyTorch's FlexAttention has no backward on CPU.
FORWARD_ONLY_ON_CPU = ("FlexAttention, FIRE", "FlexAttention, constant")
# Their memory grows with the square of the length.
QUADRATIC = ("SDPA, dense FIRE", "plain listing")
