"""Text that a model writes by itself."""

from typing import Any

import torch
from transformers.utils import logging

from ..borrowed import plain_generation
from .family import ConversionError


def start_token(config: Any) -> int:
    """
    What the texts that a model writes begin with.

    Raises:
        [`ConversionError`]: if its config has neither a `bos_token_id` nor an `eos_token_id`, or one that is no token.
    """
    starts = config.bos_token_id if config.bos_token_id is not None else config.eos_token_id
    start = starts[0] if isinstance(starts, list) else starts
    if start is None or not 0 <= start < config.vocab_size:
        raise ConversionError(
            f"The model has no `bos_token_id` to start a text with (got {start}): give one to calibrate on."
        )
    return start


@torch.no_grad()
def sampled_windows(model: Any, length: int, count: int, seed: int, batch_size: int) -> torch.Tensor:
    """
    Windows that a model writes by itself, one text each, at temperature 1.

    Args:
        model (`PreTrainedModel`): any causal language model whose config has a [`start_token`].
        length (`int`): tokens in a window.
        count (`int`): how many windows.
        seed (`int`): of the sampling; the generators of the caller are left as they were.
        batch_size (`int`): how many windows are written side by side.

    Returns:
        `torch.LongTensor` of shape `(count, length)`.
    """
    start = start_token(model.config)
    device = model.device
    windows = []
    # Without an end: a text may end before its window, and another begin.
    with plain_generation(model), torch.random.fork_rng([device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        batches = torch.full((count, 1), start, device=device).split(batch_size)
        for batch in logging.tqdm(batches, desc="Sampling text", unit=" batches"):
            mask = torch.ones_like(batch)
            windows.append(
                model.generate(batch, attention_mask=mask, max_length=length, do_sample=True, top_k=0).cpu()
            )
    return torch.cat(windows)
