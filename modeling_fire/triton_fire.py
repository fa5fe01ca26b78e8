"""
Attention with a piecewise-linear position bias on NVIDIA GPUs, fused: kernels in Triton.

The bias of a pair is `slope[h, s] x + offset[h, s]`, with `x` of the distance and `s` the segment, between two knots,
that `x` lies in (see `piecewise_fire`). A program works through tiles of rows (queries) and columns (keys), and few
tiles meet a knot, so the bias costs little:

- *Plan.* A small kernel finds for each block of rows which columns it sees, and for each knot where its rows meet it.
  From that, a program knows the segment of a tile, or the knots inside it, without looking at elements.
- *Far tiles* (`psi` a logarithm, and the tile small against its distance) take `psi` from a cubic in the column, one
  for each row: no logarithm of an element. The error of a score stays below a tolerance whatever `c` and `L` are.
- *Near tiles* take one logarithm of each element, of its integer distance.
- A tile with knots inside starts from its lowest segment and adds a hinge `(change of slope) max(x - knot, 0)` each.

Gradients of the bias come from row sums of the gradient of the scores. They are kept by segment while a program moves
along its row block, and stored once in a slot of its own: no atomics, so results repeat bitwise.

Scores are in units of log 2, so that `exp2` serves; `psi` is in *units* too: those of log 2 where it is a logarithm.
Nothing here waits for the device.
"""

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl

from .piecewise_fire import PiecewiseBias
from .positions_fire import FirePositions


LN2 = tl.constexpr(0.6931471805599453)
LOG2E = tl.constexpr(1.4426950408889634)
# Further than any column; the sum of a coordinate and this still fits in 32 bits.
BEYOND = tl.constexpr(1 << 29)
# A score of nobody: finite, so that a row that has seen nothing yet subtracts it without NaN.
LOWEST = tl.constexpr(-1e30)
# Fields of the plan of a row block.
BEGIN, END, FULL_BEGIN, FULL_END, LAST_FAR, PRECISE, FIELDS = (tl.constexpr(n) for n in (0, 1, 2, 3, 4, 5, 8))


# ---------------------------------------------------------------- psi


@triton.jit
def _log2(x, FAST: tl.constexpr):
    if FAST:
        return tl.inline_asm_elementwise("lg2.approx.ftz.f32 $0, $1;", "=f,f", [x], tl.float32, is_pure=True, pack=1)
    else:
        return tl.log2(x)


@triton.jit
def _reciprocal(x, FAST: tl.constexpr):
    if FAST:
        return tl.inline_asm_elementwise("rcp.approx.ftz.f32 $0, $1;", "=f,f", [x], tl.float32, is_pure=True, pack=1)
    else:
        return 1.0 / x


@triton.jit
def _log2_1p(y, FAST: tl.constexpr):
    """`log2(1 + y)`, accurate relative to itself also where `y` is small: there by the series of `2 artanh(z)`."""
    z = y * _reciprocal(2.0 + y, FAST)
    w = z * z
    small = (2 * LOG2E) * z * (1.0 + w * (0.33333333333 + w * (0.2 + w * 0.142857142857)))
    return tl.where(y < 0.4, small, _log2(1.0 + y, FAST))


@triton.jit
def _units(behind, offset, c, precise, TRANSFORM: tl.constexpr, FAST: tl.constexpr):
    """`psi` of the distances `|behind - offset|`, in units."""
    if TRANSFORM == "log":
        if precise:
            units = _log2_1p(c * tl.abs(behind - offset), FAST)
        else:
            units = _log2(1.0 + tl.abs(tl.fma(offset, -c, c * behind)), FAST)
    else:
        units = tl.abs(behind - offset)
        if TRANSFORM == "power":
            units = tl.where(units > 0.0, tl.math.exp2(c * _log2(tl.maximum(units, 1.0), FAST)), 0.0)
    return units


@triton.jit
def _slope_in_c(behind, offset, c, TRANSFORM: tl.constexpr, FAST: tl.constexpr):
    """`d psi / d c` at the distances `|behind - offset|`; not in units."""
    distance = tl.abs(behind - offset)
    if TRANSFORM == "log":
        return distance * _reciprocal(1.0 + c * distance, FAST)
    else:
        power = _log2(tl.maximum(distance, 1.0), FAST)
        return tl.math.exp2(c * power) * power * LN2


@triton.jit
def _reach(knot, scale, c, TRANSFORM: tl.constexpr):
    """
    The distances up to which `x <= knot`: one that is surely not too large, and one that is surely not too small.
    What cannot be told (`scale` 0) is between all distances, except that an infinite knot is met by nobody.
    """
    y = knot / scale
    if TRANSFORM == "log":
        small = y * (1.0 + y * (0.5 + y * (0.16666666667 + y * 0.041666666667)))
        reach = tl.where(y < 0.0625, small, tl.exp(tl.minimum(y, 80.0)) - 1.0) / c
    elif TRANSFORM == "power":
        reach = tl.math.exp2(tl.minimum(tl.log2(tl.maximum(y, 1e-37)) / c, 80.0))
    else:
        reach = y
    known = (scale > 0.0) & (reach == reach)
    reach = tl.minimum(reach, 1.0 * BEYOND)
    low = tl.where(known, reach * (1.0 - 1e-5) - 1.0, -1.0 * BEYOND)
    high = tl.where(known, reach * (1.0 + 1e-5) + 1.0, 1.0 * BEYOND)
    never = (knot == float("-inf")) | ((knot < 0.0) & (scale > 0.0))
    always = knot == float("inf")
    low = tl.where(always, 1.0 * BEYOND, tl.where(never, -1.0 * BEYOND, low))
    high = tl.where(always, 1.0 * BEYOND, tl.where(never, -1.0 * BEYOND, high))
    return tl.clamp(low, -1.0 * BEYOND, 1.0 * BEYOND).to(tl.int32), tl.clamp(high, -1.0 * BEYOND, 1.0 * BEYOND).to(
        tl.int32
    )


# ---------------------------------------------------------------- the plan of a row block


@triton.jit(do_not_specialize=["num_queries", "num_keys", "num_knots"])
def _plan_kernel(
    QUERY, FIRST, LAST, ROW_SCALE, KNOTS, STEEPEST, C, ROWS, SCALE, BLOCKS, EDGES,
    query_stride, first_stride, last_stride, scale_stride, num_queries, num_keys, num_knots, c_heads, tolerance,
    TRANSFORM: tl.constexpr, GENERAL: tl.constexpr, ROW_BLOCK: tl.constexpr, COLUMN_BLOCK: tl.constexpr,
    KNOT_BLOCK: tl.constexpr,
):  # fmt: skip
    """
    Grid `(row blocks, plan batch * heads of c)`. Stores

    - `ROWS`, int32 `(plan batch, 3, queries)`: coordinate, first and last of each query, a blind one as `0, 0`;
    - `SCALE`, float32 `(plan batch, queries)`: `row_scale` times the unit of `psi`;
    - `BLOCKS`, int32 `(plan batch, heads of c, row blocks, FIELDS)`: columns that some row sees, columns that all rows
      see (of those that see any), the last column at which a far tile starts, whether small `psi` matter;
    - `EDGES`, int32 `(plan batch, heads of c, row blocks, 4, KNOT_BLOCK)`: see `_locate`.
    """
    block, blocks = tl.program_id(0), tl.num_programs(0)
    batch, head = tl.program_id(1) // c_heads, tl.program_id(1) % c_heads
    rows = block * ROW_BLOCK + tl.arange(0, ROW_BLOCK)
    inside = rows < num_queries
    query = tl.load(QUERY + batch * query_stride + rows, mask=inside, other=0).to(tl.int32)
    first = tl.load(FIRST + batch * first_stride + rows, mask=inside, other=0)
    last = tl.load(LAST + batch * last_stride + rows, mask=inside, other=0)
    first = tl.maximum(first, 0).to(tl.int32)
    last = tl.minimum(last, num_keys).to(tl.int32)
    sees = inside & (first < last)
    scale = tl.load(ROW_SCALE + batch * scale_stride + rows, mask=inside, other=0.0).to(tl.float32)
    if head == 0:
        stored = ROWS + batch * 3 * num_queries + rows
        tl.store(stored, query, mask=inside)
        tl.store(stored + num_queries, tl.where(sees, first, 0), mask=inside)
        tl.store(stored + 2 * num_queries, tl.where(sees, last, 0), mask=inside)
        unit = LN2 if TRANSFORM == "log" else 1.0
        tl.store(SCALE + batch * num_queries + rows, scale * unit, mask=inside)

    c = tl.load(C + head).to(tl.float32)
    # The largest factor between an error of psi and one of a score, or of x, of which gradients of slopes are sums.
    gain = tl.max(tl.where(sees, tl.abs(scale), 0.0), 0) * tl.maximum(tl.load(STEEPEST).to(tl.float32), 1.0)
    last_far = -BEYOND
    if TRANSFORM == "log" and not GENERAL:
        # The cubic is off by tau ** 4 / 4 if all columns are within tau (1 / c + distance of the centre).
        half = COLUMN_BLOCK // 2
        tau = tl.minimum(tl.sqrt(tl.sqrt(4.0 * tolerance / tl.maximum(gain, 1e-30))), 0.125)
        nearest = tl.clamp(half / tau - 1.0 / c, 1.0 * half, 1.0 * BEYOND)
        last_far = tl.min(tl.where(sees, query, BEYOND), 0) - half - (nearest + 1.0).to(tl.int32)
    plan = (batch * c_heads + head) * blocks + block
    fields = BLOCKS + plan * FIELDS
    tl.store(fields + BEGIN, tl.min(tl.where(sees, first, BEYOND), 0))
    tl.store(fields + END, tl.max(tl.where(sees, last, 0), 0))
    tl.store(fields + FULL_BEGIN, tl.max(tl.where(sees, first, 0), 0))
    tl.store(fields + FULL_END, tl.min(tl.where(sees, last, BEYOND), 0))
    tl.store(fields + LAST_FAR, last_far)
    tl.store(fields + PRECISE, (gain * 2.4e-7 > tolerance).to(tl.int32))

    knots = tl.arange(0, KNOT_BLOCK)
    knot = tl.load(KNOTS + knots, mask=knots < num_knots, other=float("inf")).to(tl.float32)
    low, high = _reach(knot[None, :], scale[:, None], c, TRANSFORM)
    sees, query = sees[:, None], query[:, None]
    edges = EDGES + plan * 4 * KNOT_BLOCK + knots
    tl.store(edges, tl.min(tl.where(sees, query - high, BEYOND), 0))
    tl.store(edges + KNOT_BLOCK, tl.max(tl.where(sees, query - low, -BEYOND), 0))
    tl.store(edges + 2 * KNOT_BLOCK, tl.min(tl.where(sees, query + low, BEYOND), 0))
    tl.store(edges + 3 * KNOT_BLOCK, tl.max(tl.where(sees, query + high, -BEYOND), 0))


