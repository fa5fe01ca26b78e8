"""
Attention with a piecewise-linear position bias as one operator: forward, backward, and the choice of the code for it.

The pair is registered with `torch.library`, so that `torch.compile`, `torch.export` and activation checkpointing see
one opaque node. The gradient of every tensor of the bias is exact; the parameters behind them, hidden layer,
`c` and `L`, get theirs by autograd from there, on tensors that are as small as the parameters themselves.
"""

import os
import re
from collections.abc import Callable
from functools import cache
from typing import NamedTuple

import torch
from torch.autograd import forward_ad
from torch.utils.flop_counter import register_flop_formula
from transformers.utils import logging
from transformers.utils.import_utils import is_triton_available

from .cpu_fire import backward as cpu_backward
from .cpu_fire import decode as cpu_decode
from .cpu_fire import forward as cpu_forward
from .piecewise_fire import PiecewiseBias
from .positions_fire import FirePositions


# Below the logger of transformers, whose verbosity users set, also where this file is a model's remote code.
logger = logging.get_logger("transformers.fire")

# The largest head that the GPU kernels take.
MAX_HEAD_DIM = 256

# Remote code of several revisions may live in one process: each registers its own operators.
NAMESPACE = re.sub(r"\W", "_", __package__ or "fire")


class Backend(NamedTuple):
    """The two functions behind the operators."""

    forward: Callable
    backward: Callable


@cache
def choose_backend(device: torch.device, forced: str, interpreted: bool) -> str:
    """
    What attention with a piecewise-linear bias runs on: `"triton"`, `"cpu"`, or `"none"` where nothing is fused.

    Args:
        device (`torch.device`): where the tensors are.
        forced (`str`): one of the three, from the environment variable `FIRE_BACKEND`, or `""` to go by the device.
        interpreted (`bool`): whether Triton interprets kernels, for tests, rather than compile them.
    """
    if forced not in ("", "triton", "cpu", "none"):
        raise ValueError(f"FIRE_BACKEND must be 'triton', 'cpu' or 'none' (blocks of a dense bias), got {forced!r}.")
    name = forced or {"cpu": "cpu", "cuda": "triton"}.get(device.type, "none")
    if name == "triton" and device.type != "cuda" and not interpreted:
        raise ValueError(
            f"FIRE_BACKEND=triton, but the tensors are on {device.type}: unset it, or set TRITON_INTERPRET=1 to test."
        )
    if name == "cpu" and device.type not in ("cpu", "meta"):  # on "meta" one counts operations
        raise ValueError(f"FIRE_BACKEND=cpu, but the tensors are on {device.type}: unset it, or move them to the CPU.")
    lack = ""
    if name == "triton" and not is_triton_available():
        lack = "Triton is not installed"
    elif name == "triton" and torch.version.hip is not None:
        lack = "the kernels are for NVIDIA's GPUs"
    elif name == "triton" and device.type == "cuda" and torch.cuda.get_device_capability(device) < (8, 0):
        lack = "the kernels need a GPU of compute capability 8.0, whose shared memory they fill"
    if lack:
        logger.warning_once(f"FIRE: attention on {device.type} is not fused and slow, because {lack}.")
        name = "none"
    logger.info_once(f"FIRE: attention on {device.type} runs on the backend {name!r}.")
    return name


@torch.compiler.assume_constant_result
def constant_backend(device: torch.device, forced: str, interpreted: bool) -> str:
    """[`choose_backend`], which Dynamo would look into: it does not respect a cache."""
    return choose_backend(device, forced, interpreted)


def backend_name(query: torch.Tensor) -> str:
    """The backend for tensors like `query`; see [`choose_backend`]."""
    interpreted = os.environ.get("TRITON_INTERPRET", "0") != "0"
    name = constant_backend(query.device, os.environ.get("FIRE_BACKEND", ""), interpreted)
    if name == "triton" and (query.shape[-1] > MAX_HEAD_DIM or query.dtype == torch.float64):
        return "none"
    return name


def load_backend(query: torch.Tensor) -> Backend:
    """The functions of the backend for tensors like `query`."""
    if backend_name(query) == "triton":
        from .triton_fire import backward, forward

        return Backend(forward, backward)
    return Backend(cpu_forward, cpu_backward)


