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
along its row block, and stored once in a slot of its own. The one sum that programs share, each row's in 16 bits, is
of terms on one grid, which add up the same in any order. So results repeat bitwise.

Scores are in units of log 2, so that `exp2` serves; `psi` is in *units* too: those of log 2 where it is a logarithm.
Nothing here waits for the device.
"""

from functools import cache
from typing import Any, NamedTuple

import torch

from .piecewise_fire import PiecewiseBias
from .positions_fire import FirePositions
from .triton_backward_fire import _delta_kernel, _key_gradient_kernel, _query_gradient_kernel
from .triton_forward_fire import _combine_kernel, _decode_kernel, _forward_kernel
from .triton_tiles_fire import FIELDS, _plan_kernel


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
    # With 64 rows Triton 3.7 rounds the second product to TF32 on sm_100, where keys stand anywhere.
    ("forward", 10): (Blocks(32, 32, 8, 2), Blocks(32, 32, 8, 2), Blocks(32, 32, 8, 1), Blocks(32, 32, 8, 1)),
    ("query", 8): (Blocks(32, 32, 8, 2), Blocks(32, 32, 8, 1), Blocks(32, 32, 4, 2), Blocks(16, 16, 4, 2)),
    ("key", 8): (Blocks(32, 32, 8, 2), Blocks(32, 32, 8, 1), Blocks(32, 32, 8, 1), Blocks(16, 16, 4, 1)),
    ("decode", 8): (Blocks(1, 64, 8, 2), Blocks(1, 64, 8, 2), Blocks(1, 32, 8, 2), Blocks(1, 16, 8, 2)),
}
# With 16 bits, where keys stand anywhere, `psi` is a power or each head has its own, which take more registers:
BLOCKS_16_HEAVY = {
    ("query", 9): (Blocks(128, 32, 8, 2), Blocks(128, 32, 8, 2), Blocks(128, 32, 8, 2), Blocks(32, 32, 4, 2)),
    ("decode", 10): (Blocks(1, 128, 4, 3), Blocks(1, 128, 4, 3), Blocks(1, 64, 4, 3), Blocks(1, 64, 8, 2)),
}
# Rows or columns of a tile, at most.
MAX_ROWS = 256
# Up to this many queries, each has programs of its own, which share its keys between them. So it is where there are
# many keys for each, up to `GUESSED_QUERIES` of one text, each of which reads all of them, or up to
# `SEPARATE_QUERIES` of requests side by side, which see few of them each.
DECODE_QUERIES, GUESSED_QUERIES, SEPARATE_QUERIES, KEYS_PER_QUERY = 4, 16, 256, 512
# Query heads of one key head that such a program takes together: the least that a matrix product has rows.
GROUP_BLOCK = 16


# Triton's own functions for these two are for kernels; called from outside they take as long as a small launch.
def ceil_div(number: int, divisor: int) -> int:
    """`number / divisor`, rounded up."""
    return -(-number // divisor)


def power_of_two(number: int, least: int = 16) -> int:
    """`number` rounded up to a power of two."""
    return max(least, 1 << (number - 1).bit_length())


@cache
def capability_and_processors(device: torch.device) -> tuple[int, int]:
    """Of a GPU: the major compute capability, and the number of multiprocessors. The interpreter is a small one."""
    if device.type != "cuda":
        return 8, 4
    properties = torch.cuda.get_device_properties(device)
    return properties.major, properties.multi_processor_count


@cache
def block_sizes(kernel: str, dtype: torch.dtype, head_dim: int, capability: int, heavy: bool = False) -> Blocks:
    """The tile sizes of a kernel on GPUs of a major compute capability; `heavy` as for `BLOCKS_16_HEAVY`."""
    table = BLOCKS_32 if dtype == torch.float32 else BLOCKS_16 | (BLOCKS_16_HEAVY if heavy else {})
    # Triton takes 11 for 10's instructions.
    sizes = table.get((kernel, 10 if capability == 11 else capability), table[kernel, 8])
    return next(blocks for blocks, largest in zip(sizes, HEAD_DIMS, strict=True) if head_dim <= largest)


def block_sizes_for(kernel: str, query: torch.Tensor, bias: PiecewiseBias, positions: FirePositions) -> Blocks:
    """[`block_sizes`] for the type, head dimension and device of `query`, and what else makes the kernel."""
    capability = capability_and_processors(query.device)[0]
    heavy = is_heavy(bias.transform, positions.consecutive, bias.c.shape[0] > 1)
    return block_sizes(kernel, query.dtype, query.shape[-1], capability, heavy)


def is_heavy(transform: str, consecutive: bool, c_per_head: bool) -> bool:
    """Whether a kernel takes more registers than that of FIRE at consecutive positions; see `BLOCKS_16_HEAVY`."""
    return transform == "power" or c_per_head or not consecutive


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
    absolute: torch.Tensor | None

    @classmethod
    def of(cls, bias: PiecewiseBias, positions: FirePositions) -> "Rows":
        """Of positions by [`kernel_positions`]."""
        keys, visible = (None, None) if positions.consecutive else (positions.key, positions.visible)
        absolute = None if bias.eps is None else positions.absolute
        knots, slope, offset, c, row_scale = (field.float() for field in bias[:5])
        fields = positions.query, positions.first, positions.last, row_scale, keys, visible, knots, slope, offset, c
        return cls(*[None if field is None else field.contiguous() for field in (*fields, absolute)])


def kernel_positions(positions: FirePositions) -> FirePositions:
    """The same positions as the kernels know them: they look at `visible` only beside coordinates of the keys."""
    return positions if positions.visible is None else positions._replace(consecutive=False)


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
    """What `_plan_kernel` stores, and how many row blocks and sequences it distinguishes."""

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
    row_blocks = ceil_div(num_queries, blocks.rows)
    knot_block = power_of_two(rows.knots.shape[0])
    tensors = (
        torch.empty(batches, 3, num_queries, dtype=torch.int32, device=device),
        torch.empty(batches, num_queries, dtype=torch.float32, device=device),
        torch.empty(batches, c_heads, row_blocks, FIELDS.value, dtype=torch.int32, device=device),
        torch.empty(batches, c_heads, row_blocks, 4, knot_block, dtype=torch.int32, device=device),
    )
    _plan_kernel[(row_blocks * batches * c_heads,)](
        *rows[:4], rows.knots, rows.slope.abs().amax(), rows.c, *tensors, *[batch_stride(field) for field in rows[:4]],
        num_queries, key.shape[2], rows.knots.shape[0], c_heads, row_blocks, score_tolerance(query),
        TRANSFORM=bias.transform, GENERAL=general, ROW_BLOCK=blocks.rows, COLUMN_BLOCK=blocks.columns,
        KNOT_BLOCK=knot_block,
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
    positions = kernel_positions(positions)
    output = query.new_empty(batch, num_queries, heads, head_dim).transpose(1, 2)
    lse = torch.empty(batch, heads, num_queries, dtype=torch.float32, device=query.device)
    query, key, value = dense_rows(query), dense_rows(key), dense_rows(value)
    rows = Rows.of(bias, positions)
    with torch.cuda.device_of(query):
        if decodes(num_queries, key.shape[2], positions.separate):
            decode(query, key, value, bias, positions, rows, scaling, output, lse)
            return output, lse
        blocks = block_sizes_for("forward", query, bias, positions)
        plan = make_plan(query, key, bias, rows, blocks, not positions.consecutive)
        _forward_kernel[(plan.blocks * batch * heads,)](
            query, key, value, output, lse, *plan.tensors, *tables(rows), scaling, *strides(query, key, value, output),
            batch_stride(rows.keys), batch_stride(rows.visible), num_queries, key.shape[2], heads,
            heads // key.shape[1], plan.batches, rows.c.shape[0], rows.slope.shape[1], plan.blocks,
            ROW_BLOCK=blocks.rows, **constants(query, bias, positions, blocks),
        )  # fmt: skip
    return output, lse


def dense_rows(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor with vectors of the head dimension in one piece, and no further apart than a tile can count."""
    near = tensor.stride(-2) * MAX_ROWS < 2**31
    return tensor if tensor.stride(-1) == 1 and near else tensor.contiguous()


