"""Who stands where and sees whom: what attention is tested with."""

from typing import NamedTuple

import torch
from hypothesis import strategies as st
from reference import random_bias

from modeling_fire.piecewise_fire import PiecewiseBias
from modeling_fire.positions_fire import FirePositions


def padded(pads: list[int], length: int) -> FirePositions:
    """Left padding: one number for each item of the batch."""
    index, pads = torch.arange(length)[None], torch.tensor(pads)[:, None]
    return FirePositions(
        (index - pads).clamp(min=0), index, index, pads.expand(-1, length), index + 1, consecutive=True
    )


def side_by_side(requests: list[tuple[int, int]]) -> FirePositions:
    """Continuous batching: `(cached, new)` tokens of each request, all in one row."""
    absolute, query, first, last, start = [], [], [], [], 0
    for cached, new in requests:
        for position in range(cached, cached + new):
            absolute.append(position)
            query.append(start + position)
            first.append(start)
            last.append(start + position + 1)
        start += cached + new
    rows = (torch.tensor(field)[None] for field in (absolute, query))
    limits = (torch.tensor(field)[None] for field in (first, last))
    return FirePositions(*rows, torch.arange(start)[None], *limits, consecutive=True, separate=True)


def scattered(length: int, batch: int = 2, seed: int = 0) -> FirePositions:
    """Random increasing coordinates, some keys hidden, some queries blind."""
    generator = torch.Generator().manual_seed(seed)
    coordinates = torch.randint(0, 2 * length, (batch, length), generator=generator).sort().values
    index = torch.arange(length)[None]
    visible = torch.rand(batch, length, generator=generator) > 0.3
    visible[:, 0] = False
    return FirePositions(coordinates, coordinates, coordinates, torch.zeros_like(index), index + 1, visible)


class Call(NamedTuple):
    """Positions, a bias in float64, and the sizes and the seed of the tensors beside them."""

    positions: FirePositions
    bias: PiecewiseBias
    heads: int
    kv_heads: int
    batch: int
    seed: int


@st.composite
def calls(draw):
    """Anything that attention may be asked for, in small."""
    queries = draw(st.integers(1, 40))
    past = draw(st.integers(0, 30))
    window = draw(st.none() | st.integers(1, 40))
    layout = draw(st.sampled_from(["plain", "both ways", "packed", "padded", "requests", "scattered", "any limits"]))
    batch = draw(st.integers(1, 2))
    seed = draw(st.integers(0, 2**16))
    generator = torch.Generator().manual_seed(seed)
    if layout in ("plain", "both ways"):
        positions = FirePositions.arange(queries, past=past, window=window, causal=layout == "plain")
    elif layout == "packed":
        cuts = torch.randperm(queries + past, generator=generator)[: draw(st.integers(0, 5))]
        ends = torch.tensor([0, queries + past])
        positions = FirePositions.packed(torch.cat([cuts, ends]).unique(), queries + past)
    elif layout == "padded":
        positions = padded(draw(st.lists(st.integers(0, queries), min_size=batch, max_size=batch)), queries)
    elif layout == "requests":
        positions = side_by_side(
            draw(st.lists(st.tuples(st.integers(0, 20), st.integers(1, 9)), min_size=1, max_size=5))
        )
    elif layout == "scattered":
        positions = scattered(queries, batch, seed)
    else:
        positions = FirePositions.arange(queries, past=past)
        limits = torch.randint(-3, queries + past + 4, (2, batch, queries), generator=generator)
        positions = positions._replace(first=limits[0], last=limits[1].clamp(max=queries + past))
    heads, kv_heads = draw(st.sampled_from([(1, 1), (2, 2), (4, 2), (3, 1)]))
    bias = random_bias(
        heads,
        positions,
        L=draw(st.sampled_from([0.5, 5.0, 17.5, 100.0])),
        c=draw(st.sampled_from([0.01, 0.3, 1.0])),
        width=draw(st.integers(0, 20)),
        transform=draw(st.sampled_from(["log", "power", "identity"])),
        seed=seed,
    )
    return Call(positions, bias, heads, kv_heads, batch, seed)