@torch.library.custom_op(f"{NAMESPACE}::attention", mutates_args=())
def attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    knots: torch.Tensor,
    slope: torch.Tensor,
    offset: torch.Tensor,
    c: torch.Tensor,
    row_scale: torch.Tensor,
    shared: torch.Tensor,
    query_position: torch.Tensor,
    key_position: torch.Tensor,
    first: torch.Tensor,
    last: torch.Tensor,
    visible: torch.Tensor | None,
    transform: str,
    consecutive: bool,
    separate: bool,
    scaling: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """
    See [`PiecewiseBias`] and [`FirePositions`] for the arguments after `value`.

    Args:
        query (`torch.Tensor` of shape `(batch, heads, queries, head_dim)`): and
        key, value (`torch.Tensor` of shape `(batch, key_value_heads, keys, head_dim)`): all of one dtype.

    Returns:
        The output, of the shape and dtype of `query` (`queries` before `heads` in memory), and the log-sum-exp of the
        scores, of shape `(batch, heads, queries)`, float32 or wider. A query that sees nothing gets 0 and -inf.
    """
    bias = PiecewiseBias(knots, slope, offset, c, row_scale, shared, transform)
    positions = FirePositions(
        query_position, query_position, key_position, first, last, visible, consecutive, separate=separate
    )
    with torch.autocast(query.device.type, enabled=False):
        return load_backend(query).forward(query, key, value, bias, positions, scaling)


@attention.register_fake
def _(query, *args):
    batch, heads, queries, head_dim = query.shape
    output = query.new_empty(batch, queries, heads, head_dim).transpose(1, 2)
    return output, query.new_empty(batch, heads, queries, dtype=torch.promote_types(query.dtype, torch.float32))


@torch.library.custom_op(f"{NAMESPACE}::attention_backward", mutates_args=())
def attention_backward(
    grad_output: torch.Tensor,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    output: torch.Tensor,
    lse: torch.Tensor,
    knots: torch.Tensor,
    slope: torch.Tensor,
    offset: torch.Tensor,
    c: torch.Tensor,
    row_scale: torch.Tensor,
    shared: torch.Tensor,
    query_position: torch.Tensor,
    key_position: torch.Tensor,
    first: torch.Tensor,
    last: torch.Tensor,
    visible: torch.Tensor | None,
    transform: str,
    consecutive: bool,
    scaling: float,
    bias_grad: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """
    The gradients of `query`, `key`, `value`, `slope`, `offset`, `c` and `row_scale`; zeros for the last four unless
    `bias_grad`.
    """
    bias = PiecewiseBias(knots, slope, offset, c, row_scale, shared, transform)
    positions = FirePositions(query_position, query_position, key_position, first, last, visible, consecutive)
    with torch.autocast(query.device.type, enabled=False):
        return load_backend(query).backward(
            grad_output, query, key, value, output, lse, bias, positions, scaling, bias_grad
        )


@attention_backward.register_fake
def _(grad_output, query, key, value, output, lse, knots, slope, offset, c, row_scale, *args):
    return tuple(torch.empty_like(tensor) for tensor in (query, key, value, slope, offset, c, row_scale))


def _save_for_backward(ctx, inputs, output):
    *tensors, ctx.transform, ctx.consecutive, _, ctx.scaling = inputs
    ctx.save_for_backward(*tensors, *output)
    ctx.mark_non_differentiable(output[1])


def _backward(ctx, grad_output, _):
    *tensors, output, lse = ctx.saved_tensors
    bias_grad = any(ctx.needs_input_grad[4:8])
    dq, dk, dv, *dbias = attention_backward(
        grad_output, *tensors[:3], output, lse, *tensors[3:], ctx.transform, ctx.consecutive, ctx.scaling, bias_grad
    )
    return dq, dk, dv, None, *(dbias if bias_grad else [None] * 4), *[None] * 10


attention.register_autograd(_backward, setup_context=_save_for_backward)


@register_flop_formula(getattr(torch.ops, NAMESPACE).attention)
def _forward_flops(query_shape, key_shape, *args, **kwargs) -> int:
    batch, heads, queries, head_dim = query_shape
    return 4 * batch * heads * queries * key_shape[2] * head_dim  # like PyTorch's own: as if nothing were masked


@register_flop_formula(getattr(torch.ops, NAMESPACE).attention_backward)
def _backward_flops(grad_shape, query_shape, key_shape, *args, **kwargs) -> int:
    return 5 * _forward_flops(query_shape, key_shape) // 2


def fused_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    bias: PiecewiseBias,
    positions: FirePositions,
    scaling: float,
) -> torch.Tensor:
    """Attention of shape `(batch, heads, queries, head_dim)`, where [`backend_name`] names one."""
    if bias.eps is not None:
        from .triton_fire import decode_token

        return decode_token(query, key, value, bias, positions, scaling)
    if bias.table is not None:
        output = cpu_decode(query, key, value, bias, positions, scaling)
        if output is not None:
            return output
    # `torch.func.jvp` would take the operator for a constant.
    tensors = query, key, value, *bias.tensors
    if not torch.compiler.is_compiling() and any(forward_ad.unpack_dual(x).tangent is not None for x in tensors):
        raise NotImplementedError(
            "Fused attention has no forward-mode derivative; that of `attn_implementation='eager'` has."
        )
    return attention(
        query,
        key,
        value,
        *bias.tensors,
        positions.query,
        positions.key,
        positions.first,
        positions.last,
        positions.visible,
        bias.transform,
        positions.consecutive,
        positions.separate,
        scaling,
    )[0]
