"""A layer of attention without rotation, or with less, learns to give what the original gave, on the same inputs."""

import math

import torch

from ..modeling_fire import FireAttention, FireDecoderLayer
from ..positions_fire import FirePositions


# A step moves a weight by so much of its matrix's root mean square (Adam's steps are all of one size).
STEP_SIZE = 0.0125
BIAS_LEARNING_RATE = 1e-2
WARMUP_STEPS = 10


def align(
    layer: FireDecoderLayer,
    original: FireAttention,
    hidden_states: torch.Tensor,
    rotation: tuple[torch.Tensor, torch.Tensor],
    kept: tuple[torch.Tensor, torch.Tensor] | None,
    positions: FirePositions,
    batch_size: int,
    generator: torch.Generator,
) -> float:
    """
    Trains queries, keys and `f` on the squared error of the attention's output, with Adam, in one pass over the text.

    Args:
        layer ([`FireDecoderLayer`]): whose attention learns, in place.
        original ([`FireAttention`]): what it imitates.
        hidden_states (`torch.Tensor` of shape `(windows, length, hidden_size)`): what the original layer had.
        rotation (`tuple[torch.Tensor, torch.Tensor]`): for `original`.
        kept (`tuple[torch.Tensor, torch.Tensor]`, *optional*): what the layer has of it.
        positions ([`FirePositions`]): of one window.
        batch_size (`int`): windows in a step.
        generator (`torch.Generator`): of the order of the windows; on the CPU.

    Returns:
        `float`: the squared error over that of an output of 0, mean of the last tenth of the steps.
    """
    attention = layer.self_attn
    attention.requires_grad_(False)
    learning = attention.position_bias, attention.q_proj, attention.k_proj
    sizes = [module.weight.detach().square().mean().sqrt().item() for module in learning[1:]]
    rates = BIAS_LEARNING_RATE, *(STEP_SIZE * size for size in sizes)
    groups = [{"params": module.parameters(), "lr": rate} for module, rate in zip(learning, rates, strict=True)]
    for module in learning:
        module.requires_grad_(True)
    optimizer = torch.optim.Adam(groups, betas=(0.9, 0.95))
    batches = torch.randperm(len(hidden_states), generator=generator).split(batch_size)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer,
        lambda step: min(1, (step + 1) / WARMUP_STEPS) * (1 + math.cos(math.pi * step / len(batches))) / 2,
    )
    errors = []
    for batch in batches:
        with torch.no_grad():
            inputs = layer.input_layernorm(hidden_states[batch].to(positions.query.device))
            wanted, _ = original(inputs, positions=positions, position_embeddings=rotation)
        output, _ = attention(inputs, positions=positions, position_embeddings=kept)
        # A layer may give 0, as those do that were added to deepen a model.
        size = wanted.square().mean().clamp(min=torch.finfo(wanted.dtype).tiny)
        error = (output - wanted).square().mean() / size
        optimizer.zero_grad()
        error.backward()
        optimizer.step()
        schedule.step()
        errors.append(error.detach())
    attention.requires_grad_(True)
    return torch.stack(errors[-max(1, len(errors) // 10) :]).mean().item()
