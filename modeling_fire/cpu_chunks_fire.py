"""
The bias of one chunk of queries on a CPU, and what the gradient of its scores means for the bias.

Along consecutive coordinates the distance of row `r` and column `j` of a chunk, the last row first, is
`top - (r + j)`. So a table by distance, read with strides `(1, 1)`, *is* the block of the bias, and nothing of its
size needs to be computed. The kinds of chunks differ in where their bias comes from and in how the gradient of the
scores is summed:

- [`SharedChunk`]: rows of one `row_scale`; one table serves the whole call.
- [`SingleChunk`]: one row of a `row_scale` of its own; a table for it.
- [`ScaledChunk`]: each row has its own `row_scale`; two tables, and the few distances at which segments differ.
- [`PairwiseChunk`]: whatever else, pair by pair.
"""

import math
from collections.abc import Iterator
from functools import cached_property
from itertools import pairwise

import torch

from .cpu_plan_fire import Span, cut_at, of_item, plan
from .piecewise_fire import PiecewiseBias, psi, psi_slope_in_c
from .positions_fire import FirePositions


class Scratch:
    """Memory for blocks of scores, used again and again: fresh memory costs a page fault every 4 KiB."""

    def __init__(self, like: torch.Tensor):
        self.memory = like.new_empty(0)

    def block(self, shape: tuple[int, int, int]) -> torch.Tensor:
        size = math.prod(shape)
        if self.memory.numel() < size:
            self.memory = self.memory.new_empty(size)
        return self.memory[:size].view(shape)


class BiasGradient:
    """The gradients of a bias, summed in float64."""

    def __init__(self, bias: PiecewiseBias):
        self.slope, self.offset, self.c, self.row_scale = (
            torch.zeros_like(field, dtype=torch.float64) for field in (bias.slope, bias.offset, bias.c, bias.row_scale)
        )
        self.shared: Table | None = None

    def add(self, heads: slice, segments: torch.Tensor, sums: torch.Tensor, sums_x: torch.Tensor) -> None:
        """`sums` of dS and `sums_x` of dS x, of shape `(len(heads), n)`, in `segments` of shape `(heads or 1, n)`."""
        segments = of_heads(segments, heads).expand(len(sums), -1)
        self.offset[heads].scatter_add_(1, segments, sums.double())
        self.slope[heads].scatter_add_(1, segments, sums_x.double())

    def add_c(self, heads: slice, grad: torch.Tensor) -> None:
        """`grad` of shape `(len(heads), n)`: to the one `c`, or to that of each head."""
        if len(self.c) == 1:
            self.c += grad.sum(dtype=torch.float64)
        else:
            self.c[heads] += grad.sum(1, dtype=torch.float64)

    def add_rows(self, item: int, rows: slice, grad: torch.Tensor) -> None:
        """`grad` of shape `(rows,)`, the last row first, of one item of the batch."""
        of_item(self.row_scale, item)[rows] += grad.flip(0)

    def total(self) -> tuple[torch.Tensor, ...]:
        """The gradients of `slope`, `offset`, `c` and `row_scale`."""
        if self.shared is not None:
            self.shared.add_gradient(self, slice(None), self.shared.sums, self.shared.item)
        return self.slope, self.offset, self.c, self.row_scale


