"""The rotation that may stand beside a position bias, or in its place."""

import math

import torch
from transformers.modeling_rope_utils import dynamic_rope_update
from transformers.models.gpt_neox.modeling_gpt_neox import GPTNeoXRotaryEmbedding


class FireRotaryEmbedding(GPTNeoXRotaryEmbedding):
    """
    transformers' rotation, for part of a head if so configured, with every angle times `rope_angle_scale`. YaRN's
    temperature goes with the angles: at 0 there is nothing left of either. Pairs that turn slower than
    `rope_max_period` says stand still.
    """

    @torch.no_grad()
    @dynamic_rope_update
    def forward(self, hidden_states: torch.Tensor, position_ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        frequencies = self.inv_freq.to(hidden_states.device, torch.float32)
        if self.config.rope_max_period is not None:
            frequencies = frequencies * (frequencies * self.config.rope_max_period >= 2 * math.pi)
        angles = position_ids[..., None].float() * frequencies
        scale = self.config.rope_angle_scale
        angles = torch.cat((angles, angles), dim=-1) * scale
        temperature = 1.0 + (self.attention_scaling - 1.0) * scale
        cos, sin = angles.cos() * temperature, angles.sin() * temperature
        return cos.to(hidden_states.dtype), sin.to(hidden_states.dtype)
