"""Where attention goes, and on what scale a FIRE model measures distances."""

from collections.abc import Callable
from typing import Any

import torch
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel

from ..base_bias_fire import PositionBias
from ..borrowed import evaluating
from ..cache_fire import CACHE, named
from ..modeling_fire import FireAttention
from ..position_bias_fire import FirePositionBias


def position_biases(model: torch.nn.Module) -> list[PositionBias]:
    """The position biases of a model: one for each layer, or one that all layers share."""
    # PEFT keeps what it trains beside the original.
    return [m for name, m in model.named_modules() if isinstance(m, PositionBias) and "original_module" not in name]


@torch.no_grad()
def learned_scales(model: torch.nn.Module) -> list[dict[str, float | None]]:
    """
    What FIRE learned to measure distances by: `c` and `L` of every position bias.

    Args:
        model (`torch.nn.Module`): a FIRE model, with or without a head.

    Returns:
        `list[dict[str, float | None]]`: a `{"c": |c|, "L": |L_multiplier * init_L|}` for each layer, or one if all
        layers share their bias; `L` in tokens. `None` where the config leaves the parameter out, or another process
        holds it (DeepSpeed ZeRO-3; parts that FSDP2 holds are gathered). Empty for the encodings that FIRE is compared
        with.
    """
    return [
        {"c": magnitude(bias.c), "L": magnitude(bias.L_multiplier, float(bias.init_L))}
        for bias in position_biases(model)
        if isinstance(bias, FirePositionBias)
    ]


def magnitude(parameter: torch.Tensor | None, factor: float = 1.0) -> float | None:
    """The absolute value of a parameter with one element."""
    if isinstance(parameter, DTensor):
        parameter = parameter.full_tensor()
    return None if parameter is None or parameter.numel() == 0 else abs(float(parameter) * factor)


@torch.no_grad()
def attention_by_distance(model: PreTrainedModel, input_ids: torch.Tensor, num_queries: int = 64) -> torch.Tensor:
    """
    How far back the last tokens of a text look: the share of their attention that falls on each range of distances,
    the mean over heads, queries and texts.

    Only the last tokens are asked: they have the whole text to look at, and the probabilities of few queries take
    little memory. Those of one layer are gone before those of the next are there.

    Args:
        model (`PreTrainedModel`): a FIRE model, with or without a head, and with any position bias.
        input_ids (`torch.LongTensor` of shape `(batch, length)`): the texts.
        num_queries (`int`, *optional*, defaults to 64): how many of the last tokens, at the most.

    Returns:
        `torch.Tensor` of shape `(num_layers, bins)`: float32, on the CPU; each row sums to 1. The first bin is the
        token itself, bin `n` the distances from `2 ** (n - 1)` to `2 ** n - 1`.

    Raises:
        ValueError: if it is not a FIRE model.
    """
    length = input_ids.shape[1]
    num_bins = (length - 1).bit_length() + 1

    def by_bin(probabilities: torch.Tensor) -> torch.Tensor:
        num_rows = probabilities.shape[-2]
        positions = torch.arange(length, device=probabilities.device)
        distances = positions[-num_rows:, None] - positions
        bins = torch.bucketize(distances, 2 ** torch.arange(num_bins - 1, device=positions.device), right=True)
        shares = probabilities.new_zeros(num_bins)
        return shares.index_add(0, bins.flatten(), probabilities.mean(dim=(0, 1)).flatten()) / num_rows

    return observe_attention(model, input_ids, num_queries, by_bin)


@torch.no_grad()
def attention_entropy(model: PreTrainedModel, input_ids: torch.Tensor, num_queries: int = 64) -> torch.Tensor:
    """
    How much the last tokens of a text spread their attention: the entropy of the probabilities, the mean over heads,
    queries and texts. `exp` of it is the number of keys that would share the attention evenly.

    Arguments and errors are those of [`attention_by_distance`].

    Returns:
        `torch.Tensor` of shape `(num_layers,)`: nats, float32, on the CPU.
    """
    return observe_attention(model, input_ids, num_queries, lambda p: torch.special.entr(p).sum(-1).mean())


def observe_attention(
    model: PreTrainedModel,
    input_ids: torch.Tensor,
    num_queries: int,
    measure: Callable[[torch.Tensor], torch.Tensor],
) -> torch.Tensor:
    """
    What `measure` makes of the probabilities `(batch, heads, queries, keys)` of the last `num_queries` tokens, stacked
    over layers. The rest is that of [`attention_by_distance`].
    """
    layers = [module for module in model.modules() if isinstance(module, FireAttention)]
    if not layers:
        raise ValueError(f"{type(model).__name__} is not a FIRE model.")
    start = max(0, input_ids.shape[1] - num_queries)
    measured = []

    def take(module: torch.nn.Module, args: Any, output: tuple[torch.Tensor, torch.Tensor]) -> None:
        measured.append(measure(output[1].float()).cpu())

    implementation = model.config._attn_implementation
    input_ids = input_ids.to(model.device)
    with evaluating(model):
        cache = model.base_model(input_ids[:, :start], use_cache=True)[CACHE] if start else None
        model.set_attn_implementation("eager")  # the only one that returns probabilities
        hooks = [layer.register_forward_hook(take) for layer in layers]
        try:
            model.base_model(input_ids[:, start:], use_cache=True, **named(cache))
        finally:
            for hook in hooks:
                hook.remove()
            model.set_attn_implementation(implementation)
    return torch.stack(measured)
