"""Measures of language models, ours and any other that transformers loads."""

from .passkey import passkey_accuracy
from .perplexity import loss_by_context
from .plots import plot_learned_bias, plot_perplexity_by_context, plot_perplexity_by_tokens


__all__ = [
    "loss_by_context",
    "passkey_accuracy",
    "plot_learned_bias",
    "plot_perplexity_by_context",
    "plot_perplexity_by_tokens",
]