class Call:
    """
    What the chunks of one call have in common: above all the tables by distance for consecutive coordinates, whose
    entry `m` belongs to the distance `top - m`. Negative ones are those of keys ahead.

    Args:
        bias, positions: of the call.
        batch, num_keys (`int`): sizes.
        max_rows (`int`): of a chunk.
        unit (`float`, *optional*, defaults to 1.0): factor of the biases that the chunks give out.
    """

    def __init__(
        self,
        bias: PiecewiseBias,
        positions: FirePositions,
        batch: int,
        num_keys: int,
        max_rows: int,
        unit: float = 1.0,
    ):
        self.bias, self.positions, self.unit = bias, positions, unit
        self.slope, self.offset = (x if unit == 1 else x * unit for x in (bias.slope, bias.offset))
        self.spans = list(plan(bias, positions, batch, num_keys, max_rows))
        self.on_diagonals = [span for span in self.spans if span.kind != "pairwise"]
        self.top = max((span.top for span in self.on_diagonals), default=0)

    def chunks(self) -> Iterator["Chunk"]:
        return (CHUNKS[span.kind](span, self) for span in self.spans)

    @cached_property
    def distance(self) -> torch.Tensor:
        bottom = min(span.top - span.num_diagonals + 1 for span in self.on_diagonals)
        return torch.arange(self.top, bottom - 1, -1, dtype=self.slope.dtype).abs_()[None]

    @cached_property
    def psi(self) -> torch.Tensor:
        return psi(self.distance, self.bias.c[:, None], self.bias.transform)

    @cached_property
    def psi_slope(self) -> torch.Tensor:
        return psi_slope_in_c(self.distance, self.bias.c[:, None], self.bias.transform)

    @cached_property
    def shared(self) -> "Table":
        """The table of the rows that share a `row_scale`."""
        span = next(span for span in self.spans if span.kind == "shared")
        return Table(self, slice(None), span.items.start, span.rows.start)


class Table:
    """
    The bias by distance of rows with one `row_scale`.

    Args:
        call ([`Call`]): with the distances.
        columns (`slice`): which of them.
        item, row (`int`): a row with that scale, which takes the gradient for all that share it.
    """

    def __init__(self, call: Call, columns: slice, item: int, row: int):
        self.call, self.columns, self.item, self.row = call, columns, item, row
        self.row_scale = of_item(call.bias.row_scale, item)[row]
        self.x = call.psi[:, columns] * self.row_scale
        self.segments = torch.bucketize(self.x, call.bias.knots)
        self.values = pick(call.slope, self.segments).mul_(self.x).add_(pick(call.offset, self.segments))
        self.limits: tuple[int | None, int | None] = (None, None)
        self.hidden = self.values

    def seen(self, window: int | None, ahead: int | None) -> torch.Tensor:
        """The table with minus infinity where a key is hidden: the same for most chunks of a call."""
        if self.limits != (window, ahead):
            self.limits = window, ahead
            self.hidden = hide(self.values.clone(), self.call.top, window, ahead)
        return self.hidden

    @cached_property
    def sums(self) -> torch.Tensor:
        """Sums of dS by distance, `(heads, distances)`, of all chunks."""
        return torch.zeros_like(self.values, dtype=torch.float64)

    def add_gradient(self, gradient: BiasGradient, heads: slice, sums: torch.Tensor, item: int) -> None:
        """`sums` of dS by distance, `(len(heads), distances)`, of an item of the batch with that scale."""
        gradient.add(heads, self.segments, sums, sums * of_heads(self.x, heads))
        sums = sums * pick(self.call.bias.slope[heads], of_heads(self.segments, heads))
        psi, psi_slope = (of_heads(t[:, self.columns], heads) for t in (self.call.psi, self.call.psi_slope))
        gradient.add_c(heads, sums * psi_slope * self.row_scale)
        gradient.add_rows(item, slice(self.row, self.row + 1), (sums * psi).sum()[None])


