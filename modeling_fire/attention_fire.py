"""
The one place that decides how attention with a position bias is computed.

`ALL_ATTENTION_FUNCTIONS` is transformers' attention registry, with functions of ours in place of those that take a
bias. Beside the usual arguments they take `positions` and `position_bias`: the bias is a function of positions, and
each implementation asks it for what it needs, the pieces of a fused path or dense blocks. An implementation that
would drop the bias is refused by `check_attn_implementation`.
"""

from typing import Any, NamedTuple

import torch
from torch import nn
from torch.distributed.tensor import DTensor
from torch.utils.checkpoint import checkpoint
from transformers.integrations.flex_attention import flex_attention_forward
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.modeling_utils import AttentionInterface
from transformers.models.llama.modeling_llama import repeat_kv
from transformers.utils import logging
from transformers.utils.versions import require_version

from .base_bias_fire import PositionBias, in_function_transform, is_observed
from .operator_fire import backend_name, fused_attention
from .piecewise_fire import PiecewiseBias
from .positions_fire import FirePositions


logger = logging.get_logger("transformers.fire")  # see `operator_fire`

# Largest number of scalars that one block of queries may hold in the computation of its bias (256 MiB in float32).
MAX_BLOCK_ELEMENTS = 2**26


def first_head(module: Any, num_heads: int) -> int:
    """The first head of this rank under tensor parallelism: it holds a slice of the heads, and the whole bias."""
    if isinstance(module, AttentionLayer):
        raise ValueError(f"`position_bias` is for another number of heads than the {num_heads} of `query`.")
    if module.training:
        require_version("transformers>=5.22", "Before, tensor parallelism left the gradients of the bias unsummed.")
    weight = module.q_proj.weight
    if not isinstance(weight, DTensor):
        raise ValueError("Tensor parallelism of a position bias needs attention weights that are not quantized.")
    return weight.device_mesh.get_local_rank() * num_heads


def dense_bias(
    module: Any, position_bias: PositionBias | None, positions: FirePositions, query: torch.Tensor
) -> torch.Tensor | None:
    """
    The bias of the heads that `query` holds.

    Returns:
        `torch.Tensor` of shape `(batch or 1, query heads, queries, keys)`: float32, on the device of `query`.
    """
    if position_bias is None:
        return None
    bias = position_bias(positions).to(query.device)
    num_heads = query.shape[1]
    if bias.shape[1] == num_heads:
        return bias
    start = first_head(module, num_heads)
    return bias[:, start : start + num_heads]


def piecewise_bias(
    module: Any, position_bias: PositionBias | None, positions: FirePositions, query: torch.Tensor, backend: str
) -> PiecewiseBias:
    """The pieces of the heads that `query` holds, on the device of `query`, for a backend."""
    num_heads = query.shape[1]
    if position_bias is None:
        dtype = torch.promote_types(query.dtype, torch.float32)
        return PiecewiseBias.straight(query.new_zeros(num_heads, dtype=dtype), "none", positions.query)
    bias = position_bias(positions, backend)
    if bias.slope.device != query.device:
        bias = bias.to(query.device)
    if bias.slope.shape[0] == num_heads:
        return bias
    start = first_head(module, num_heads)
    return bias.heads(start, start + num_heads)


