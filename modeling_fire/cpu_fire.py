"""
Attention with a piecewise-linear position bias on a CPU: plain PyTorch operators, linear memory, exact gradients.

Queries are worked through in chunks of rows; see `cpu_chunks_fire.py` for where the bias of a chunk comes from.
"""

import math
from itertools import product

import torch

from .cpu_chunks_fire import BiasGradient, Call, Scratch
from .piecewise_fire import PiecewiseBias
from .positions_fire import FirePositions


# Rows of a chunk. More of them waste more of the blocks on the diagonal, fewer make the matrix products slower.
ROWS = 192
# Scores held at a time, unless a chunk of one head has more: they should stay in the cache.
MAX_SCORES = 2**20
# The backward pass works with powers of two: on a CPU they are several times as fast as those of e.
LOG2_E = math.log2(math.e)
# Numbers below the smallest normal one make Intel's CPUs many times slower. Products with the weights of keys that the
# bias all but hides would be such numbers. So values are raised by a power of two in the forward pass, unless it is
# for a few queries, and in the backward pass weights are 0 from so many powers of two above that number on down.
LIFT, LIFT_QUERIES = 2.0**24, 32
ROOM = 38

sdpa = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default


def forward(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    bias: PiecewiseBias,
    positions: FirePositions,
    scaling: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """
    `softmax(scaling q k + bias) v`.

    Args:
        query (`torch.Tensor` of shape `(batch, heads, queries, head_dim)`): floating point of any width.
        key, value (`torch.Tensor` of shape `(batch, kv_heads, keys, head_dim)`): `kv_heads` divides `heads`.
        bias ([`PiecewiseBias`]): used in float32, or in float64 beside a `query` in float64.
        positions ([`FirePositions`]): with `first` and `last`.
        scaling (`float`): of the products of queries and keys.

    Returns:
        The output in shape and type of `query`, and the log-sum-exp `(batch, heads, queries)` of the scores in the
        type that the bias is used in. A query that sees nothing gets 0 and minus infinity.
    """
    batch, num_heads, num_queries, head_dim = query.shape
    groups = num_heads // key.shape[1]
    # PyTorch's kernel takes the entries of a vector for neighbours in memory, without looking at their stride.
    query, key, value = (x if x.stride(-1) == 1 else x.contiguous() for x in (query, key, value))
    lifted = num_queries >= LIFT_QUERIES and query.dtype in (torch.float32, torch.bfloat16)
    if lifted:
        value = value * LIFT
    bias = working_bias(bias, query)
    output = query.new_zeros(batch, num_queries, num_heads, head_dim).transpose(1, 2)
    lse = bias.slope.new_full((batch, num_heads, num_queries), -torch.inf)
    scratch = Scratch(bias.slope)
    for chunk in Call(bias, positions, batch, key.shape[2], ROWS).chunks():
        items, rows, keys = slice(chunk.items.start, chunk.items.stop), chunk.rows, chunk.keys
        for heads in head_slices(num_heads, groups, 0 if chunk.is_view else chunk.scores):
            kv = kv_heads(heads, groups)
            k, v, mask = key[items, kv, keys], value[items, kv, keys], chunk.bias(heads, scratch)
            result, sums = attend(query[items, heads, rows], k, v, mask, scaling)
            if chunk.blind is not None:
                result, sums = result.masked_fill(chunk.blind[:, None], 0), sums.masked_fill(chunk.blind, -torch.inf)
            output[items, heads, rows], lse[items, heads, rows] = result, sums
    return output.mul_(1 / LIFT) if lifted else output, lse


def attend(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: torch.Tensor, scaling: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Output and log-sum-exp of one chunk. The rows of `mask`, of shape `(heads, rows, keys)`, begin with the last."""
    if query.shape[2] == 1:
        return attend_token(query, key, value, mask[None], scaling)
    output, lse = sdpa(query.flip(2), key, value, 0.0, False, attn_mask=mask[None], scale=scaling)
    return output.flip(2), lse.flip(2)


def attend_token(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: torch.Tensor, scaling: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Output and log-sum-exp of one query. `mask` has the shape `(batch or 1, heads, 1, keys)`."""
    groups = query.shape[1] // key.shape[1]
    if groups == 1:
        return sdpa(query, key, value, 0.0, False, attn_mask=mask, scale=scaling)
    # The query heads of one kv head read the same keys: as rows of one head they read them once.
    query, mask = (x.squeeze(-2).unflatten(-2, (-1, groups)) for x in (query, mask))
    output, lse = sdpa(query, key, value, 0.0, False, attn_mask=mask, scale=scaling)
    return output.flatten(1, 2).unsqueeze(2), lse.flatten(1).unsqueeze(2)


def decode(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    bias: PiecewiseBias,
    positions: FirePositions,
    scaling: float,
) -> torch.Tensor | None:
    """
    The output of [`forward`] for one query of each item, without gradients, out of the `table` of the bias: little
    Python and few tensors, because in a model, whose weights fill the caches, each of them is felt. `None` where the
    table does not hold what is asked for.
    """
    table, num_keys = bias.table, key.shape[2]
    on_diagonals = positions.consecutive and positions.visible is None
    if not on_diagonals or torch.promote_types(query.dtype, torch.float32) != table.dtype:
        return None
    coordinates, firsts, lasts = (x.flatten().tolist() for x in (positions.query, positions.first, positions.last))
    begin, end = max(0, min(firsts)), min(max(lasts), num_keys)
    start = table.shape[1] - 1 - (coordinates[0] - begin)
    stop = start + end - begin
    if min(coordinates) < max(coordinates) or not 0 <= start < stop <= table.shape[1]:
        return None
    mask = table[None, :, None, start:stop]
    if min(firsts) < max(firsts) or min(lasts) < max(lasts):
        if max(firsts) >= min(*lasts, num_keys):
            return None  # an item may see nothing
        index = torch.arange(begin, end)
        mask = mask.masked_fill(((index < positions.first) | (index >= positions.last))[:, None, None], -torch.inf)
    query, key, value = (x if x.stride(-1) == 1 else x.contiguous() for x in (query, key, value))
    return attend_token(query, key[:, :, begin:end], value[:, :, begin:end], mask, scaling)[0]


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
    The gradients of `query`, `key`, `value` and of the `slope`, `offset`, `c` and `row_scale` of the bias.

    Args:
        grad_output (`torch.Tensor`): gradient of `output`.
        output, lse (`torch.Tensor`): what `forward` returned; only the second is needed here.
        bias_grad (`bool`): whether to compute the last four, which are zeros otherwise.
        The others as in `forward`.
    """
    batch, num_heads = query.shape[:2]
    groups = num_heads // key.shape[1]
    types = query.dtype, key.dtype, value.dtype
    bias_fields = bias.slope, bias.offset, bias.c, bias.row_scale
    bias = working_bias(bias, query)
    gradient = BiasGradient(bias)

    dtype = bias.slope.dtype
    query, key, value, grad_output = (x.to(dtype) for x in (query, key, value, grad_output))
    # For a row that saw nothing, so that its probabilities come out as zeros.
    lse = lse.masked_fill(lse == -torch.inf, torch.inf).mul_(LOG2_E)[..., None]
    grad_query, grad_key, grad_value = (torch.zeros_like(x) for x in (query, key, value))
    probabilities, grad_scores = Scratch(query), Scratch(query)
    faint = math.log2(torch.finfo(dtype).tiny) + ROOM

    for chunk in Call(bias, positions, batch, key.shape[2], ROWS, unit=LOG2_E).chunks():
        rows, keys, width = chunk.rows, chunk.keys, chunk.num_keys
        for item, heads in product(chunk.items, head_slices(num_heads, groups, 2 * chunk.num_rows * width)):
            # The rows of all query heads that share a kv head are rows of one product.
            kv = kv_heads(heads, groups)
            num_kv, shape = kv.stop - kv.start, (heads.stop - heads.start, chunk.num_rows, chunk.pitch)
            q, g, row_lse = (x[item, heads, rows].flip(1) for x in (query, grad_output, lse))
            q, g = (x.reshape(num_kv, -1, x.shape[-1]) for x in (q * (scaling * LOG2_E), g))
            k, v = key[item, kv, keys], value[item, kv, keys]

            block = probabilities.block(shape)
            chunk.fill(block, heads, row_lse)
            p = block.view(num_kv, -1, chunk.pitch)[..., :width]
            torch.threshold_(p.baddbmm_(q, k.mT), faint, -torch.inf).exp2_()
            grad_value[item, kv, keys].baddbmm_(p.mT, g)

            block = grad_scores.block(shape)
            block[..., width:] = 0
            ds = block.view(num_kv, -1, chunk.pitch)[..., :width]
            torch.bmm(g, v.mT, out=ds)
            # Each row less its share of the sum. That is the product of output and gradient too, but of an output
            # rounded to 16 bits, whose error would not cancel in the gradients of the bias.
            ds.mul_(p)
            ds.addcmul_(p, ds.sum(-1, keepdim=True), value=-1)
            grad_query[item, heads, rows] = torch.bmm(ds, k).view(*shape[:2], -1).flip(1)
            grad_key[item, kv, keys].baddbmm_(ds.mT, q)
            if bias_grad:
                chunk.add_gradient(gradient, block, heads, item)

    grad_query.mul_(scaling)
    grad_key.mul_(1 / LOG2_E)
    grads = [grad.to(dtype) for grad, dtype in zip((grad_query, grad_key, grad_value), types, strict=True)]
    return *grads, *(grad.to(field.dtype) for grad, field in zip(gradient.total(), bias_fields, strict=True))


def working_bias(bias: PiecewiseBias, query: torch.Tensor) -> PiecewiseBias:
    """The bias in float32, or in float64 beside a `query` in float64."""
    dtype = torch.promote_types(query.dtype, torch.float32)
    knots, slope, offset, c, row_scale = (field.detach().to(dtype) for field in bias[:5])
    return PiecewiseBias(knots, slope, offset, c, row_scale, bias.shared, bias.transform)


def head_slices(num_heads: int, groups: int, scores: int) -> list[slice]:
    """
    The query heads in slices, of so many that `scores` for each of them stay within `MAX_SCORES`: all those of some
    kv heads, or equal parts of those of one.
    """
    step = min(max(1, MAX_SCORES // max(scores, 1)), num_heads)
    step = step // groups * groups or next(n for n in range(step, 0, -1) if groups % n == 0)
    return [slice(start, min(start + step, num_heads)) for start in range(0, num_heads, step)]


def kv_heads(heads: slice, groups: int) -> slice:
    """The kv heads that a slice of [`head_slices`] attends to."""
    return slice(heads.start // groups, (heads.stop - 1) // groups + 1)