def decodes(num_queries: int, num_keys: int, separate: bool) -> bool:
    """Whether so many queries beside so many keys are taken one by one; see `DECODE_QUERIES`."""
    most = SEPARATE_QUERIES if separate else GUESSED_QUERIES
    return num_queries <= DECODE_QUERIES or (num_queries <= most and num_keys >= KEYS_PER_QUERY * num_queries)


def num_splits(programs: int, num_keys: int, columns: int, device: torch.device) -> int:
    """Into how many parts to split the keys, so that `programs` times that many fill the device twice."""
    processors = capability_and_processors(device)[1]
    return max(1, min(ceil_div(2 * processors, max(1, programs)), ceil_div(num_keys, 2 * columns), 64))


def decode(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    bias: PiecewiseBias,
    positions: FirePositions,
    rows: Rows,
    scaling: float,
    output: torch.Tensor,
    lse: torch.Tensor | None,
) -> None:
    """[`forward`] for queries taken one by one: a program for each and a part of the keys, and one to combine them."""
    batch, heads, num_queries, head_dim = query.shape
    kv_heads = key.shape[1]
    group = heads // kv_heads
    blocks = block_sizes_for("decode", query, bias, positions)
    programs = batch * kv_heads * ceil_div(group, GROUP_BLOCK) * num_queries
    splits = num_splits(programs, key.shape[2], blocks.columns, query.device)
    dim_block = power_of_two(head_dim)
    part = torch.empty(programs, splits, GROUP_BLOCK, dim_block, dtype=torch.float32, device=query.device)
    totals = torch.empty(programs, splits, 2, GROUP_BLOCK, dtype=torch.float32, device=query.device)
    _decode_kernel[(splits * programs,)](
        query, key, value, part, totals, *rows[:4], *tables(rows), rows.absolute, bias.eps or 0.0, scaling,
        *strides(query, key, value), *[batch_stride(field) for field in (*rows[:6], rows.absolute)], num_queries,
        key.shape[2], kv_heads, group, rows.knots.shape[0], splits, C_PER_HEAD=rows.c.shape[0] > 1,
        GROUP_BLOCK=GROUP_BLOCK, **constants(query, bias, positions, blocks),
    )  # fmt: skip
    _combine_kernel[(batch * heads * num_queries,)](
        part, totals, output, lse, *strides(output), num_queries, heads, group, splits, HEAD_DIM=head_dim,
        GROUP_BLOCK=GROUP_BLOCK, DIM_BLOCK=dim_block, SPLIT_BLOCK=power_of_two(splits, 1),
    )  # fmt: skip


