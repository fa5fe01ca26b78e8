"""The GPU kernels of the backward pass: gradients of keys and values, then those of queries and of the bias."""

try:  # in a `try`: whoever loads a model with its code need not have Triton
    import triton
    import triton.language as tl
except ImportError as error:
    raise ImportError("The fused kernels for GPUs need Triton.") from error

from .triton_tiles_fire import (
    BEGIN,
    BEYOND,
    END,
    FIELDS,
    FULL_BEGIN,
    FULL_END,
    LAST_FAR,
    LN2,
    LOG2E,
    PRECISE,
    _columns,
    _dot,
    _expand,
    _load_tile,
    _locate_planned,
    _program,
    _scores,
    _slope_in_c,
    _store_tile,
    _units,
)


@triton.jit(do_not_specialize=["num_queries", "blocks"])
def _delta_kernel(
    OUT, GRAD, LSE, DELTA, LSE2, GRID,
    out_batch, out_head, out_row, grad_batch, grad_head, grad_row, num_queries, heads, blocks,
    HEAD_DIM: tl.constexpr, ROW_BLOCK: tl.constexpr, DIM_BLOCK: tl.constexpr,
):  # fmt: skip
    """
    Grid `(row blocks, batch * heads)`, flat. Stores, float32 `(batch * heads, queries)`:

    - `DELTA`, the sum of output times gradient;
    - `LSE2`, the log-sum-exp in units of log 2, plus infinity for a blind row, so that all its weights come out as 0;
    - `GRID`, if it is given: see `_add_exactly`.
    """
    block, instance = _program(blocks)
    start = block * ROW_BLOCK
    batch, head = (instance // heads).to(tl.int64), (instance % heads).to(tl.int64)
    out_base = OUT + batch * out_batch + head * out_head
    grad_base = GRAD + batch * grad_batch + head * grad_head
    out = _load_tile(out_base, start, out_row, 0, num_queries, HEAD_DIM, ROW_BLOCK, DIM_BLOCK)
    grad = _load_tile(grad_base, start, grad_row, 0, num_queries, HEAD_DIM, ROW_BLOCK, DIM_BLOCK)
    rows = start + tl.arange(0, ROW_BLOCK)
    inside = rows < num_queries
    at = instance.to(tl.int64) * num_queries + rows
    lse = tl.load(LSE + at, mask=inside, other=0.0)
    product = out.to(tl.float32) * grad.to(tl.float32)
    tl.store(DELTA + at, tl.sum(product, 1), mask=inside)
    tl.store(LSE2 + at, tl.where(lse == float("-inf"), float("inf"), lse * LOG2E), mask=inside)
    if GRID is not None:
        # The power of two below that sum of magnitudes, times 2 ** -30 and 1.5 * 2 ** 23.
        power = (tl.sum(tl.abs(product), 1).to(tl.int32, bitcast=True) & 0x7F800000).to(tl.float32, bitcast=True)
        tl.store(GRID + at, power * 0.01171875, mask=inside)


@triton.jit
def _add_exactly(TOTALS, GRID, gradient, at, inside, COLUMN_BLOCK: tl.constexpr, ROW_BLOCK: tl.constexpr):
    """
    Adds the sums over columns of `gradient`, float32 `(COLUMN_BLOCK, ROW_BLOCK)`, to the float64 `TOTALS`, in any
    order with the same result. What is added is rounded to multiples of one power of two for each row, by adding and
    subtracting `GRID`, 1.5 * 2 ** 23 times as large. So no total is rounded below 2 ** 53 of that, which is millions
    of times the size of what is summed.
    """
    # Sixteen columns at a time: more would go from warp to warp, fewer make more additions to memory.
    terms = tl.sum(tl.reshape(gradient, [COLUMN_BLOCK // 16, 16, ROW_BLOCK]), 1)
    grid = tl.load(GRID + at, mask=inside, other=0.0)[None, :]
    totals = tl.broadcast_to((TOTALS + at)[None, :], [COLUMN_BLOCK // 16, ROW_BLOCK])
    tl.atomic_add(totals, ((terms + grid) - grid).to(tl.float64), mask=inside[None, :], sem="relaxed")


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


@triton.jit(do_not_specialize=["num_queries", "num_keys", "segments", "blocks"])
def _query_gradient_kernel(
    Q, K, V, GRAD, DQ, DELTA, LSE2, EXCESS, PIECES_GRAD, ROW_GRAD, C_GRAD, ROWS, SCALE, BLOCKS, EDGES, KEYS,
    VISIBLE, KNOTS, SLOPE, OFFSET, C,
    scaling, q_batch, q_head, q_row, k_batch, k_head, k_row, v_batch, v_head, v_row, grad_batch, grad_head, grad_row,
    dq_batch, dq_head, dq_row, keys_stride, visible_stride, num_queries, num_keys, heads, group, plan_batches, c_heads,
    segments, blocks,
    TRANSFORM: tl.constexpr, GENERAL: tl.constexpr, FAST: tl.constexpr, BIAS_GRAD: tl.constexpr,
    HEAD_DIM: tl.constexpr, ROW_BLOCK: tl.constexpr, COLUMN_BLOCK: tl.constexpr, DIM_BLOCK: tl.constexpr,
    KNOT_BLOCK: tl.constexpr, SEGMENT_BLOCK: tl.constexpr,
):  # fmt: skip
    """
    Grid `(row blocks, batch * heads)`, flat: the gradient of a row block of queries, and its share of those of the
    bias:

    - `PIECES_GRAD`, `(batch * heads, row blocks, 2, SEGMENT_BLOCK)`: sums of the gradient of the scores by segment,
      and of that times `x`;
    - `ROW_GRAD`, `(batch * heads, queries)`: of `row_scale`;
    - `C_GRAD`, `(batch * heads, row blocks)`: of `c`.
    """
    block, instance = _program(blocks)
    block = blocks - 1 - block
    batch, head = instance // heads, instance % heads
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
    at = instance.to(tl.int64) * num_queries + rows
    lse2 = tl.load(LSE2 + at, mask=inside, other=float("inf"))
    delta = tl.load(DELTA + at, mask=inside, other=0.0)
    if EXCESS is not None:
        delta += tl.load(EXCESS + at, mask=inside, other=0.0).to(tl.float32)
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
        slot = instance.to(tl.int64) * blocks + block
        pieces_grad = PIECES_GRAD + slot * 2 * SEGMENT_BLOCK + segment
        tl.store(pieces_grad, by_segment)
        tl.store(pieces_grad + SEGMENT_BLOCK, x_by_segment)
        tl.store(ROW_GRAD + at, row_grad * (unit * LN2), mask=inside)
        tl.store(C_GRAD + slot, tl.sum(c_grad * scale, 0) * (LN2 / unit))


@triton.jit(do_not_specialize=["num_queries", "num_keys", "segments", "blocks", "column_blocks"])
def _key_gradient_kernel(
    Q, K, V, GRAD, DK, DV, DELTA, LSE2, EXCESS, GRID, ROWS, SCALE, BLOCKS, EDGES, KEYS, VISIBLE, KNOTS, SLOPE,
    OFFSET, C,
    scaling, q_batch, q_head, q_row, k_batch, k_head, k_row, v_batch, v_head, v_row, grad_batch, grad_head, grad_row,
    dk_batch, dk_head, dk_row, dv_batch, dv_head, dv_row, keys_stride, visible_stride, num_queries, num_keys, heads,
    group, plan_batches, c_heads, segments, blocks, column_blocks,
    TRANSFORM: tl.constexpr, GENERAL: tl.constexpr, FAST: tl.constexpr, HEAD_DIM: tl.constexpr,
    ROW_BLOCK: tl.constexpr, COLUMN_BLOCK: tl.constexpr, DIM_BLOCK: tl.constexpr, KNOT_BLOCK: tl.constexpr,
    SCAN_BLOCK: tl.constexpr,
):  # fmt: skip
    """
    Grid `(column blocks, batch * key heads)`, flat: gradients of a column block, over the query heads of its group.

    The gradient of a row's scores adds up to 0, if only `DELTA` is exact. Where it is the product of an output that
    was rounded to 16 bits, `EXCESS`, float64 `(batch * heads, queries)`, gets what it adds up to: for keys and values
    it is of no account, for the bias, whose gradients are sums over rows by distance, it is.
    """
    kv_heads = heads // group
    column_block, instance = _program(column_blocks)
    start = column_block * COLUMN_BLOCK
    batch, kv_head = instance // kv_heads, instance % kv_heads
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
            if EXCESS is not None:
                _add_exactly(EXCESS, GRID, gradient, per_head + rows, inside, COLUMN_BLOCK, ROW_BLOCK)
            dk = _dot(gradient.to(q.dtype), q, dk, FAST)

    dk_base = DK + wide_batch * dk_batch + wide_kv * dk_head
    dv_base = DV + wide_batch * dv_batch + wide_kv * dv_head
    _store_tile(dk_base, dk * scaling, start, dk_row, num_keys, HEAD_DIM, COLUMN_BLOCK, DIM_BLOCK)
    _store_tile(dv_base, dv, start, dv_row, num_keys, HEAD_DIM, COLUMN_BLOCK, DIM_BLOCK)