@triton.jit
def _locate(behind_all, behind_any, ahead_any, ahead_all, leftmost, rightmost, KNOT_BLOCK: tl.constexpr):
    """
    Where a tile of the columns (or coordinates) `leftmost` to `rightmost` lies among the knots.

    A row `i` meets knot `k` at a distance `r`. Columns left of all `i - r` or right of all `i + r` are above the knot;
    columns right of all `i - r` and left of all `i + r` are below it; other tiles may have the knot inside.

    Returns: the lowest segment of the tile, and the highest: the knots between them may be inside.
    """
    passed = (rightmost < behind_all) | (leftmost > ahead_all)
    beyond = (leftmost >= behind_any) & (rightmost <= ahead_any)
    counts = tl.sum(passed.to(tl.int32) + (beyond.to(tl.int32) << 16), 0)
    return counts & 0xFFFF, KNOT_BLOCK - (counts >> 16)


@triton.jit
def _next_change(behind_all, behind_any, ahead_any, ahead_all, start, BLOCK: tl.constexpr):
    """The first tile start past `start` from which on `_locate` can give another answer."""
    reach = BLOCK - 1
    change = tl.where(behind_all - reach > start, behind_all - reach, BEYOND)
    change = tl.minimum(change, tl.where(behind_any > start, behind_any, BEYOND))
    change = tl.minimum(change, tl.where(ahead_any - reach + 1 > start, ahead_any - reach + 1, BEYOND))
    change = tl.minimum(change, tl.where(ahead_all + 1 > start, ahead_all + 1, BEYOND))
    return tl.min(change, 0)


@triton.jit
def _locate_planned(edges, leftmost, rightmost, BLOCK: tl.constexpr, KNOT_BLOCK: tl.constexpr):
    """`_locate` from the plan of the row block, and `_next_change` after it."""
    knots = edges + tl.arange(0, KNOT_BLOCK)
    behind_all = tl.load(knots)
    behind_any = tl.load(knots + KNOT_BLOCK)
    ahead_any = tl.load(knots + 2 * KNOT_BLOCK)
    ahead_all = tl.load(knots + 3 * KNOT_BLOCK)
    low, high = _locate(behind_all, behind_any, ahead_any, ahead_all, leftmost, rightmost, KNOT_BLOCK)
    return low, high, _next_change(behind_all, behind_any, ahead_any, ahead_all, leftmost, BLOCK)


# ---------------------------------------------------------------- tiles


@triton.jit
def _dot(a, b, accumulator, FAST: tl.constexpr):
    """`a @ b + accumulator`; float32 in full precision."""
    if FAST:
        return tl.dot(a, b, accumulator, input_precision="ieee")
    else:  # the interpreter takes bfloat16 for integers
        return tl.dot(a.to(tl.float32), b.to(tl.float32), accumulator, input_precision="ieee")


@triton.jit
def _load_tile(base, start, stride, begin, end, HEAD_DIM: tl.constexpr, BLOCK: tl.constexpr, DIM_BLOCK: tl.constexpr):
    """Rows `start` on of a matrix with unit column stride, `(BLOCK, DIM_BLOCK)`; 0 outside rows `begin` to `end`."""
    row, dim = tl.arange(0, BLOCK), tl.arange(0, DIM_BLOCK)
    inside = ((start + row >= begin) & (start + row < end))[:, None]
    if HEAD_DIM != DIM_BLOCK:
        inside = inside & (dim < HEAD_DIM)[None, :]
    pointers = base + tl.cast(start, tl.int64) * stride + row[:, None] * stride + dim[None, :]
    return tl.load(pointers, mask=inside, other=0.0)


@triton.jit
def _store_tile(base, tile, start, stride, end, HEAD_DIM: tl.constexpr, BLOCK: tl.constexpr, DIM_BLOCK: tl.constexpr):
    row, dim = tl.arange(0, BLOCK), tl.arange(0, DIM_BLOCK)
    inside = (start + row < end)[:, None] & (dim < HEAD_DIM)[None, :]
    pointers = base + tl.cast(start, tl.int64) * stride + row[:, None] * stride + dim[None, :]
    tl.store(pointers, tile.to(base.dtype.element_ty), mask=inside)


