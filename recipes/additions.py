"""What might keep far keys from taking weight and is not in the paper: for studies, not for models to be kept."""

import math
from typing import Any

import torch
from torch import nn

from modeling_fire import FireForCausalLM, FirePositionBias
from modeling_fire.base_bias_fire import PositionBias
from modeling_fire.modeling_fire import FireAttention
from modeling_fire.positions_fire import FirePositions


class LogScaled(PositionBias):
    """A position bias times `log_scale` of the query."""

    def __init__(self, bias: FirePositionBias, length: int):
        super().__init__()
        self.bias, self.length, self.hidden_width = bias, length, bias.hidden_width

    def compute(self, positions: FirePositions, dtype: torch.dtype) -> torch.Tensor:
        scale = log_scale(positions.absolute.to(dtype), self.length)
        return self.bias.compute(positions, dtype) * scale[..., None, None]


class WithLine(PositionBias):
    """FIRE less `r_h psi(i - j)`, which no position normalises; `r` starts at 0."""

    def __init__(self, bias: FirePositionBias, num_heads: int):
        super().__init__()
        self.bias, self.hidden_width = bias, bias.hidden_width
        self.r = nn.Parameter(torch.zeros(num_heads))

    def compute(self, positions: FirePositions, dtype: torch.dtype) -> torch.Tensor:
        line = self.r.to(dtype) * self.bias.psi(positions.distance().to(dtype))[..., None]
        return self.bias.compute(positions, dtype) - line


def log_scale(position: torch.Tensor, length: int) -> torch.Tensor:
    """`log(i + 1) / log(length)`: 1 for the last query of a training text (arXiv 2202.12172)."""
    return torch.log(position + 1) / math.log(length)


def scale_queries(attention: FireAttention, length: int) -> None:
    """Multiplies the queries of a layer with `log_scale` of where they stand, which a cache moves."""
    positions: list[FirePositions] = []

    def remember(module: nn.Module, arguments: tuple, given: dict[str, Any]) -> None:
        positions[:] = [given["positions"]]

    def scale(module: nn.Module, arguments: tuple, queries: torch.Tensor) -> torch.Tensor:
        [of_call] = positions
        return queries * log_scale(of_call.absolute, length)[..., None]

    attention.register_forward_pre_hook(remember, with_kwargs=True)
    attention.q_proj.register_forward_hook(scale)


def log_scores(model: FireForCausalLM, length: int) -> None:
    """Multiplies all scores of a query, the bias included, with `log_scale` of its place in the text."""
    for layer in model.model.layers:
        scale_queries(layer.self_attn, length)
        layer.self_attn.position_bias = LogScaled(layer.self_attn.position_bias, length)


def line(model: FireForCausalLM, length: int) -> None:
    """Gives every layer a term that is not normalised."""
    for layer in model.model.layers:
        layer.self_attn.position_bias = WithLine(layer.self_attn.position_bias, model.config.num_attention_heads)


ADDITIONS = {"log scores": log_scores, "line": line}
