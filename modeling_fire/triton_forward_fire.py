"""The GPU kernels of the forward pass: for blocks of queries, and for a few queries beside many keys."""

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
    LOWEST,
    PRECISE,
    _columns,
    _dot,
    _load_tile,
    _locate,
    _locate_planned,
    _next_change,
    _program,
    _reach,
    _scores,
    _store_tile,
    _units,
)


@triton.jit(do_not_specialize=["num_queries", "num_keys", "segments", "blocks"])
def _forward_kernel(
    Q, K, V, OUT, LSE, ROWS, SCALE, BLOCKS, EDGES, KEYS, VISIBLE, KNOTS, SLOPE, OFFSET, C,
    scaling, q_batch, q_head, q_row, k_batch, k_head, k_row, v_batch, v_head, v_row, out_batch, out_head, out_row,
    keys_stride, visible_stride, num_queries, num_keys, heads, group, plan_batches, c_heads, segments, blocks,
    TRANSFORM: tl.constexpr, GENERAL: tl.constexpr, FAST: tl.constexpr, HEAD_DIM: tl.constexpr,
    ROW_BLOCK: tl.constexpr, COLUMN_BLOCK: tl.constexpr, DIM_BLOCK: tl.constexpr, KNOT_BLOCK: tl.constexpr,
):  # fmt: skip
    """Grid `(row blocks, batch * heads)`, flat: output and log-sum-exp of a row block."""
    block, instance = _program(blocks)
    block = blocks - 1 - block  # the rows that see most first, so that none is left alone at the end
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
    sees = (first < last) & (total != 0.0)  # NaN is not nothing
    total = tl.where(sees, total, 1.0)
    output = tl.where(sees[:, None], accumulator / total[:, None], 0.0)
    lse = tl.where(sees, (largest + tl.log2(total)) * LN2, float("-inf"))
    out_base = OUT + wide_batch * out_batch + wide_head * out_head
    _store_tile(out_base, output, row_start, out_row, num_queries, HEAD_DIM, ROW_BLOCK, DIM_BLOCK)
    tl.store(LSE + instance.to(tl.int64) * num_queries + rows, lse, mask=inside)


@triton.jit(do_not_specialize=["num_queries", "num_keys", "num_knots", "splits"])
def _decode_kernel(
    Q, K, V, PART, TOTALS, QUERY, FIRST, LAST, ROW_SCALE, KEYS, VISIBLE, KNOTS, SLOPE, OFFSET, C, ABSOLUTE, eps,
    scaling, q_batch, q_head, q_row, k_batch, k_head, k_row, v_batch, v_head, v_row, query_stride, first_stride,
    last_stride, scale_stride, keys_stride, visible_stride, absolute_stride, num_queries, num_keys, kv_heads, group,
    num_knots, splits,
    C_PER_HEAD: tl.constexpr, TRANSFORM: tl.constexpr, GENERAL: tl.constexpr, FAST: tl.constexpr,
    HEAD_DIM: tl.constexpr, GROUP_BLOCK: tl.constexpr, COLUMN_BLOCK: tl.constexpr, DIM_BLOCK: tl.constexpr,
    KNOT_BLOCK: tl.constexpr,
):  # fmt: skip
    """
    Grid `(splits, batch * key heads * bundles * queries)`, flat: one query beside one part of its keys, for a bundle
    of heads of a group, which share the `x` of a key. With `ABSOLUTE`, `ROW_SCALE` is an upper limit; see
    `PiecewiseBias.eps`. Stores the output before normalisation in `PART`, float32
    `(grid, GROUP_BLOCK, DIM_BLOCK)`, and the largest score and the sum of weights in `TOTALS`, float32
    `(grid, 2, GROUP_BLOCK)`.
    """
    split, instance = _program(splits)
    row = instance % num_queries
    bundles = tl.cdiv(group, GROUP_BLOCK)
    bundle = instance // num_queries % bundles
    batch, kv_head = instance // num_queries // bundles // kv_heads, instance // num_queries // bundles % kv_heads
    wide_batch, wide_kv = batch.to(tl.int64), kv_head.to(tl.int64)
    query = tl.load(QUERY + batch * query_stride + row).to(tl.int32)
    first = tl.maximum(tl.load(FIRST + batch * first_stride + row), 0).to(tl.int32)
    last = tl.minimum(tl.load(LAST + batch * last_stride + row), num_keys).to(tl.int32)
    scale = tl.load(ROW_SCALE + batch * scale_stride + row).to(tl.float32)
    unit = LN2 if TRANSFORM == "log" else 1.0
    if ABSOLUTE is not None:
        absolute = tl.load(ABSOLUTE + batch * absolute_stride + row).to(tl.float32)
        scale = tl.minimum(scale, 1.0 / (_units(absolute, 0.0, tl.load(C), True, TRANSFORM, FAST) * unit + eps))

    member = tl.arange(0, GROUP_BLOCK)
    head = kv_head * group + tl.minimum(bundle * GROUP_BLOCK + member, group - 1)
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

    # Keys of this part: an equal share, in whole tiles.
    tiles = tl.cdiv(tl.maximum(last - first, 0), COLUMN_BLOCK * splits)
    begin = first + split * tiles * COLUMN_BLOCK
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
        scores = product * (scaling * LOG2E)
        if TRANSFORM != "none":
            x = _units(behind, offset[None, :], c, True, TRANSFORM, FAST) * (scale * unit)
            scores += x * slope[:, None] + constant[:, None]
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

    part = instance.to(tl.int64) * splits + split
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
    bundles, member = tl.cdiv(group, GROUP_BLOCK), head % group
    bundle = (batch * (heads // group) + head // group) * bundles + member // GROUP_BLOCK
    member %= GROUP_BLOCK
    split, dim = tl.arange(0, SPLIT_BLOCK), tl.arange(0, DIM_BLOCK)
    inside = split < splits
    part = (bundle * num_queries + row).to(tl.int64) * splits + split
    largest = tl.load(TOTALS + part * 2 * GROUP_BLOCK + member, mask=inside, other=LOWEST)
    total = tl.load(TOTALS + (part * 2 + 1) * GROUP_BLOCK + member, mask=inside, other=0.0)
    pointers = PART + (part * GROUP_BLOCK + member)[:, None] * DIM_BLOCK + dim[None, :]
    parts = tl.load(pointers, mask=inside[:, None], other=0.0)
    top = tl.max(largest, 0)
    share = tl.math.exp2(largest - top)
    total = tl.sum(total * share, 0)
    output = tl.sum(parts * share[:, None], 0) / tl.where(total != 0.0, total, 1.0)
    out_base = OUT + batch.to(tl.int64) * out_batch + head.to(tl.int64) * out_head + row.to(tl.int64) * out_row
    tl.store(out_base + dim, output.to(OUT.dtype.element_ty), mask=dim < HEAD_DIM)
    if LSE is not None:
        lse = tl.where(total != 0.0, (top + tl.log2(total)) * LN2, float("-inf"))  # NaN is not nothing
        tl.store(LSE + tl.program_id(0), lse)