@triton.jit
def _columns(KEYS, VISIBLE, start, num_keys, GENERAL: tl.constexpr, BLOCK: tl.constexpr):
    """
    The columns of a tile: a coordinate to measure from, the others as float offsets from it (both small enough to be
    exact, which a coordinate as a float need not be), the extreme coordinates, and whether each key is visible.
    """
    column = tl.arange(0, BLOCK)
    visible = start + column < num_keys
    if GENERAL:
        some = tl.load(KEYS + start)
        coordinate = tl.load(KEYS + start + column, mask=visible, other=0)
        coordinate = tl.where(visible, coordinate, some).to(tl.int32)
        leftmost, rightmost = tl.min(coordinate, 0), tl.max(coordinate, 0)
        origin = leftmost
        offset = (coordinate - origin).to(tl.float32)
        if VISIBLE is not None:
            visible = visible & (tl.load(VISIBLE + start + column, mask=visible, other=0) != 0)
    else:
        leftmost, rightmost = start, start + BLOCK - 1
        origin = start + BLOCK // 2
        offset = (column - BLOCK // 2).to(tl.float32)
    return origin, offset, leftmost, rightmost, visible


@triton.jit
def _expand(behind, c, FAST: tl.constexpr):
    """`psi` around a distance, `log(1 + c (behind - v)) = value - rate v - (rate v)^2 / 2 - ...`, `value` in units."""
    inverse = _reciprocal(1.0 + c * behind, FAST)
    return _log2_1p(c * behind, FAST), c * inverse, inverse


@triton.jit
def _scores(
    product, sharpness, behind, offset, scale, slope, constant, c, low, high, far, precise, KNOTS, SLOPE,
    TRANSFORM: tl.constexpr, FAST: tl.constexpr,
):  # fmt: skip
    """
    Scores with the bias, in units of log 2, from the products `q k`.

    `behind` (of rows: how far the tile's origin is behind) and `scale` broadcast along columns, `offset` (of columns:
    from the origin) along rows, in either orientation. `slope` and `constant` are those of segment `low`.
    """
    if FAST:
        # Costs nothing. Triton 3.6 fails on sm_90 if a branch of the loop takes the result of a dot itself.
        product = tl.inline_asm_elementwise("mov.b32 $0, $1;", "=f,f", [product], tl.float32, is_pure=True, pack=1)
    steepness = slope * scale
    if far and high == low:
        value, rate, _ = _expand(behind, c, FAST)
        first = -LOG2E * steepness * rate
        second = first * rate * 0.5
        third = first * rate * rate * 0.33333333333
        polynomial = (steepness * value + constant) + offset * (first + offset * (second + offset * third))
        scores = product * sharpness + polynomial
    else:
        units = _units(behind, offset, c, precise, TRANSFORM, FAST)
        scores = product * sharpness + (units * steepness + constant)
        # Inside this branch: a loop with another in its own body Triton does not pipeline.
        for knot in range(low, high):
            change = (tl.load(SLOPE + knot + 1) - tl.load(SLOPE + knot)) * LOG2E
            scores += change * tl.maximum(units * scale - tl.load(KNOTS + knot), 0.0)
    return scores


# ---------------------------------------------------------------- forward


@triton.jit(do_not_specialize=["num_queries", "num_keys", "segments"])
def _forward_kernel(
    Q, K, V, OUT, LSE, ROWS, SCALE, BLOCKS, EDGES, KEYS, VISIBLE, KNOTS, SLOPE, OFFSET, C,
    scaling, q_batch, q_head, q_row, k_batch, k_head, k_row, v_batch, v_head, v_row, out_batch, out_head, out_row,
    keys_stride, visible_stride, num_queries, num_keys, heads, group, plan_batches, c_heads, segments,
    TRANSFORM: tl.constexpr, GENERAL: tl.constexpr, FAST: tl.constexpr, HEAD_DIM: tl.constexpr,
    ROW_BLOCK: tl.constexpr, COLUMN_BLOCK: tl.constexpr, DIM_BLOCK: tl.constexpr, KNOT_BLOCK: tl.constexpr,
):  # fmt: skip
    """Grid `(row blocks, batch * heads)`: output and log-sum-exp of a row block."""
    blocks = tl.num_programs(0)
    block = blocks - 1 - tl.program_id(0)  # the rows that see most first, so that none is left alone at the end
    batch, head = tl.program_id(1) // heads, tl.program_id(1) % heads
    plan_batch, c_head = batch % plan_batches, head % c_heads
    plan = (plan_batch * c_heads + c_head) * blocks + block
    fields, edges = BLOCKS + plan * FIELDS, EDGES + plan * 4 * KNOT_BLOCK
    begin, end = tl.load(fields + BEGIN), tl.load(fields + END)
    full_begin, full_end = tl.load(fields + FULL_BEGIN), tl.load(fields + FULL_END)
    last_far, precise = tl.load(fields + LAST_FAR), tl.load(fields + PRECISE) != 0

    wide_batch, wide_head, wide_kv = batch.to(tl.int64), head.to(tl.int64), (head // group).to(tl.int64)
    k_base = K + wide_batch * k_batch + wide_kv * k_head
    v_base = V + wide_batch * v_batch + wide_kv * v_head
    keys_base = KEYS + wide_batch * keys_stride if GENERAL else KEYS
    visible_base = VISIBLE + wide_batch * visible_stride if VISIBLE is not None else VISIBLE
    slopes, offsets = SLOPE + head * segments, OFFSET + head * segments
    c = tl.load(C + c_head)

    row_start = block * ROW_BLOCK
    rows = row_start + tl.arange(0, ROW_BLOCK)
    inside = rows < num_queries
    stored = ROWS + plan_batch * 3 * num_queries + rows
    query = tl.load(stored, mask=inside, other=0)
    first = tl.load(stored + num_queries, mask=inside, other=0)
    last = tl.load(stored + 2 * num_queries, mask=inside, other=0)
    scale = tl.load(SCALE + plan_batch * num_queries + rows, mask=inside, other=0.0)
    q_base = Q + wide_batch * q_batch + wide_head * q_head
    q = _load_tile(q_base, row_start, q_row, 0, num_queries, HEAD_DIM, ROW_BLOCK, DIM_BLOCK)

    accumulator = tl.zeros([ROW_BLOCK, DIM_BLOCK], tl.float32)
    total = tl.zeros([ROW_BLOCK], tl.float32)
    largest = tl.full([ROW_BLOCK], LOWEST, tl.float32)
    low, high, change, slope, constant = 0, 0, -BEYOND, 0.0, 0.0
    for start in range(begin // COLUMN_BLOCK * COLUMN_BLOCK, end, COLUMN_BLOCK):
        k = _load_tile(k_base, start, k_row, begin, end, HEAD_DIM, COLUMN_BLOCK, DIM_BLOCK)
        product = _dot(q, tl.trans(k), None, FAST)
        origin, offset, leftmost, rightmost, visible = _columns(
            keys_base, visible_base, start, num_keys, GENERAL, COLUMN_BLOCK
        )
        if GENERAL or start >= change:
            low, high, change = _locate_planned(edges, leftmost, rightmost, COLUMN_BLOCK, KNOT_BLOCK)
            slope, constant = tl.load(slopes + low) * LOG2E, tl.load(offsets + low) * LOG2E
        behind = (query - origin).to(tl.float32)
        far = start <= last_far
        scores = _scores(
            product, scaling * LOG2E, behind[:, None], offset[None, :], scale[:, None], slope, constant, c, low, high,
            far, precise, KNOTS, slopes, TRANSFORM, FAST,
        )  # fmt: skip
        if GENERAL or start < full_begin or start + COLUMN_BLOCK > full_end:
            column = start + tl.arange(0, COLUMN_BLOCK)
            seen = (first[:, None] <= column[None, :]) & (column[None, :] < last[:, None]) & visible[None, :]
            scores = tl.where(seen, scores, float("-inf"))
        raised = tl.maximum(largest, tl.max(scores, 1))
        weights = tl.math.exp2(scores - raised[:, None])
        shrink = tl.math.exp2(largest - raised)
        total = total * shrink + tl.sum(weights, 1)
        v = _load_tile(v_base, start, v_row, begin, end, HEAD_DIM, COLUMN_BLOCK, DIM_BLOCK)
        accumulator = _dot(weights.to(v.dtype), v, accumulator * shrink[:, None], FAST)
        largest = raised

    # A row that sees nothing met unmasked tiles if its neighbours did. Nor is anything seen if all was invisible.
    sees = (first < last) & (total > 0.0)
    total = tl.where(sees, total, 1.0)
    output = tl.where(sees[:, None], accumulator / total[:, None], 0.0)
    lse = tl.where(sees, (largest + tl.log2(total)) * LN2, float("-inf"))
    out_base = OUT + wide_batch * out_batch + wide_head * out_head
    _store_tile(out_base, output, row_start, out_row, num_queries, HEAD_DIM, ROW_BLOCK, DIM_BLOCK)
    tl.store(LSE + tl.program_id(1).to(tl.int64) * num_queries + rows, lse, mask=inside)


# ---------------------------------------------------------------- backward


@triton.jit(do_not_specialize=["num_queries"])
def _delta_kernel(
    OUT, GRAD, LSE, DELTA, LSE2,
    out_batch, out_head, out_row, grad_batch, grad_head, grad_row, num_queries, heads,
    HEAD_DIM: tl.constexpr, ROW_BLOCK: tl.constexpr, DIM_BLOCK: tl.constexpr,
):  # fmt: skip
    """
    Grid `(row blocks, batch * heads)`: `DELTA`, the sum of output times gradient, and `LSE2`, the log-sum-exp in units
    of log 2, plus infinity for a blind row, so that all its weights come out as 0.
    """
    start = tl.program_id(0) * ROW_BLOCK
    batch, head = (tl.program_id(1) // heads).to(tl.int64), (tl.program_id(1) % heads).to(tl.int64)
    out_base = OUT + batch * out_batch + head * out_head
    grad_base = GRAD + batch * grad_batch + head * grad_head
    out = _load_tile(out_base, start, out_row, 0, num_queries, HEAD_DIM, ROW_BLOCK, DIM_BLOCK)
    grad = _load_tile(grad_base, start, grad_row, 0, num_queries, HEAD_DIM, ROW_BLOCK, DIM_BLOCK)
    rows = start + tl.arange(0, ROW_BLOCK)
    inside = rows < num_queries
    at = tl.program_id(1).to(tl.int64) * num_queries + rows
    lse = tl.load(LSE + at, mask=inside, other=0.0)
    tl.store(DELTA + at, tl.sum(out.to(tl.float32) * grad.to(tl.float32), 1), mask=inside)
    tl.store(LSE2 + at, tl.where(lse == float("-inf"), float("inf"), lse * LOG2E), mask=inside)


@triton.jit
def _far_moments(gradient, behind, offset, c, FAST: tl.constexpr):
    """
    Row sums of the gradient of the scores `(rows, columns)` of a far tile: of itself, times `psi` in units, times
    `d psi / d c`; from those of the gradient times powers of the column offset.
    """
    value, rate, inverse = _expand(behind, c, FAST)
    zero = tl.sum(gradient, 1)
    moment = gradient * offset[None, :]
    one = tl.sum(moment, 1)
    moment *= offset[None, :]
    two = tl.sum(moment, 1) * rate
    three = tl.sum(moment * offset[None, :], 1) * rate * rate
    psi = value * zero - LOG2E * rate * (one + 0.5 * two + 0.33333333333 * three)
    return zero, psi, behind * inverse * zero - inverse * inverse * (one + two + three)


@triton.jit(do_not_specialize=["num_queries", "num_keys", "segments"])
def _query_gradient_kernel(
    Q, K, V, GRAD, DQ, DELTA, LSE2, PIECES_GRAD, ROW_GRAD, C_GRAD, ROWS, SCALE, BLOCKS, EDGES, KEYS, VISIBLE, KNOTS,
    SLOPE, OFFSET, C,
    scaling, q_batch, q_head, q_row, k_batch, k_head, k_row, v_batch, v_head, v_row, grad_batch, grad_head, grad_row,
    dq_batch, dq_head, dq_row, keys_stride, visible_stride, num_queries, num_keys, heads, group, plan_batches, c_heads,
    segments,
    TRANSFORM: tl.constexpr, GENERAL: tl.constexpr, FAST: tl.constexpr, BIAS_GRAD: tl.constexpr,
    HEAD_DIM: tl.constexpr, ROW_BLOCK: tl.constexpr, COLUMN_BLOCK: tl.constexpr, DIM_BLOCK: tl.constexpr,
    KNOT_BLOCK: tl.constexpr, SEGMENT_BLOCK: tl.constexpr,
):  # fmt: skip
    """
    Grid `(row blocks, batch * heads)`: the gradient of a row block of queries, and its share of those of the bias:

    - `PIECES_GRAD`, `(batch * heads, row blocks, 2, SEGMENT_BLOCK)`: sums of the gradient of the scores by segment,
      and of that times `x`;
    - `ROW_GRAD`, `(batch * heads, queries)`: of `row_scale`;
    - `C_GRAD`, `(batch * heads, row blocks)`: of `c`.
    """
    blocks = tl.num_programs(0)
    block = blocks - 1 - tl.program_id(0)
    batch, head = tl.program_id(1) // heads, tl.program_id(1) % heads
    plan_batch, c_head = batch % plan_batches, head % c_heads
    plan = (plan_batch * c_heads + c_head) * blocks + block
    fields, edges = BLOCKS + plan * FIELDS, EDGES + plan * 4 * KNOT_BLOCK
    begin, end = tl.load(fields + BEGIN), tl.load(fields + END)
    full_begin, full_end = tl.load(fields + FULL_BEGIN), tl.load(fields + FULL_END)
    last_far, precise = tl.load(fields + LAST_FAR), tl.load(fields + PRECISE) != 0

    wide_batch, wide_head, wide_kv = batch.to(tl.int64), head.to(tl.int64), (head // group).to(tl.int64)
    k_base = K + wide_batch * k_batch + wide_kv * k_head
    v_base = V + wide_batch * v_batch + wide_kv * v_head
    keys_base = KEYS + wide_batch * keys_stride if GENERAL else KEYS
    visible_base = VISIBLE + wide_batch * visible_stride if VISIBLE is not None else VISIBLE
    slopes, offsets = SLOPE + head * segments, OFFSET + head * segments
    c = tl.load(C + c_head)

    row_start = block * ROW_BLOCK
    rows = row_start + tl.arange(0, ROW_BLOCK)
    inside = rows < num_queries
    stored = ROWS + plan_batch * 3 * num_queries + rows
    query = tl.load(stored, mask=inside, other=0)
    scale = tl.load(SCALE + plan_batch * num_queries + rows, mask=inside, other=0.0)
    at = tl.program_id(1).to(tl.int64) * num_queries + rows
    lse2 = tl.load(LSE2 + at, mask=inside, other=float("inf"))
    delta = tl.load(DELTA + at, mask=inside, other=0.0)
    q_base = Q + wide_batch * q_batch + wide_head * q_head
    q = _load_tile(q_base, row_start, q_row, 0, num_queries, HEAD_DIM, ROW_BLOCK, DIM_BLOCK)
    grad_base = GRAD + wide_batch * grad_batch + wide_head * grad_head
    grad = _load_tile(grad_base, row_start, grad_row, 0, num_queries, HEAD_DIM, ROW_BLOCK, DIM_BLOCK)

    dq = tl.zeros([ROW_BLOCK, DIM_BLOCK], tl.float32)
    low, high, change, slope, constant = 0, 0, -BEYOND, 0.0, 0.0
    # Sums over the tiles since `low` last changed, by row; then what has been settled, by segment and by row.
    mass = tl.zeros([ROW_BLOCK], tl.float32)
    psi_mass = tl.zeros([ROW_BLOCK], tl.float32)
    segment = tl.arange(0, SEGMENT_BLOCK)
    by_segment = tl.zeros([SEGMENT_BLOCK], tl.float32)
    x_by_segment = tl.zeros([SEGMENT_BLOCK], tl.float32)
    row_grad = tl.zeros([ROW_BLOCK], tl.float32)
    c_grad = tl.zeros([ROW_BLOCK], tl.float32)
    for start in range(begin // COLUMN_BLOCK * COLUMN_BLOCK, end, COLUMN_BLOCK):
        k = _load_tile(k_base, start, k_row, begin, end, HEAD_DIM, COLUMN_BLOCK, DIM_BLOCK)
        product = _dot(q, tl.trans(k), None, FAST)
        origin, offset, leftmost, rightmost, visible = _columns(
            keys_base, visible_base, start, num_keys, GENERAL, COLUMN_BLOCK
        )
        if GENERAL or start >= change:
            previous = low
            low, high, change = _locate_planned(edges, leftmost, rightmost, COLUMN_BLOCK, KNOT_BLOCK)
            if BIAS_GRAD and low != previous:
                by_segment += tl.where(segment == previous, tl.sum(mass, 0), 0.0)
                x_by_segment += tl.where(segment == previous, tl.sum(psi_mass * scale, 0), 0.0)
                row_grad += slope * psi_mass
                mass = tl.zeros_like(mass)
                psi_mass = tl.zeros_like(psi_mass)
            slope, constant = tl.load(slopes + low) * LOG2E, tl.load(offsets + low) * LOG2E
        behind = (query - origin).to(tl.float32)
        far = start <= last_far
        scores = _scores(
            product, scaling * LOG2E, behind[:, None], offset[None, :], scale[:, None], slope, constant, c, low, high,
            far, precise, KNOTS, slopes, TRANSFORM, FAST,
        )  # fmt: skip
        if GENERAL or start < full_begin or start + COLUMN_BLOCK > full_end:
            first = tl.load(stored + num_queries, mask=inside, other=0)
            last = tl.load(stored + 2 * num_queries, mask=inside, other=0)
            column = start + tl.arange(0, COLUMN_BLOCK)
            seen = (first[:, None] <= column[None, :]) & (column[None, :] < last[:, None]) & visible[None, :]
            scores = tl.where(seen, scores, float("-inf"))
        weights = tl.math.exp2(scores - lse2[:, None])
        v = _load_tile(v_base, start, v_row, begin, end, HEAD_DIM, COLUMN_BLOCK, DIM_BLOCK)
        gradient = weights * (_dot(grad, tl.trans(v), None, FAST) - delta[:, None])
        dq = _dot(gradient.to(k.dtype), k, dq, FAST)
        if BIAS_GRAD:
            if far and high == low:
                zero, psi, in_c = _far_moments(gradient, behind, offset, c, FAST)
                c_grad += slope * in_c
            else:
                units = _units(behind[:, None], offset[None, :], c, precise, TRANSFORM, FAST)
                zero, psi = tl.sum(gradient, 1), tl.sum(gradient * units, 1)
                if TRANSFORM != "identity":
                    in_c_slope = _slope_in_c(behind[:, None], offset[None, :], c, TRANSFORM, FAST)
                    c_grad += slope * tl.sum(gradient * in_c_slope, 1)
                for knot in range(low, high):
                    # What lies above the knot moves one segment up.
                    moved = tl.where(units * scale[:, None] > tl.load(KNOTS + knot), gradient, 0.0)
                    moved_psi = tl.sum(moved * units, 1)
                    direction = tl.where(segment == knot + 1, 1.0, tl.where(segment == knot, -1.0, 0.0))
                    by_segment += direction * tl.sum(tl.sum(moved, 1), 0)
                    x_by_segment += direction * tl.sum(moved_psi * scale, 0)
                    steeper = (tl.load(slopes + knot + 1) - tl.load(slopes + knot)) * LOG2E
                    row_grad += steeper * moved_psi
                    if TRANSFORM != "identity":
                        c_grad += steeper * tl.sum(moved * in_c_slope, 1)
            mass += zero
            psi_mass += psi

    dq_base = DQ + wide_batch * dq_batch + wide_head * dq_head
    _store_tile(dq_base, dq * scaling, row_start, dq_row, num_queries, HEAD_DIM, ROW_BLOCK, DIM_BLOCK)
    if BIAS_GRAD:
        by_segment += tl.where(segment == low, tl.sum(mass, 0), 0.0)
        x_by_segment += tl.where(segment == low, tl.sum(psi_mass * scale, 0), 0.0)
        row_grad += slope * psi_mass
        unit = LN2 if TRANSFORM == "log" else 1.0
        slot = tl.program_id(1).to(tl.int64) * blocks + block
        pieces_grad = PIECES_GRAD + slot * 2 * SEGMENT_BLOCK + segment
        tl.store(pieces_grad, by_segment)
        tl.store(pieces_grad + SEGMENT_BLOCK, x_by_segment)
        tl.store(ROW_GRAD + at, row_grad * (unit * LN2), mask=inside)
        tl.store(C_GRAD + slot, tl.sum(c_grad * scale, 0) * (LN2 / unit))


@triton.jit(do_not_specialize=["num_queries", "num_keys", "segments", "blocks"])
def _key_gradient_kernel(
    Q, K, V, GRAD, DK, DV, DELTA, LSE2, ROWS, SCALE, BLOCKS, EDGES, KEYS, VISIBLE, KNOTS, SLOPE, OFFSET, C,
    scaling, q_batch, q_head, q_row, k_batch, k_head, k_row, v_batch, v_head, v_row, grad_batch, grad_head, grad_row,
    dk_batch, dk_head, dk_row, dv_batch, dv_head, dv_row, keys_stride, visible_stride, num_queries, num_keys, heads,
    group, plan_batches, c_heads, segments, blocks,
    TRANSFORM: tl.constexpr, GENERAL: tl.constexpr, FAST: tl.constexpr, HEAD_DIM: tl.constexpr,
    ROW_BLOCK: tl.constexpr, COLUMN_BLOCK: tl.constexpr, DIM_BLOCK: tl.constexpr, KNOT_BLOCK: tl.constexpr,
    SCAN_BLOCK: tl.constexpr,
):  # fmt: skip
    """Grid `(column blocks, batch * key heads)`: gradients of a column block, over the query heads of its group."""
    kv_heads = heads // group
    start = tl.program_id(0) * COLUMN_BLOCK
    batch, kv_head = tl.program_id(1) // kv_heads, tl.program_id(1) % kv_heads
    plan_batch = batch % plan_batches
    wide_batch, wide_kv = batch.to(tl.int64), kv_head.to(tl.int64)

    # The row blocks that see these columns, as a range: in causal order, half of all.
    first_block, end_block, seen_begin, seen_end = blocks, 0, num_keys, 0
    for scanned in range(0, blocks, SCAN_BLOCK):
        block = scanned + tl.arange(0, SCAN_BLOCK)
        fields = BLOCKS + (plan_batch * c_heads * blocks + block) * FIELDS
        begin = tl.load(fields + BEGIN, mask=block < blocks, other=0)
        end = tl.load(fields + END, mask=block < blocks, other=0)
        sees = (begin < start + COLUMN_BLOCK) & (end > start)
        first_block = tl.minimum(first_block, tl.min(tl.where(sees, block, blocks), 0))
        end_block = tl.maximum(end_block, tl.max(tl.where(sees, block + 1, 0), 0))
        seen_begin = tl.minimum(seen_begin, tl.min(tl.where(sees, begin, num_keys), 0))
        seen_end = tl.maximum(seen_end, tl.max(tl.where(sees, end, 0), 0))

    k_base = K + wide_batch * k_batch + wide_kv * k_head
    v_base = V + wide_batch * v_batch + wide_kv * v_head
    k = _load_tile(k_base, start, k_row, seen_begin, seen_end, HEAD_DIM, COLUMN_BLOCK, DIM_BLOCK)
    v = _load_tile(v_base, start, v_row, seen_begin, seen_end, HEAD_DIM, COLUMN_BLOCK, DIM_BLOCK)
    keys_base = KEYS + wide_batch * keys_stride if GENERAL else KEYS
    visible_base = VISIBLE + wide_batch * visible_stride if VISIBLE is not None else VISIBLE
    origin, offset, leftmost, rightmost, visible = _columns(
        keys_base, visible_base, start, num_keys, GENERAL, COLUMN_BLOCK
    )
    column = start + tl.arange(0, COLUMN_BLOCK)

    dk = tl.zeros([COLUMN_BLOCK, DIM_BLOCK], tl.float32)
    dv = tl.zeros([COLUMN_BLOCK, DIM_BLOCK], tl.float32)
    for member in range(0, group):
        head = kv_head * group + member
        wide_head = tl.cast(head, tl.int64)
        c_head = head % c_heads
        plans = (plan_batch * c_heads + c_head) * blocks
        slopes, offsets = SLOPE + head * segments, OFFSET + head * segments
        c = tl.load(C + c_head)
        q_base = Q + wide_batch * q_batch + wide_head * q_head
        grad_base = GRAD + wide_batch * grad_batch + wide_head * grad_head
        per_head = (wide_batch * heads + wide_head) * num_queries
        for block in range(first_block, end_block):
            row_start = block * ROW_BLOCK
            rows = row_start + tl.arange(0, ROW_BLOCK)
            inside = rows < num_queries
            stored = ROWS + plan_batch * 3 * num_queries + rows
            fields, edges = BLOCKS + (plans + block) * FIELDS, EDGES + (plans + block) * 4 * KNOT_BLOCK
            low, high, _ = _locate_planned(edges, leftmost, rightmost, COLUMN_BLOCK, KNOT_BLOCK)
            slope, constant = tl.load(slopes + low) * LOG2E, tl.load(offsets + low) * LOG2E
            query = tl.load(stored, mask=inside, other=0)
            scale = tl.load(SCALE + plan_batch * num_queries + rows, mask=inside, other=0.0)
            q = _load_tile(q_base, row_start, q_row, 0, num_queries, HEAD_DIM, ROW_BLOCK, DIM_BLOCK)
            product = _dot(k, tl.trans(q), None, FAST)
            scores = _scores(
                product, scaling * LOG2E, (query - origin).to(tl.float32)[None, :], offset[:, None], scale[None, :],
                slope, constant, c, low, high, start <= tl.load(fields + LAST_FAR),
                tl.load(fields + PRECISE) != 0, KNOTS, slopes, TRANSFORM, FAST,
            )  # fmt: skip
            full_begin, full_end = tl.load(fields + FULL_BEGIN), tl.load(fields + FULL_END)
            if GENERAL or start < full_begin or start + COLUMN_BLOCK > full_end:
                first = tl.load(stored + num_queries, mask=inside, other=0)
                last = tl.load(stored + 2 * num_queries, mask=inside, other=0)
                seen = (first[None, :] <= column[:, None]) & (column[:, None] < last[None, :]) & visible[:, None]
                scores = tl.where(seen, scores, float("-inf"))
            lse2 = tl.load(LSE2 + per_head + rows, mask=inside, other=float("inf"))
            weights = tl.math.exp2(scores - lse2[None, :])
            grad = _load_tile(grad_base, row_start, grad_row, 0, num_queries, HEAD_DIM, ROW_BLOCK, DIM_BLOCK)
            dv = _dot(weights.to(grad.dtype), grad, dv, FAST)
            delta = tl.load(DELTA + per_head + rows, mask=inside, other=0.0)
            gradient = weights * (_dot(v, tl.trans(grad), None, FAST) - delta[None, :])
            dk = _dot(gradient.to(q.dtype), q, dk, FAST)

    dk_base = DK + wide_batch * dk_batch + wide_kv * dk_head
    dv_base = DV + wide_batch * dv_batch + wide_kv * dv_head
    _store_tile(dk_base, dk * scaling, start, dk_row, num_keys, HEAD_DIM, COLUMN_BLOCK, DIM_BLOCK)
    _store_tile(dv_base, dv, start, dv_row, num_keys, HEAD_DIM, COLUMN_BLOCK, DIM_BLOCK)


# ---------------------------------------------------------------- decoding


@triton.jit(do_not_specialize=["num_queries", "num_keys", "num_knots", "splits"])
def _decode_kernel(
    Q, K, V, PART, TOTALS, QUERY, FIRST, LAST, ROW_SCALE, KEYS, VISIBLE, KNOTS, SLOPE, OFFSET, C,
    scaling, q_batch, q_head, q_row, k_batch, k_head, k_row, v_batch, v_head, v_row, query_stride, first_stride,
    last_stride, scale_stride, keys_stride, visible_stride, num_queries, num_keys, kv_heads, group, num_knots, splits,
    C_PER_HEAD: tl.constexpr, TRANSFORM: tl.constexpr, GENERAL: tl.constexpr, FAST: tl.constexpr,
    HEAD_DIM: tl.constexpr, GROUP_BLOCK: tl.constexpr, COLUMN_BLOCK: tl.constexpr, DIM_BLOCK: tl.constexpr,
    KNOT_BLOCK: tl.constexpr,
):  # fmt: skip
    """
    Grid `(splits, batch * key heads * queries)`: one query beside one part of its keys, for all heads of a group,
    which share the `x` of a key. Stores the output before normalisation in `PART`, float32
    `(grid, GROUP_BLOCK, DIM_BLOCK)`, and the largest score and the sum of weights in `TOTALS`, float32
    `(grid, 2, GROUP_BLOCK)`.
    """
    row = tl.program_id(1) % num_queries
    batch, kv_head = tl.program_id(1) // num_queries // kv_heads, tl.program_id(1) // num_queries % kv_heads
    wide_batch, wide_kv = batch.to(tl.int64), kv_head.to(tl.int64)
    query = tl.load(QUERY + batch * query_stride + row).to(tl.int32)
    first = tl.maximum(tl.load(FIRST + batch * first_stride + row), 0).to(tl.int32)
    last = tl.minimum(tl.load(LAST + batch * last_stride + row), num_keys).to(tl.int32)
    scale = tl.load(ROW_SCALE + batch * scale_stride + row).to(tl.float32)

    member = tl.arange(0, GROUP_BLOCK)
    head = kv_head * group + tl.minimum(member, group - 1)
    dim = tl.arange(0, DIM_BLOCK)
    q_base = Q + wide_batch * q_batch + row.to(tl.int64) * q_row
    q = tl.load(q_base + head.to(tl.int64)[:, None] * q_head + dim[None, :], mask=(dim < HEAD_DIM)[None, :], other=0.0)
    k_base = K + wide_batch * k_batch + wide_kv * k_head
    v_base = V + wide_batch * v_batch + wide_kv * v_head
    keys_base = KEYS + wide_batch * keys_stride if GENERAL else KEYS
    visible_base = VISIBLE + wide_batch * visible_stride if VISIBLE is not None else VISIBLE
    slopes, offsets = SLOPE + head * (num_knots + 1), OFFSET + head * (num_knots + 1)
    c = tl.load(C + head)[:, None] if C_PER_HEAD else tl.load(C)

    knots = tl.arange(0, KNOT_BLOCK)
    knot_x = tl.load(KNOTS + knots, mask=knots < num_knots, other=float("inf"))
    reach_low, reach_high = _reach(knot_x[None, :], tl.full([1, 1], scale, tl.float32), c, TRANSFORM)
    reach_low, reach_high = tl.min(reach_low, 0), tl.max(reach_high, 0)
    behind_all, behind_any = query - reach_high, query - reach_low
    ahead_any, ahead_all = query + reach_low, query + reach_high
    unit = LN2 if TRANSFORM == "log" else 1.0

    # Keys of this part: an equal share, in whole tiles.
    tiles = tl.cdiv(tl.maximum(last - first, 0), COLUMN_BLOCK * splits)
    begin = first + tl.program_id(0) * tiles * COLUMN_BLOCK
    end = tl.minimum(begin + tiles * COLUMN_BLOCK, last)
    accumulator = tl.zeros([GROUP_BLOCK, DIM_BLOCK], tl.float32)
    total = tl.zeros([GROUP_BLOCK], tl.float32)
    largest = tl.full([GROUP_BLOCK], LOWEST, tl.float32)
    low, high, change = 0, 0, -BEYOND
    slope = tl.zeros([GROUP_BLOCK], tl.float32)
    constant = tl.zeros([GROUP_BLOCK], tl.float32)
    for start in range(begin, end, COLUMN_BLOCK):
        k = _load_tile(k_base, start, k_row, begin, end, HEAD_DIM, COLUMN_BLOCK, DIM_BLOCK)
        product = _dot(q, tl.trans(k), None, FAST)
        origin, offset, leftmost, rightmost, visible = _columns(
            keys_base, visible_base, start, num_keys, GENERAL, COLUMN_BLOCK
        )
        if GENERAL or start >= change:
            low, high = _locate(behind_all, behind_any, ahead_any, ahead_all, leftmost, rightmost, KNOT_BLOCK)
            change = _next_change(behind_all, behind_any, ahead_any, ahead_all, leftmost, COLUMN_BLOCK)
            slope, constant = tl.load(slopes + low) * LOG2E, tl.load(offsets + low) * LOG2E
        behind = (query - origin).to(tl.float32)
        x = _units(behind, offset[None, :], c, True, TRANSFORM, FAST) * (scale * unit)
        scores = product * (scaling * LOG2E) + (x * slope[:, None] + constant[:, None])
        if high > low:
            for knot in range(low, high):
                steeper = (tl.load(slopes + knot + 1) - tl.load(slopes + knot)) * LOG2E
                scores += steeper[:, None] * tl.maximum(x - tl.load(KNOTS + knot), 0.0)
        column = start + tl.arange(0, COLUMN_BLOCK)
        scores = tl.where((visible & (column < end))[None, :], scores, float("-inf"))
        raised = tl.maximum(largest, tl.max(scores, 1))
        weights = tl.math.exp2(scores - raised[:, None])
        shrink = tl.math.exp2(largest - raised)
        total = total * shrink + tl.sum(weights, 1)
        v = _load_tile(v_base, start, v_row, begin, end, HEAD_DIM, COLUMN_BLOCK, DIM_BLOCK)
        accumulator = _dot(weights.to(v.dtype), v, accumulator * shrink[:, None], FAST)
        largest = raised

    part = tl.program_id(1).to(tl.int64) * splits + tl.program_id(0)
    tl.store(PART + (part * GROUP_BLOCK + member[:, None]) * DIM_BLOCK + dim[None, :], accumulator)
    tl.store(TOTALS + part * 2 * GROUP_BLOCK + member, largest)
    tl.store(TOTALS + (part * 2 + 1) * GROUP_BLOCK + member, total)


@triton.jit(do_not_specialize=["num_queries", "splits"])
def _combine_kernel(
    PART, TOTALS, OUT, LSE,
    out_batch, out_head, out_row, num_queries, heads, group, splits,
    HEAD_DIM: tl.constexpr, GROUP_BLOCK: tl.constexpr, DIM_BLOCK: tl.constexpr, SPLIT_BLOCK: tl.constexpr,
):  # fmt: skip
    """Grid `(batch * heads * queries)`: the parts of one query and head, put together."""
    row = tl.program_id(0) % num_queries
    batch, head = tl.program_id(0) // num_queries // heads, tl.program_id(0) // num_queries % heads
    kv_heads = heads // group
    split, dim = tl.arange(0, SPLIT_BLOCK), tl.arange(0, DIM_BLOCK)
    inside = split < splits
    part = ((batch * kv_heads + head // group) * num_queries + row).to(tl.int64) * splits + split
    member = head % group
    largest = tl.load(TOTALS + part * 2 * GROUP_BLOCK + member, mask=inside, other=LOWEST)
    total = tl.load(TOTALS + (part * 2 + 1) * GROUP_BLOCK + member, mask=inside, other=0.0)
    pointers = PART + (part * GROUP_BLOCK + member)[:, None] * DIM_BLOCK + dim[None, :]
    parts = tl.load(pointers, mask=inside[:, None], other=0.0)
    top = tl.max(largest, 0)
    share = tl.math.exp2(largest - top)
    total = tl.sum(total * share, 0)
    output = tl.sum(parts * share[:, None], 0) / tl.where(total > 0.0, total, 1.0)
    out_base = OUT + batch.to(tl.int64) * out_batch + head.to(tl.int64) * out_head + row.to(tl.int64) * out_row
    tl.store(out_base + dim, output.to(OUT.dtype.element_ty), mask=dim < HEAD_DIM)
    lse = tl.where(total > 0.0, (top + tl.log2(total)) * LN2, float("-inf"))
    tl.store(LSE + tl.program_id(0), lse)


# ---------------------------------------------------------------- sizes


class Blocks(NamedTuple):
    """Rows and columns of a tile, and how a kernel is compiled: warps, and stages of the loop over tiles."""

    rows: int
    columns: int
    warps: int
    stages: int


HEAD_DIMS = (32, 64, 128, 256)
# By kernel and major compute capability, for each head dimension (rounded up to the next in `HEAD_DIMS`). Of the sizes
# without spills in the loop over tiles (`benchmarks/offline_compile.py`), those of the fewest instructions an element;
# those for 8 fit in 99 KiB of shared memory and serve what is not listed. With 16-bit inputs:
BLOCKS_16 = {
    ("forward", 8): (Blocks(128, 64, 8, 3), Blocks(128, 64, 8, 3), Blocks(128, 64, 8, 2), Blocks(64, 32, 8, 2)),
    ("forward", 9): (Blocks(128, 128, 8, 3), Blocks(128, 128, 8, 3), Blocks(128, 64, 8, 3), Blocks(128, 32, 8, 2)),
    ("forward", 10): (Blocks(128, 64, 8, 3), Blocks(128, 64, 8, 3), Blocks(128, 64, 8, 2), Blocks(64, 64, 8, 2)),
    ("query", 8): (Blocks(128, 32, 8, 2), Blocks(128, 32, 8, 2), Blocks(128, 16, 8, 2), Blocks(32, 32, 4, 2)),
    ("query", 9): (Blocks(128, 64, 8, 2), Blocks(128, 64, 8, 2), Blocks(128, 32, 8, 2), Blocks(128, 16, 8, 2)),
    # With 64 rows or more, Triton (3.6 to 3.9) fails at sums of row sums on sm_100.
    ("query", 10): (Blocks(32, 32, 4, 2), Blocks(32, 64, 4, 2), Blocks(32, 64, 8, 2), Blocks(32, 32, 4, 2)),
    ("key", 8): (Blocks(64, 128, 8, 2), Blocks(32, 128, 8, 2), Blocks(64, 64, 8, 2), Blocks(32, 32, 8, 2)),
    ("key", 9): (Blocks(64, 128, 8, 2), Blocks(64, 128, 8, 2), Blocks(32, 128, 8, 2), Blocks(16, 32, 4, 2)),
    ("key", 10): (Blocks(64, 128, 8, 2), Blocks(32, 128, 8, 2), Blocks(32, 32, 4, 2), Blocks(32, 32, 8, 2)),
    ("decode", 8): (Blocks(1, 128, 4, 3), Blocks(1, 128, 4, 3), Blocks(1, 64, 4, 3), Blocks(1, 64, 4, 2)),
}
# With float32 inputs, whose products are computed in full precision, without tensor cores:
BLOCKS_32 = {
    ("forward", 8): (Blocks(64, 32, 8, 2), Blocks(64, 32, 8, 2), Blocks(32, 32, 8, 1), Blocks(32, 32, 8, 1)),
    ("query", 8): (Blocks(32, 32, 8, 2), Blocks(32, 32, 8, 2), Blocks(32, 32, 8, 2), Blocks(16, 16, 8, 2)),
    ("key", 8): (Blocks(32, 32, 8, 2), Blocks(32, 32, 8, 1), Blocks(32, 32, 8, 1), Blocks(16, 16, 8, 1)),
    ("decode", 8): (Blocks(1, 64, 8, 2), Blocks(1, 64, 8, 2), Blocks(1, 32, 8, 2), Blocks(1, 32, 8, 1)),
}
# Up to this many queries, the keys are split between programs instead.
DECODE_QUERIES = 4


def power_of_two(number: int, least: int = 16) -> int:
    """`number` rounded up to a power of two."""
    return max(least, triton.next_power_of_2(number))


def block_sizes(kernel: str, dtype: torch.dtype, head_dim: int, capability: int) -> Blocks:
    """The tile sizes of a kernel on GPUs of a major compute capability."""
    table = BLOCKS_32 if dtype == torch.float32 else BLOCKS_16
    sizes = table.get((kernel, capability), table[kernel, 8])
    return next(blocks for blocks, largest in zip(sizes, HEAD_DIMS, strict=True) if head_dim <= largest)


def block_sizes_for(kernel: str, query: torch.Tensor) -> Blocks:
    """[`block_sizes`] for the type, head dimension and device of `query`."""
    capability = torch.cuda.get_device_capability(query.device)[0] if query.is_cuda else 8
    return block_sizes(kernel, query.dtype, query.shape[-1], capability)


def score_tolerance(query: torch.Tensor) -> float:
    """The error of a score (in nats) that the expansion of `psi` may make: far below that of the inputs' type."""
    return 2e-6 if query.dtype == torch.float32 else 2e-5


# ---------------------------------------------------------------- launches


def strides(*tensors: torch.Tensor) -> list[int]:
    """Strides of all dimensions but the last, which is dense."""
    return [stride for tensor in tensors for stride in tensor.stride()[:-1]]


def batch_stride(tensor: torch.Tensor | None) -> int:
    """The step from one sequence to the next in a tensor `(batch or 1, n)`."""
    return 0 if tensor is None or tensor.shape[0] == 1 else tensor.stride(0)


class Rows(NamedTuple):
    """What the kernels read of the bias and the positions, dense and in float32 where it is not integer."""

    query: torch.Tensor
    first: torch.Tensor
    last: torch.Tensor
    scale: torch.Tensor
    keys: torch.Tensor | None
    visible: torch.Tensor | None
    knots: torch.Tensor
    slope: torch.Tensor
    offset: torch.Tensor
    c: torch.Tensor

    @classmethod
    def of(cls, bias: PiecewiseBias, positions: FirePositions) -> "Rows":
        fields = [positions.query, positions.first, positions.last, bias.row_scale.float()]
        fields += [None, None] if positions.consecutive else [positions.key, positions.visible]
        fields += [bias.knots.float(), bias.slope.float(), bias.offset.float(), bias.c.float()]
        return cls(*[None if field is None else field.detach().contiguous() for field in fields])


def constants(query: torch.Tensor, bias: PiecewiseBias, positions: FirePositions, blocks: Blocks) -> dict[str, Any]:
    """Compile-time arguments that all kernels over tiles share."""
    return {
        "TRANSFORM": bias.transform,
        "GENERAL": not positions.consecutive,
        "FAST": query.is_cuda,  # the interpreter knows no assembly
        "HEAD_DIM": query.shape[-1],
        "COLUMN_BLOCK": blocks.columns,
        "DIM_BLOCK": power_of_two(query.shape[-1]),
        "KNOT_BLOCK": power_of_two(bias.knots.shape[0]),
        "enable_fp_fusion": True,  # the default of Triton 3.10 will be not to
        "num_warps": blocks.warps,
        "num_stages": blocks.stages,
    }


class Plan(NamedTuple):
    """What `_plan_kernel` stores, and how many row blocks, sequences and heads it distinguishes."""

    tensors: tuple[torch.Tensor, ...]
    blocks: int
    batches: int


def make_plan(
    query: torch.Tensor, key: torch.Tensor, bias: PiecewiseBias, rows: Rows, blocks: Blocks, general: bool
) -> Plan:
    """The plan for row blocks of `blocks.rows` beside tiles of `blocks.columns`."""
    num_queries, device = query.shape[2], query.device
    batches = max(field.shape[0] for field in rows[:4])
    c_heads = rows.c.shape[0]
    row_blocks = triton.cdiv(num_queries, blocks.rows)
    knot_block = power_of_two(rows.knots.shape[0])
    tensors = (
        torch.empty(batches, 3, num_queries, dtype=torch.int32, device=device),
        torch.empty(batches, num_queries, dtype=torch.float32, device=device),
        torch.empty(batches, c_heads, row_blocks, FIELDS.value, dtype=torch.int32, device=device),
        torch.empty(batches, c_heads, row_blocks, 4, knot_block, dtype=torch.int32, device=device),
    )
    _plan_kernel[(row_blocks, batches * c_heads)](
        *rows[:4], rows.knots, rows.slope.abs().amax(), rows.c, *tensors, *[batch_stride(field) for field in rows[:4]],
        num_queries, key.shape[2], rows.knots.shape[0], c_heads, score_tolerance(query), TRANSFORM=bias.transform,
        GENERAL=general, ROW_BLOCK=blocks.rows, COLUMN_BLOCK=blocks.columns, KNOT_BLOCK=knot_block,
    )  # fmt: skip
    return Plan(tensors, row_blocks, batches)


def tables(rows: Rows) -> tuple[torch.Tensor | None, ...]:
    return (rows.keys, rows.visible, rows.knots, rows.slope, rows.offset, rows.c)


def forward(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    bias: PiecewiseBias,
    positions: FirePositions,
    scaling: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """
    Attention with the bias, without a tensor of queries x keys.

    Args:
        query (`torch.Tensor` of shape `(batch, heads, queries, head_dim)`): float32, bfloat16 or float16.
        key, value (`torch.Tensor` of shape `(batch, key heads, keys, head_dim)`): `heads` is a multiple.
        bias ([`PiecewiseBias`]): of all `heads`.
        positions ([`FirePositions`]): with `first` and `last`.
        scaling (`float`): factor of the products of queries and keys.

    Returns:
        The output, shaped and typed like `query`, dense as `(batch, queries, heads, head_dim)`; and the natural
        log-sum-exp of the scores, float32 `(batch, heads, queries)`: minus infinity for a query that sees nothing.
    """
    batch, heads, num_queries, head_dim = query.shape
    output = query.new_empty(batch, num_queries, heads, head_dim).transpose(1, 2)
    lse = torch.empty(batch, heads, num_queries, dtype=torch.float32, device=query.device)
    query, key, value = dense_rows(query), dense_rows(key), dense_rows(value)
    rows = Rows.of(bias, positions)
    with torch.cuda.device_of(query):
        if num_queries <= DECODE_QUERIES:
            decode(query, key, value, bias, positions, rows, scaling, output, lse)
            return output, lse
        blocks = block_sizes_for("forward", query)
        plan = make_plan(query, key, bias, rows, blocks, not positions.consecutive)
        _forward_kernel[(plan.blocks, batch * heads)](
            query, key, value, output, lse, *plan.tensors, *tables(rows), scaling, *strides(query, key, value, output),
            batch_stride(rows.keys), batch_stride(rows.visible), num_queries, key.shape[2], heads,
            heads // key.shape[1], plan.batches, rows.c.shape[0], rows.slope.shape[1], ROW_BLOCK=blocks.rows,
            **constants(query, bias, positions, blocks),
        )  # fmt: skip
    return output, lse


def dense_rows(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor with vectors of the head dimension in one piece."""
    return tensor if tensor.stride(-1) == 1 else tensor.contiguous()


def num_splits(programs: int, num_keys: int, columns: int, device: torch.device) -> int:
    """Into how many parts to split the keys, so that `programs` times that many fill the device twice."""
    processors = torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 4
    return max(1, min(triton.cdiv(2 * processors, programs), triton.cdiv(num_keys, 2 * columns), 64))


def decode(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    bias: PiecewiseBias,
    positions: FirePositions,
    rows: Rows,
    scaling: float,
    output: torch.Tensor,
    lse: torch.Tensor,
) -> None:
    """[`forward`] for a few queries: a program for each query and part of the keys, and one more to combine them."""
    batch, heads, num_queries, head_dim = query.shape
    kv_heads = key.shape[1]
    group = heads // kv_heads
    blocks = block_sizes_for("decode", query)
    programs = batch * kv_heads * num_queries
    splits = num_splits(programs, key.shape[2], blocks.columns, query.device)
    group_block, dim_block = power_of_two(group), power_of_two(head_dim)
    part = torch.empty(programs, splits, group_block, dim_block, dtype=torch.float32, device=query.device)
    totals = torch.empty(programs, splits, 2, group_block, dtype=torch.float32, device=query.device)
    _decode_kernel[(splits, programs)](
        query, key, value, part, totals, *rows[:4], *tables(rows), scaling, *strides(query, key, value),
        *[batch_stride(field) for field in rows[:6]], num_queries, key.shape[2], kv_heads, group, rows.knots.shape[0],
        splits, C_PER_HEAD=rows.c.shape[0] > 1, GROUP_BLOCK=group_block, **constants(query, bias, positions, blocks),
    )  # fmt: skip
    _combine_kernel[(batch * heads * num_queries,)](
        part, totals, output, lse, *strides(output), num_queries, heads, group, splits, HEAD_DIM=head_dim,
        GROUP_BLOCK=group_block, DIM_BLOCK=dim_block, SPLIT_BLOCK=triton.next_power_of_2(splits),
    )  # fmt: skip


def backward(
    grad_output: torch.Tensor,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    output: torch.Tensor,
    lse: torch.Tensor,
    bias: PiecewiseBias,
    positions: FirePositions,
    scaling: float,
    bias_grad: bool,
) -> tuple[torch.Tensor, ...]:
    """
    Gradients of [`forward`], given its results.

    Returns:
        Those of `query`, `key`, `value`, and of `slope`, `offset`, `c` and `row_scale` of the bias, shaped and typed
        like these; the last four are zeros unless `bias_grad`.
    """
    batch, heads, num_queries, head_dim = query.shape
    kv_heads, num_keys = key.shape[1], key.shape[2]
    dq, dk, dv = torch.empty_like(query), torch.empty_like(key), torch.empty_like(value)
    dq, dk, dv = dense_rows(dq), dense_rows(dk), dense_rows(dv)
    query, key, value, grad_output = dense_rows(query), dense_rows(key), dense_rows(value), dense_rows(grad_output)
    rows = Rows.of(bias, positions)
    by_query, by_key = block_sizes_for("query", query), block_sizes_for("key", query)
    segments = rows.slope.shape[1]
    segment_block = power_of_two(segments)
    row_blocks = triton.cdiv(num_queries, by_query.rows)
    lse2, delta = torch.empty_like(lse), torch.empty_like(lse)
    pieces_grad = lse.new_empty(batch, heads, row_blocks, 2, segment_block)
    row_grad = torch.empty_like(lse)
    c_grad = lse.new_empty(batch, heads, row_blocks)
    sizes = (num_queries, num_keys, heads, heads // kv_heads)
    key_strides = (batch_stride(rows.keys), batch_stride(rows.visible))
    with torch.cuda.device_of(query):
        _delta_kernel[(triton.cdiv(num_queries, 64), batch * heads)](
            output, grad_output, lse, delta, lse2, *strides(output, grad_output), num_queries, heads,
            HEAD_DIM=head_dim, ROW_BLOCK=64, DIM_BLOCK=power_of_two(head_dim),
        )  # fmt: skip
        plan = make_plan(query, key, bias, rows, by_query, not positions.consecutive)
        _query_gradient_kernel[(row_blocks, batch * heads)](
            query, key, value, grad_output, dq, delta, lse2, pieces_grad, row_grad, c_grad, *plan.tensors,
            *tables(rows), scaling, *strides(query, key, value, grad_output, dq), *key_strides, *sizes, plan.batches,
            rows.c.shape[0], segments, BIAS_GRAD=bias_grad, ROW_BLOCK=by_query.rows, SEGMENT_BLOCK=segment_block,
            **constants(query, bias, positions, by_query),
        )  # fmt: skip
        if by_key[:2] != by_query[:2]:
            plan = make_plan(query, key, bias, rows, by_key, not positions.consecutive)
        _key_gradient_kernel[(triton.cdiv(num_keys, by_key.columns), batch * kv_heads)](
            query, key, value, grad_output, dk, dv, delta, lse2, *plan.tensors, *tables(rows), scaling,
            *strides(query, key, value, grad_output, dk, dv), *key_strides, *sizes, plan.batches, rows.c.shape[0],
            segments, plan.blocks, ROW_BLOCK=by_key.rows, SCAN_BLOCK=128, **constants(query, bias, positions, by_key),
        )  # fmt: skip
    if not bias_grad:
        zeros = (torch.zeros_like(field) for field in (bias.slope, bias.offset, bias.c, bias.row_scale))
        return dq, dk, dv, *zeros
    return dq, dk, dv, *sum_bias_gradients(bias, pieces_grad, c_grad, row_grad)


def sum_bias_gradients(
    bias: PiecewiseBias, pieces_grad: torch.Tensor, c_grad: torch.Tensor, row_grad: torch.Tensor
) -> tuple[torch.Tensor, ...]:
    """Gradients of `slope`, `offset`, `c` and `row_scale`: the programs' shares added up, in float64."""
    pieces = pieces_grad.sum((0, 2), dtype=torch.float64)[..., : bias.slope.shape[1]]
    in_c = c_grad.sum((0, 2), dtype=torch.float64)
    if bias.c.shape[0] == 1:
        in_c = in_c.sum(0, keepdim=True)
    in_scale = row_grad.sum(1, dtype=torch.float64)
    if bias.row_scale.shape[0] == 1:
        in_scale = in_scale.sum(0, keepdim=True)
    return (
        pieces[:, 1].to(bias.slope.dtype),
        pieces[:, 0].to(bias.offset.dtype),
        in_c.to(bias.c.dtype),
        in_scale.to(bias.row_scale.dtype),
    )
