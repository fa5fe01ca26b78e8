"""
How the CPU path divides the queries of a call into chunks: rows whose keys and distances follow one rule.
"""

from collections.abc import Iterator
from itertools import pairwise
from typing import NamedTuple

import torch

from .piecewise_fire import PiecewiseBias
from .positions_fire import FirePositions


class Span(NamedTuple):
    """
    Where a chunk is.

    Args:
        kind (`str`): `"shared"`, `"single"`, `"scaled"` or `"pairwise"`.
        items (`range`): items of the batch that have it in common.
        rows (`slice`): its queries.
        keys (`slice`): the keys that at least one of them sees.
        top (`int`): distance of the last query to the first key.
        window, ahead (`int`, *optional*): distances `>= window` and `<= -ahead` are hidden.
    """

    kind: str
    items: range
    rows: slice
    keys: slice
    top: int = 0
    window: int | None = None
    ahead: int | None = None

    @property
    def num_diagonals(self) -> int:
        return self.rows.stop - self.rows.start + self.keys.stop - self.keys.start - 1


def plan(bias: PiecewiseBias, positions: FirePositions, batch: int, num_keys: int, max_rows: int) -> Iterator[Span]:
    """The chunks that together hold all queries which see a key."""
    on_diagonals = positions.consecutive and positions.visible is None
    fields = [positions.query, positions.first, positions.last, bias.shared, bias.row_scale]
    if not on_diagonals:
        fields += [field for field in (positions.key, positions.visible) if field is not None]
    one_for_all = all(len(field) == 1 or bool((field == field[:1]).all()) for field in fields)
    batches = [range(batch)] if one_for_all else [range(item, item + 1) for item in range(batch)]
    if on_diagonals and positions.query.shape[1] == 1:
        yield from plan_single(batches, fields[:4], num_keys)
        return
    own_kind = "pairwise" if len(bias.c) > 1 and len(bias.knots) > 0 else "scaled"
    for items in batches:
        query, first, last, shared = (of_item(field, items.start) for field in fields[:4])
        first, last = first.clamp(min=0), last.clamp(max=num_keys)
        if on_diagonals:
            yield from plan_diagonals(items, query, first, last, shared, own_kind, max_rows)
        else:
            yield from plan_pairs(items, first, last, max_rows)


def plan_single(batches: list[range], fields: list[torch.Tensor], num_keys: int) -> Iterator[Span]:
    """
    Chunks of one query, in plain Python: when one token is generated, each operation on a tensor is felt.

    Args:
        fields (`list[torch.Tensor]`): coordinate, first and last key, and whether its `row_scale` is shared.
    """
    rows = [field.tolist() for field in fields]
    for items in batches:
        coordinate, begin, end, is_shared = (row[items.start if len(row) > 1 else 0][0] for row in rows)
        keys = slice(max(0, begin), min(end, num_keys))
        if keys.start < keys.stop:
            kind = "shared" if is_shared else "single"
            yield Span(kind, items, slice(0, 1), keys, coordinate - keys.start)


def plan_pairs(items: range, first: torch.Tensor, last: torch.Tensor, max_rows: int) -> Iterator[Span]:
    """Chunks of any rows."""
    for start in range(0, len(first), max_rows):
        rows = slice(start, min(start + max_rows, len(first)))
        seeing = first[rows] < last[rows]
        if seeing.any():
            keys = slice(int(first[rows][seeing].min()), int(last[rows][seeing].max()))
            yield Span("pairwise", items, rows, keys)


def plan_diagonals(
    items: range,
    query: torch.Tensor,
    first: torch.Tensor,
    last: torch.Tensor,
    shared: torch.Tensor,
    own_kind: str,
    max_rows: int,
) -> Iterator[Span]:
    """
    Chunks of rows whose coordinates go up by one, while `first` stays and from some row on goes up along with them (a
    window leaves the start), and `last` goes up and from some row on stays (at the end of the keys).
    """
    seeing = first < last
    step_first, step_last = first.diff(), last.diff()
    joined = (query.diff() == 1) & (shared[1:] == shared[:-1]) & (seeing[1:] == seeing[:-1])
    for step in (step_first, step_last):
        joined &= (step == 0) | (step == 1)
    joined[1:] &= ~((step_first[:-1] == 1) & (step_first[1:] == 0) | (step_last[:-1] == 0) & (step_last[1:] == 1))

    coordinates, firsts, lasts = query.tolist(), first.tolist(), last.tolist()
    is_shared, sees = shared.tolist(), seeing.tolist()
    for begin, end in pairwise(cut_at(~joined)):
        for start in range(begin, end if sees[begin] else begin, max_rows):
            stop = min(start + max_rows, end)
            final = stop - 1
            kind = "shared" if is_shared[start] else own_kind if start < final else "single"
            top = coordinates[final] - firsts[start]
            window = coordinates[final] - firsts[final] + 1 if firsts[final] != firsts[start] else None
            ahead = lasts[start] - coordinates[start] if lasts[final] != lasts[start] else None
            yield Span(kind, items, slice(start, stop), slice(firsts[start], lasts[final]), top, window, ahead)


def of_item(field: torch.Tensor, item: int) -> torch.Tensor:
    """The row of an item of the batch in a tensor `(batch or 1, ...)`."""
    return field[item if len(field) > 1 else 0]


def cut_at(apart: torch.Tensor) -> list[int]:
    """Where runs begin, and the last one ends: `apart`, of shape `(n - 1,)`, tells neighbours of different runs."""
    return [0, *(apart.nonzero()[:, 0] + 1).tolist(), len(apart) + 1]