class Chunk:
    """
    Some rows of queries beside the keys that they see.

    Attributes:
        blind (`torch.BoolTensor` of shape `(rows,)`, *optional*): rows that see nothing.
        pitch (`int`): length of the rows of a block: `num_keys` scores, then zeros in that of a gradient.
        scores (`int`): size of what a chunk holds for one head.
        is_view (`bool`): whether `bias` is a view of a table, and holds nothing.
    """

    blind: torch.Tensor | None = None
    is_view = False

    def __init__(self, span: Span, call: Call):
        self.span, self.call = span, call
        self.items, self.rows, self.keys = span.items, span.rows, span.keys
        self.num_rows, self.num_keys = span.rows.stop - span.rows.start, span.keys.stop - span.keys.start
        self.pitch = self.num_keys
        self.scores = self.num_rows * self.num_keys

    def bias(self, heads: slice, scratch: Scratch) -> torch.Tensor:
        """The bias `(heads, rows, keys)`, the last row first, minus infinity where a row does not see a key."""
        block = scratch.block((heads.stop - heads.start, self.num_rows, self.pitch))
        self.fill(block, heads, None)
        return block[..., : self.num_keys]

    def fill(self, block: torch.Tensor, heads: slice, lse: torch.Tensor | None) -> None:
        """Writes the bias, less `lse` of shape `(heads, rows, 1)`, to a block `(heads, rows, pitch)`."""
        raise NotImplementedError

    def add_gradient(self, gradient: BiasGradient, block: torch.Tensor, heads: slice, item: int) -> None:
        """Adds what the gradient of the scores, `(heads, rows, pitch)`, means for the bias."""
        raise NotImplementedError


class SharedChunk(Chunk):
    """Rows of one `row_scale`: the bias depends on the distance alone."""

    is_view = True

    def __init__(self, span: Span, call: Call):
        super().__init__(span, call)
        self.pitch = skewed_pitch(span)
        self.start = call.top - span.top

    def bias(self, heads: slice, scratch: Scratch | None = None) -> torch.Tensor:
        table = self.call.shared.seen(self.span.window, self.span.ahead)
        return table[heads, self.start : self.start + self.span.num_diagonals].unfold(1, self.num_keys, 1)

    def fill(self, block: torch.Tensor, heads: slice, lse: torch.Tensor | None) -> None:
        torch.sub(self.bias(heads), lse, out=block[..., : self.num_keys])

    def add_gradient(self, gradient: BiasGradient, block: torch.Tensor, heads: slice, item: int) -> None:
        gradient.shared = self.call.shared
        self.call.shared.sums[heads, self.start : self.start + self.pitch - 1] += skewed(block).sum(1)


class SingleChunk(Chunk):
    """One row of a `row_scale` of its own: what a model that generates text asks for again and again."""

    is_view = True

    def __init__(self, span: Span, call: Call):
        super().__init__(span, call)
        start = call.top - span.top
        self.table = Table(call, slice(start, start + self.num_keys), span.items.start, span.rows.start)

    def bias(self, heads: slice, scratch: Scratch | None = None) -> torch.Tensor:
        return self.table.values[heads, None]

    def fill(self, block: torch.Tensor, heads: slice, lse: torch.Tensor | None) -> None:
        torch.sub(self.bias(heads), lse, out=block)

    def add_gradient(self, gradient: BiasGradient, block: torch.Tensor, heads: slice, item: int) -> None:
        self.table.add_gradient(gradient, heads, block[:, 0], item)


