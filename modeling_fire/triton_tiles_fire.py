"""
What the GPU kernels share: `psi`, the plan of a row block, and the scores of a tile; see `triton_fire.py`.
"""

try:  # in a `try`: whoever loads a model with its code need not have Triton
    import triton
    import triton.language as tl
except ImportError as error:
    raise ImportError("The fused kernels for GPUs need Triton.") from error


LN2 = tl.constexpr(0.6931471805599453)
LOG2E = tl.constexpr(1.4426950408889634)
# Further than any column; the sum of a coordinate and this still fits in 32 bits.
BEYOND = tl.constexpr(1 << 29)
# A score of nobody: finite, so that a row that has seen nothing yet subtracts it without NaN.
LOWEST = tl.constexpr(-1e30)
# Fields of the plan of a row block, and how many numbers it takes, two of them unused.
BEGIN, END, FULL_BEGIN, FULL_END, LAST_FAR, PRECISE, FIELDS = (tl.constexpr(n) for n in (0, 1, 2, 3, 4, 5, 8))


@triton.jit
def _program(across):
    """
    Where in a grid `(across, ...)` this program is: blocks of one sequence and head are neighbours. The grid itself is
    flat: CUDA counts no further than 65,535 in other dimensions.
    """
    return tl.program_id(0) % across, tl.program_id(0) // across


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


@triton.jit(do_not_specialize=["num_queries", "num_keys", "num_knots", "blocks"])
def _plan_kernel(
    QUERY, FIRST, LAST, ROW_SCALE, KNOTS, STEEPEST, C, ROWS, SCALE, BLOCKS, EDGES,
    query_stride, first_stride, last_stride, scale_stride, num_queries, num_keys, num_knots, c_heads, blocks,
    tolerance,
    TRANSFORM: tl.constexpr, GENERAL: tl.constexpr, ROW_BLOCK: tl.constexpr, COLUMN_BLOCK: tl.constexpr,
    KNOT_BLOCK: tl.constexpr,
):  # fmt: skip
    """
    Grid `(row blocks, plan batch * heads of c)`, flat. Stores

    - `ROWS`, int32 `(plan batch, 3, queries)`: coordinate, first and last of each query, a blind one as `0, 0`;
    - `SCALE`, float32 `(plan batch, queries)`: `row_scale` times the unit of `psi`;
    - `BLOCKS`, int32 `(plan batch, heads of c, row blocks, FIELDS)`: columns that some row sees, columns that all rows
      see (of those that see any), the last column at which a far tile starts, whether small `psi` matter;
    - `EDGES`, int32 `(plan batch, heads of c, row blocks, 4, KNOT_BLOCK)`: see `_locate`.
    """
    block, instance = _program(blocks)
    batch, head = instance // c_heads, instance % c_heads
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
    if TRANSFORM == "none":
        return product * sharpness
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
