"""Where attention goes, and on what scale a FIRE model measures distances."""

from typing import Any

import torch
from transformers import PreTrainedModel

from ..modeling_fire import FireAttention
from ..position_bias_fire import FirePositionBias, PositionBias


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
        layers share their bias; `L` in tokens. `None` where the config leaves the parameter out. Empty for the
        encodings that FIRE is compared with.
    """
    return [
        {
            "c": None if bias.c is None else abs(float(bias.c)),
            "L": None if bias.L_multiplier is None else abs(float(bias.L_multiplier * bias.init_L)),
        }
        for bias in position_biases(model)
        if isinstance(bias, FirePositionBias)
    ]


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
    layers = [module for module in model.modules() if isinstance(module, FireAttention)]
    if not layers:
        raise ValueError(f"{type(model).__name__} is not a FIRE model.")
    length = input_ids.shape[1]
    start = max(0, length - num_queries)
    device = model.device
    distances = torch.arange(start, length, device=device)[:, None] - torch.arange(length, device=device)
    num_bins = (length - 1).bit_length() + 1
    bins = torch.bucketize(distances, 2 ** torch.arange(num_bins - 1, device=device), right=True)
    shares = []

    def take(module: torch.nn.Module, args: Any, output: tuple[torch.Tensor, torch.Tensor]) -> None:
        probabilities = output[1].float().mean(dim=(0, 1))
        by_bin = probabilities.new_zeros(num_bins).index_add(0, bins.flatten(), probabilities.flatten())
        shares.append(by_bin.cpu() / len(distances))

    was_training, implementation = model.training, model.config._attn_implementation
    model.eval()
    input_ids = input_ids.to(device)
    cache = model.base_model(input_ids[:, :start], use_cache=True).past_key_values if start else None
    model.set_attn_implementation("eager")  # the only one that returns probabilities
    hooks = [layer.register_forward_hook(take) for layer in layers]
    try:
        model.base_model(input_ids[:, start:], past_key_values=cache, use_cache=True)
    finally:
        for hook in hooks:
            hook.remove()
        model.set_attn_implementation(implementation)
        model.train(was_training)
    return torch.stack(shares)