def eager_attention_forward(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float,
    positions: FirePositions,
    position_bias: PositionBias | None,
    dropout: float = 0.0,
    **kwargs,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The plain formula; the only implementation that returns the attention probabilities."""
    groups = query.shape[1] // key.shape[1]
    key, value = repeat_kv(key, groups), repeat_kv(value, groups)
    scores = torch.matmul(query, key.transpose(2, 3)) * scaling
    bias = dense_bias(module, position_bias, positions, query)
    if bias is not None:
        scores = scores + bias  # float32: a bias rounded to bfloat16 would be off by more than the scores are
    if attention_mask is not None:
        if not attention_mask.is_floating_point():  # a mask of the caller's own
            hidden = torch.zeros_like(attention_mask, dtype=scores.dtype)
            attention_mask = hidden.masked_fill(~attention_mask.bool(), torch.finfo(scores.dtype).min)
        scores = scores + attention_mask
    softmax_dtype = torch.promote_types(scores.dtype, torch.float32)
    probabilities = nn.functional.softmax(scores, dim=-1, dtype=softmax_dtype).to(query.dtype)
    probabilities = nn.functional.dropout(probabilities, p=dropout, training=module.training)
    output = torch.matmul(probabilities, value)
    return output.transpose(1, 2).contiguous(), probabilities


def sdpa_bias(bias: torch.Tensor, query: torch.Tensor) -> torch.Tensor:
    """The bias in a type that `scaled_dot_product_attention` takes beside `query`."""
    if query.device.type == "cpu" or bias.dtype == query.dtype:
        return bias.to(torch.promote_types(query.dtype, torch.float32))
    # GPU kernels want the type of the query. A softmax ignores a shift of the row, so let the rounding, which is
    # relative, fall on the keys that weigh least.
    return (bias - bias.detach().amax(dim=-1, keepdim=True)).to(query.dtype)


def query_block_size(
    query: torch.Tensor, key: torch.Tensor, position_bias: PositionBias, positions: FirePositions
) -> int:
    """How many queries fit in one block, within `MAX_BLOCK_ELEMENTS`."""
    per_pair = query.shape[1] + 2 * position_bias.hidden_width  # the result, and a hidden layer before and after
    batch = max(coordinates.shape[0] for coordinates in positions[:3])
    return max(1, MAX_BLOCK_ELEMENTS // (batch * key.shape[2] * per_pair))


def needs_plain_formula() -> bool:
    """Whether someone is at work who knows PyTorch's operators, but neither ours nor their derivatives."""
    return in_function_transform() or torch.onnx.is_in_onnx_export()


def plain_attention(
    module: Any,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    positions: FirePositions,
    position_bias: PositionBias | None,
    scaling: float,
    dropout: float = 0.0,
) -> tuple[torch.Tensor, None]:
    """The plain formula, with the mask that the positions tell, if there is no other."""
    if attention_mask is None and positions.first is not None:
        attention_mask = positions.mask()
    output, _ = eager_attention_forward(
        module, query, key, value, attention_mask, scaling, positions, position_bias, dropout
    )
    return output, None


def sdpa_attention(
    module: Any,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    positions: FirePositions,
    position_bias: PositionBias | None,
    **kwargs,
) -> tuple[torch.Tensor, None]:
    """
    PyTorch's `scaled_dot_product_attention` with the bias as its mask.

    A long sequence is worked through in blocks of queries, so that no tensor of queries x keys x heads exists for all
    of it: each block computes its bias where it uses it, and with gradients once more in the backward pass.
    """
    if attention_mask is not None and not attention_mask.is_floating_point():
        attention_mask = attention_mask.bool()  # as integers it would be added to the bias
    if position_bias is None:
        return sdpa_attention_forward(module, query, key, value, attention_mask, **kwargs)
    if needs_plain_formula():
        scaling, dropout = kwargs["scaling"], kwargs.get("dropout", 0.0)
        return plain_attention(module, query, key, value, attention_mask, positions, position_bias, scaling, dropout)
    # Continuous batching, the keys of all requests in a row: its mask says what the positions do.
    if "read_index" in kwargs and fused_backend(module, query, None, positions, position_bias, **kwargs) != "none":
        return fire_attention_forward(module, query, key, value, None, positions, position_bias, kwargs["scaling"])

    from_positions = attention_mask is None and positions.first is not None
    length, num_keys = query.shape[2], key.shape[2]
    size = length
    if not torch.compiler.is_compiling():
        size = min(length, query_block_size(query, key, position_bias, positions))
    if size == length:
        mask = positions.mask() if from_positions else attention_mask
        bias = sdpa_bias(dense_bias(module, position_bias, positions, query), query)
        return sdpa_attention_forward(module, query, key, value, mask, position_bias=bias, **kwargs)

    is_causal = kwargs.pop("is_causal", None)
    is_causal = attention_mask is None and (module.is_causal if is_causal is None else is_causal)

    def attend(start: int, stop: int) -> torch.Tensor:
        # Causal from the first key on: the keys past this block are not seen.
        seen = stop if is_causal and length == num_keys else num_keys
        block = positions.block(start, stop, seen)
        if from_positions:
            mask = block.mask()
        elif is_causal:
            mask = causal_rows(start, stop, query.device)
        else:
            mask = None if attention_mask is None else attention_mask[:, :, start:stop]
        return sdpa_attention_forward(
            module,
            query[:, :, start:stop],
            key[:, :, :seen],
            value[:, :, :seen],
            mask,
            is_causal=False,
            position_bias=sdpa_bias(dense_bias(module, position_bias, block, query), query),
            **kwargs,
        )[0]

    blocks = [(start, min(start + size, length)) for start in range(0, length, size)]
    if torch.is_grad_enabled():
        outputs = [checkpoint(attend, *block, use_reentrant=False) for block in blocks]
    else:
        outputs = [attend(*block) for block in blocks]
    return torch.cat(outputs, dim=1), None


def causal_rows(start: int, stop: int, device: torch.device) -> torch.Tensor:
    """Causal mask of the queries from `start` to `stop` over the first `stop` keys: `(1, 1, stop - start, stop)`."""
    keys = torch.arange(stop, device=device)
    return (keys[start:, None] >= keys)[None, None]


def fused_backend(
    module: Any,
    query: torch.Tensor,
    attention_mask: torch.Tensor | None,
    positions: FirePositions,
    position_bias: PositionBias | None,
    dropout: float = 0.0,
    **kwargs,
) -> str:
    """The backend that can do this call, and exactly; `"none"` if the fused path cannot."""
    fits = position_bias is None or position_bias.is_piecewise
    if not fits or attention_mask is not None or positions.first is None or (dropout and module.training):
        return "none"
    return backend_name(query)


def is_autocast_enabled(device: torch.device) -> bool:
    """PyTorch's, which does not know of "meta", where one counts operations or memory."""
    return device.type != "meta" and torch.is_autocast_enabled(device.type)


def fire_attention_forward(
    module: Any,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    positions: FirePositions,
    position_bias: PositionBias | None,
    scaling: float,
    dropout: float = 0.0,
    **kwargs,
) -> tuple[torch.Tensor, None]:
    """
    Fused attention, whose memory is linear in the length. What it does not cover, a bias without a piecewise-linear
    form, dropout, a mask of the caller's own, goes through [`sdpa_attention`] in blocks; and `torch.func`'s `grad`,
    `vmap` and the like, and an export to ONNX, through the plain formula, where a query that sees nothing gets the
    mean of all values, not 0.
    """
    if needs_plain_formula():
        return plain_attention(module, query, key, value, attention_mask, positions, position_bias, scaling, dropout)
    backend = fused_backend(module, query, attention_mask, positions, position_bias, dropout)
    if backend == "none":
        if not torch.compiler.is_compiling():
            logger.info_once(
                "FIRE: some attention takes the general path, blocks of queries through PyTorch's: it has dropout, a "
                "mask of 4 dimensions, a bias that is not piecewise linear (GELU, two hidden layers), or no backend."
            )
        return sdpa_attention(
            module, query, key, value, attention_mask, positions, position_bias,
            scaling=scaling, dropout=dropout, **kwargs,
        )  # fmt: skip
    if kwargs.get("output_attentions"):
        logger.warning_once("`output_attentions=True` needs `attn_implementation='eager'`: 'fire' has no attentions.")
    bias = piecewise_bias(module, position_bias, positions, query, backend)
    if is_autocast_enabled(query.device):
        dtype = torch.get_autocast_dtype(query.device.type)
        query, key, value = query.to(dtype), key.to(dtype), value.to(dtype)
    return fused_attention(query, key, value, bias, positions, scaling).transpose(1, 2), None


class AttentionLayer(NamedTuple):
    """What the attention functions read of the layer that calls them."""

    is_causal: bool
    num_key_value_groups: int
    training: bool = False


def fire_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    position_bias: PositionBias,
    positions: FirePositions | None = None,
    *,
    causal: bool = True,
    window: int | None = None,
    cu_seqlens: torch.Tensor | None = None,
    scaling: float | None = None,
) -> torch.Tensor:
    """
    Attention with a position bias, for an attention layer of one's own.

    Where the bias is piecewise linear (FIRE with one hidden layer of ReLU units, KERPLE, ALiBi) it runs fused, on CPU
    and, with Triton, on GPU; other biases are computed in blocks of queries. Memory is linear in the length, except
    under `torch.func` and in an export to ONNX, where it is the plain formula. The gradients of `query`, `key`,
    `value` and of every parameter of the bias are exact.

    Args:
        query (`torch.Tensor` of shape `(batch, heads, queries, head_dim)`): float32, bfloat16 or float16.
        key (`torch.Tensor` of shape `(batch, key_value_heads, keys, head_dim)`):
            `heads` is a multiple of `key_value_heads`; the queries are the last of the keys, unless `positions` say
            otherwise.
        value (`torch.Tensor` of the shape of `key`): Values.
        position_bias ([`PositionBias`]): e.g. `FirePositionBias(heads)`.
        positions ([`FirePositions`], *optional*):
            Who stands where and sees whom, for padding and anything unusual: with `first` and `last`, of the lengths
            of `query` and `key`. Excludes the next three.
        causal (`bool`, *optional*, defaults to `True`): Whether keys ahead are hidden. Distances are `|i - j|`.
        window (`int`, *optional*): A query sees only so many keys back (and ahead), itself counted.
        cu_seqlens (`torch.Tensor` of shape `(documents + 1,)`, *optional*):
            Packed documents: where each begins. They do not see each other; causal, without a window.
        scaling (`float`, *optional*): Factor of `query key`; `head_dim ** -0.5` by default.

    Returns:
        `torch.Tensor` of shape `(batch, heads, queries, head_dim)`, of the dtype of `query`.

    Raises:
        ValueError: if the arguments do not fit one another.
    """
    queries, keys = query.shape[2], key.shape[2]
    if key.shape != value.shape or key.shape[::3] != query.shape[::3]:
        raise ValueError(f"Shapes do not fit: query {query.shape}, key {key.shape}, value {value.shape}.")
    if not is_autocast_enabled(query.device) and not query.dtype == key.dtype == value.dtype:
        raise ValueError(f"Types differ: query {query.dtype}, key {key.dtype}, value {value.dtype}.")
    if query.shape[1] % key.shape[1]:
        raise ValueError(f"{query.shape[1]} query heads are no multiple of {key.shape[1]} key-value heads.")
    if window is not None and window < 1:
        raise ValueError(f"`window` counts the query itself, so it is at least 1, got {window}.")
    if positions is not None:
        if not causal or window is not None or cu_seqlens is not None:
            raise ValueError("`positions` say who sees whom: leave out `causal`, `window` and `cu_seqlens`.")
        positions.check(query.shape[0], queries, keys)
    elif cu_seqlens is not None:
        if not causal or window is not None or queries != keys:
            raise ValueError("`cu_seqlens` is for causal self-attention without a window: use `positions`.")
        # To look on a GPU would be to wait for it.
        if cu_seqlens.device.type == "cpu" and not is_observed() and cu_seqlens[[0, -1]].tolist() != [0, keys]:
            raise ValueError(f"`cu_seqlens` must begin with 0 and end with {keys}, the number of keys: {cu_seqlens}.")
        positions = FirePositions.packed(cu_seqlens, keys)
    else:
        if queries > keys:
            raise ValueError(
                f"{queries} queries cannot be the last of {keys} keys: say where they are in `positions`."
            )
        positions = FirePositions.arange(queries, query.device, past=keys - queries, window=window, causal=causal)
    if not queries:
        return query.clone()
    layer = AttentionLayer(positions.causal, query.shape[1] // key.shape[1])
    scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
    output, _ = fire_attention_forward(layer, query, key, value, None, positions, position_bias, scaling)
    return output.transpose(1, 2)


def flex_attention(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask,
    positions: FirePositions,
    position_bias: PositionBias | None,
    **kwargs,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """PyTorch's FlexAttention, whose score function reads the dense bias. On CPU PyTorch has no backward for it."""
    bias = dense_bias(module, position_bias, positions, query)
    if bias is not None:
        bias = bias.expand(query.shape[0], -1, -1, -1).contiguous()
    return flex_attention_forward(module, query, key, value, attention_mask, position_bias=bias, **kwargs)


# Named as in transformers, which looks for this name when `set_attn_implementation` is called.
ALL_ATTENTION_FUNCTIONS = AttentionInterface()
ALL_ATTENTION_FUNCTIONS["fire"] = fire_attention_forward
ALL_ATTENTION_FUNCTIONS["sdpa"] = sdpa_attention
ALL_ATTENTION_FUNCTIONS["flex_attention"] = flex_attention
# transformers checks names against its own registry.
AttentionInterface.register("fire", fire_attention_forward)

SUPPORTED_ATTENTION = ("fire", "eager", "sdpa", "flex_attention")


def check_attn_implementation(name: str | None) -> None:
    """
    Refuses an attention implementation that would silently drop the position bias.

    Raises:
        ValueError: if `name` is neither `None` (the default) nor one of `SUPPORTED_ATTENTION`.
    """
    if name is not None and name not in SUPPORTED_ATTENTION:
        raise ValueError(
            f'Specified `attn_implementation="{name}"` is not supported: it would drop the position bias. Use one of '
            f"{', '.join(map(repr, SUPPORTED_ATTENTION))}: 'fire' is the default, 'eager' returns attentions."
        )