def decode_token(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    bias: PiecewiseBias,
    positions: FirePositions,
    scaling: float,
) -> torch.Tensor:
    """The output of [`forward`] for one query of each item, of a bias with `eps`: in little Python."""
    batch, heads, num_queries, head_dim = query.shape
    positions = kernel_positions(positions)
    output = query.new_empty(batch, num_queries, heads, head_dim).transpose(1, 2)
    query, key, value = dense_rows(query), dense_rows(key), dense_rows(value)
    with torch.cuda.device_of(query):
        decode(query, key, value, bias, positions, Rows.of(bias, positions), scaling, output, None)
    return output


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
    positions = kernel_positions(positions)
    grads = torch.empty_like(query), torch.empty_like(key), torch.empty_like(value)
    dq, dk, dv = written = [dense_rows(grad) for grad in grads]
    query, key, value, grad_output = dense_rows(query), dense_rows(key), dense_rows(value), dense_rows(grad_output)
    rows = Rows.of(bias, positions)
    by_query, by_key = (block_sizes_for(kernel, query, bias, positions) for kernel in ("query", "key"))
    segments = rows.slope.shape[1]
    segment_block = power_of_two(segments)
    row_blocks, column_blocks = ceil_div(num_queries, by_query.rows), ceil_div(num_keys, by_key.columns)
    lse2, delta = torch.empty_like(lse), torch.empty_like(lse)
    excess, grid = None, None
    if bias_grad and query.dtype != torch.float32:
        excess, grid = torch.zeros_like(lse, dtype=torch.float64), torch.empty_like(lse)
    pieces_grad = lse.new_empty(batch, heads, row_blocks, 2, segment_block)
    row_grad = torch.empty_like(lse)
    c_grad = lse.new_empty(batch, heads, row_blocks)
    sizes = (num_queries, num_keys, heads, heads // kv_heads)
    key_strides = (batch_stride(rows.keys), batch_stride(rows.visible))
    with torch.cuda.device_of(query):
        delta_blocks = ceil_div(num_queries, 64)
        _delta_kernel[(delta_blocks * batch * heads,)](
            output, grad_output, lse, delta, lse2, grid, *strides(output, grad_output), num_queries, heads,
            delta_blocks, HEAD_DIM=head_dim, ROW_BLOCK=64, DIM_BLOCK=power_of_two(head_dim),
        )  # fmt: skip
        plan = make_plan(query, key, bias, rows, by_key, not positions.consecutive)
        _key_gradient_kernel[(column_blocks * batch * kv_heads,)](
            query, key, value, grad_output, dk, dv, delta, lse2, excess, grid, *plan.tensors, *tables(rows), scaling,
            *strides(query, key, value, grad_output, dk, dv), *key_strides, *sizes, plan.batches, rows.c.shape[0],
            segments, plan.blocks, column_blocks, ROW_BLOCK=by_key.rows, SCAN_BLOCK=128,
            **constants(query, bias, positions, by_key),
        )  # fmt: skip
        if by_key[:2] != by_query[:2]:
            plan = make_plan(query, key, bias, rows, by_query, not positions.consecutive)
        _query_gradient_kernel[(row_blocks * batch * heads,)](
            query, key, value, grad_output, dq, delta, lse2, excess, pieces_grad, row_grad, c_grad, *plan.tensors,
            *tables(rows), scaling, *strides(query, key, value, grad_output, dq), *key_strides, *sizes, plan.batches,
            rows.c.shape[0], segments, row_blocks, BIAS_GRAD=bias_grad, ROW_BLOCK=by_query.rows,
            SEGMENT_BLOCK=segment_block, **constants(query, bias, positions, by_query),
        )  # fmt: skip
    for grad, dense in zip(grads, written, strict=True):
        if grad is not dense:
            grad.copy_(dense)
    if not bias_grad:
        return *grads, *(torch.zeros_like(field) for field in (bias.slope, bias.offset, bias.c, bias.row_scale))
    return *grads, *sum_bias_gradients(bias, pieces_grad, c_grad, row_grad)


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