class ScaledChunk(Chunk):
    """
    Rows with a `row_scale` each: `offset + slope x`, where `x` of a row is `ratio` times that of the row of the
    largest scale. Segments are those of that row too, and so are wrong where another row still is below a knot that
    this one has passed. These *crossings*, pairs of a knot and a distance, are few, and are corrected.
    """

    def __init__(self, span: Span, call: Call):
        super().__init__(span, call)
        self.pitch = skewed_pitch(span)
        bias, start = call.bias, call.top - span.top
        self.start = start
        self.psi = call.psi[:, start : start + span.num_diagonals]
        scale = of_item(bias.row_scale, span.items.start)[span.rows].flip(0)
        self.largest = scale.max()
        self.ratio = (scale / self.largest)[:, None]
        self.x = self.psi * self.largest
        self.segments = torch.bucketize(self.x, bias.knots)
        self.constant = hide(pick(call.offset, self.segments), span.top, span.window, span.ahead)
        self.rising = pick(call.slope, self.segments).mul_(self.x)

        self.runs: list[tuple[int, int, int]] = []
        if len(bias.knots):
            self.find_crossings(scale)

    @property
    def psi_slope(self) -> torch.Tensor:
        return self.call.psi_slope[:, self.start : self.start + self.span.num_diagonals]

    def find_crossings(self, scale: torch.Tensor) -> None:
        knots, slope = self.call.bias.knots[:, None], self.call.bias.slope
        columns = self.pitch - 1
        crossed = (self.x[:, :columns] > knots) & (self.psi[:, :columns] * scale.min() <= knots)
        self.knot, self.crossing = crossed.nonzero().unbind(1)
        if not len(self.knot):
            return
        knot = self.call.bias.knots[self.knot]
        x = self.psi[0, self.crossing] * scale[:, None]
        self.below = (x <= knot).to(x.dtype)
        self.lift = (knot - x).clamp_(min=0)
        self.jump = slope[:, self.knot + 1] - slope[:, self.knot]
        # Crossings of one knot at adjacent distances make one rectangle of the skewed block.
        cuts = cut_at((self.knot.diff() != 0) | (self.crossing.diff() != 1))
        starts = self.crossing[cuts[:-1]].tolist()
        self.scores += self.below.numel()
        self.runs = [(start, a, b) for start, (a, b) in zip(starts, pairwise(cuts), strict=True)]

    def fill(self, block: torch.Tensor, heads: slice, lse: torch.Tensor | None) -> None:
        bias = block[..., : self.num_keys]
        constant, rising = (x[heads].unfold(1, self.num_keys, 1) for x in (self.constant, self.rising))
        torch.addcmul(constant, self.ratio, rising, out=bias)
        if lse is not None:
            bias.sub_(lse)
        if self.runs:
            jump, diagonals = (self.jump[heads] * self.call.unit)[:, None], skewed(block)
            for start, a, b in self.runs:
                diagonals[..., start : start + b - a].addcmul_(jump[..., a:b], self.lift[:, a:b])

    def add_gradient(self, gradient: BiasGradient, block: torch.Tensor, heads: slice, item: int) -> None:
        diagonals, columns = skewed(block), slice(0, self.pitch - 1)
        segments = self.segments[:, columns]
        slope = pick(self.call.bias.slope[heads], of_heads(segments, heads))
        gradient.add(heads, segments, *self.add_sums(gradient, diagonals, slope, columns, heads, item))
        if self.runs:
            # What was counted above the knot of a crossing, but is below.
            crossed = torch.cat([diagonals[..., start : start + b - a] for start, a, b in self.runs], dim=-1)
            crossed *= self.below
            sums, sums_x = self.add_sums(gradient, crossed, -self.jump[heads], self.crossing, heads, item)
            gradient.add(heads, self.knot[None], sums, sums_x)
            gradient.add(heads, self.knot[None] + 1, -sums, -sums_x)

    def add_sums(
        self,
        gradient: BiasGradient,
        grad: torch.Tensor,
        slope: torch.Tensor,
        columns: torch.Tensor | slice,
        heads: slice,
        item: int,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """
        Adds the gradients of `c` and `row_scale`.

        Args:
            grad (`torch.Tensor` of shape `(len(heads), rows, n)`): dS, by distance.
            slope (`torch.Tensor` of shape `(len(heads), n)`): of the bias.
            columns: the `n` distances.

        Returns:
            The sums of `grad` and of `grad x` over rows, of shape `(len(heads), n)`.
        """
        weights = torch.cat([torch.ones_like(self.ratio), self.ratio], dim=1).T
        sums, scaled_sums = torch.bmm(weights.expand(len(grad), -1, -1), grad).unbind(1)
        psi, psi_slope, x = (of_heads(t[:, columns], heads) for t in (self.psi, self.psi_slope, self.x))
        gradient.add_c(heads, slope * psi_slope * self.largest * scaled_sums)
        # A product with one row, rather than with one column: BLAS is ten times as fast at it.
        gradient.add_rows(item, self.rows, torch.bmm((slope * psi)[:, None], grad.mT).sum((0, 1)))
        return sums, scaled_sums * x


class PairwiseChunk(Chunk):
    """Any coordinates and masks: the bias of each pair on its own."""

    def __init__(self, span: Span, call: Call):
        super().__init__(span, call)
        bias, positions, item = call.bias, call.positions, span.items.start
        query, first, last, self.row_scale = (
            of_item(field, item)[span.rows].flip(0)[:, None]
            for field in (positions.query, positions.first, positions.last, bias.row_scale)
        )
        index = torch.arange(span.keys.start, span.keys.stop)
        key = index if positions.consecutive else of_item(positions.key, item)[span.keys]
        self.hidden = (index < first) | (index >= last)
        if positions.visible is not None:
            self.hidden |= ~of_item(positions.visible, item)[span.keys]
        self.blind = self.hidden.all(1).flip(0)

        c = bias.c[:, None, None]
        self.distance = (query - key).abs().to(bias.slope.dtype)[None]
        self.psi = psi(self.distance, c, bias.transform)
        self.x = self.psi * self.row_scale
        self.segments = torch.bucketize(self.x, bias.knots)

    def fill(self, block: torch.Tensor, heads: slice, lse: torch.Tensor | None) -> None:
        x, segments = of_heads(self.x, heads), of_heads(self.segments, heads).flatten(1)
        slope, offset = (
            pick(values[heads], segments).view(block.shape) for values in (self.call.slope, self.call.offset)
        )
        torch.addcmul(offset, slope, x, out=block)
        block.masked_fill_(self.hidden, -torch.inf)
        if lse is not None:
            block.sub_(lse)

    def add_gradient(self, gradient: BiasGradient, block: torch.Tensor, heads: slice, item: int) -> None:
        bias = self.call.bias
        psi, x, segments = (of_heads(t, heads) for t in (self.psi, self.x, self.segments))
        gradient.add(heads, self.segments.flatten(1), block.flatten(1), (block * x).flatten(1))
        grad_x = block * pick(bias.slope[heads], segments.flatten(1)).view(block.shape)
        gradient.add_rows(item, self.rows, (grad_x * psi).sum((0, 2)))
        psi_slope = psi_slope_in_c(self.distance, of_heads(bias.c, heads)[:, None, None], bias.transform)
        gradient.add_c(heads, (grad_x * psi_slope * self.row_scale).flatten(1))


def of_heads(field: torch.Tensor, heads: slice) -> torch.Tensor:
    """The rows of some heads in a tensor `(heads or 1, ...)`."""
    return field[heads] if len(field) > 1 else field


def pick(values: torch.Tensor, segments: torch.Tensor) -> torch.Tensor:
    """`values`, of shape `(heads, segments)`, at `segments`, of shape `(heads or 1, n)`: `(heads, n)`."""
    if len(segments) == 1:
        return values.index_select(1, segments[0])
    return values.gather(1, segments)


def hide(table: torch.Tensor, top: int, window: int | None, ahead: int | None) -> torch.Tensor:
    """Writes minus infinity to a table, whose first entry belongs to `top`, where a distance is hidden; see `Span`."""
    if window is not None:
        table[:, : max(0, top - window + 1)] = -torch.inf
    if ahead is not None:
        table[:, top + ahead :] = -torch.inf
    return table


def skewed(block: torch.Tensor) -> torch.Tensor:
    """`(heads, rows, pitch)` as `(heads, rows, pitch - 1)`: what was a diagonal, of one distance, is a column."""
    heads, rows, pitch = block.shape
    return block.view(heads, rows * pitch)[:, : rows * (pitch - 1)].view(heads, rows, pitch - 1)


def skewed_pitch(span: Span) -> int:
    """
    Length of the rows of a block so that `skewed`, which in row `r` begins `r` entries before it, reads zeros there,
    at the end of the row above. Where keys ahead are hidden, rows end with some zeros anyway.
    """
    num_keys, enough = span.keys.stop - span.keys.start, span.num_diagonals + 1
    return enough if span.ahead is None else min(enough, max(num_keys, span.top + span.ahead) + 1)


CHUNKS: dict[str, type[Chunk]] = {
    "shared": SharedChunk,
    "single": SingleChunk,
    "scaled": ScaledChunk,
    "pairwise": PairwiseChunk,
}
