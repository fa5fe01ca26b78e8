"""Measures of language models, ours and any other that transformers loads."""

from .attention import attention_by_distance, attention_entropy, learned_scales
from .passkey import passkey_accuracy
from .perplexity import bin_positions, loss_by_context, loss_by_position
from .plots import (
    plot_attention_by_distance,
    plot_learned_bias,
    plot_passkey,
    plot_perplexity_by_context,
    plot_perplexity_by_position,
    plot_perplexity_by_tokens,
    plot_scales_by_step,
)


__all__ = [
    "attention_by_distance",
    "attention_entropy",
    "bin_positions",
    "learned_scales",
    "loss_by_context",
    "loss_by_position",
    "passkey_accuracy",
    "plot_attention_by_distance",
    "plot_learned_bias",
    "plot_passkey",
    "plot_perplexity_by_context",
    "plot_perplexity_by_position",
    "plot_perplexity_by_tokens",
    "plot_scales_by_step",
]
