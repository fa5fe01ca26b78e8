"""
How well a causal language model predicts text: the same tokens by the length of their context, or every token of a
long text by its position.
"""

from typing import Any

import torch
from tqdm.auto import tqdm
from transformers import PreTrainedModel


@torch.no_grad()
def loss_by_context(
    model: PreTrainedModel,
    windows: torch.Tensor,
    contexts: list[int],
    num_targets: int = 64,
    tokens_per_batch: int = 2**15,
) -> dict[int, list[float]]:
    """
    The loss of the *same* target tokens, predicted from contexts of different lengths.

    The targets are the last `num_targets` tokens of each window. With a context of `n` the model sees the `n` tokens
    before the last one, so that the first target has `n - num_targets + 1` tokens before it and the last has `n`. What
    differs between two contexts is thus only how far the model can look back, not what it has to predict.

    Logits are computed for the targets alone, so that memory grows with the context no faster than the model's own.

    Windows may overlap. With `tokens.unfold(0, context + 1, num_targets)` the targets of one window begin where those
    of the last one end: perplexity by a sliding window, every token with at least `context - num_targets + 1` tokens
    before it.

    Args:
        model (`PreTrainedModel`): any causal language model of transformers.
        windows (`torch.LongTensor` of shape `(num_windows, max(contexts) + 1)`): token ids.
        contexts (`list[int]`): lengths in tokens, each at least `num_targets`.
        num_targets (`int`, *optional*, defaults to 64): tokens of each window that count.
        tokens_per_batch (`int`, *optional*, defaults to 32768): how many tokens one forward takes at the most.

    Returns:
        `dict[int, list[float]]`: for each context the mean loss of each window, in nats per token.

    Raises:
        ValueError: if a context is shorter than the targets, or longer than the windows allow.
    """
    if min(contexts) < num_targets or max(contexts) >= windows.shape[1]:
        raise ValueError(
            f"`contexts` must lie between `num_targets` ({num_targets}) and the length of the windows less one "
            f"({windows.shape[1] - 1}), got {contexts}."
        )
    was_training = model.training
    model.eval()
    windows = windows.to(model.device)
    targets = windows[:, -num_targets:]
    losses: dict[int, list[float]] = {}
    with tqdm(total=len(contexts) * len(windows), desc="evaluating", unit="window", leave=False) as progress:
        for context in sorted(contexts):  # ascending: dynamic NTK does not forget the longest text it has seen
            losses[context] = []
            batch_size = max(1, tokens_per_batch // context)
            for inputs, labels in zip(windows.split(batch_size), targets.split(batch_size), strict=True):
                logits = model(inputs[:, -context - 1 : -1], logits_to_keep=num_targets, use_cache=False).logits
                loss = torch.nn.functional.cross_entropy(
                    logits.float().flatten(0, 1), labels.flatten(), reduction="none"
                )
                losses[context] += loss.view_as(labels).mean(dim=1).tolist()
                progress.update(len(inputs))
    model.train(was_training)
    return {context: losses[context] for context in contexts}


@torch.no_grad()
def loss_by_position(model: PreTrainedModel, windows: torch.Tensor, chunk_size: int = 512) -> torch.Tensor:
    """
    The loss of every token of long texts, each predicted from all that come before it.

    A window goes through the model in chunks, with a KV cache, and the logits of a chunk are gone before the next one:
    memory is linear in the length, and the logits take no more than a chunk's. A recurrent model, whose state goes on
    by single tokens, reads a window at once, and its logits take the window's length times the vocabulary.

    Args:
        model (`PreTrainedModel`): any causal language model of transformers.
        windows (`torch.LongTensor` of shape `(num_windows, length)`): token ids.
        chunk_size (`int`, *optional*, defaults to 512): how many tokens one forward takes at the most.

    Returns:
        `torch.Tensor` of shape `(num_windows, length - 1)`: in nats, float32, on the CPU. Column `n` is the token that
        has `n + 1` tokens before it.

    Raises:
        ValueError: if the model returns no KV cache, though it is not recurrent.
    """
    chunked = not model._is_stateful
    chunk_size = chunk_size if chunked else windows.shape[1]
    was_training = model.training
    model.eval()
    losses = torch.empty(len(windows), windows.shape[1] - 1)
    with tqdm(total=losses.numel(), desc="evaluating", unit="token", leave=False) as progress:
        for window, loss in zip(windows.to(model.device), losses, strict=True):
            cache: Any = None
            chunks = zip(
                window[:-1].split(chunk_size), window[1:].split(chunk_size), loss.split(chunk_size), strict=True
            )
            for inputs, labels, chunk_loss in chunks:
                given = {"past_key_values": cache} if chunked else {}
                outputs = model(inputs[None], use_cache=chunked, **given)
                cache = outputs.get("past_key_values")
                if chunked and cache is None:
                    raise ValueError(f"{type(model).__name__} returns no KV cache (`past_key_values`).")
                chunk_loss.copy_(
                    torch.nn.functional.cross_entropy(outputs.logits[0].float(), labels, reduction="none")
                )
                progress.update(len(inputs))
    model.train(was_training)
    return losses


def bin_positions(losses: torch.Tensor, bins_per_doubling: int = 2) -> dict[int, list[float]]:
    """
    The losses of [`loss_by_position`] in bins whose width grows with the position.

    Args:
        losses (`torch.Tensor` of shape `(num_windows, positions)`): in column `n` those with `n + 1` tokens before.
        bins_per_doubling (`int`, *optional*, defaults to 2): how many bins there are from one position to its double.

    Returns:
        `dict[int, list[float]]`: the mean loss of each window, by the fewest tokens that a token of the bin has before
        it. Each bin ends where the next one begins, the last with the window.
    """
    num_positions = losses.shape[1]
    edges = {round(2 ** (i / bins_per_doubling)) for i in range(num_positions.bit_length() * bins_per_doubling)}
    # Not at the last position, which would be a bin of one token where windows are powers of two.
    starts = sorted(edge for edge in edges if edge == 1 or edge < num_positions)
    ends = [*starts[1:], num_positions + 1]
    return {
        start: losses[:, start - 1 : end - 1].mean(dim=1).tolist() for start, end in zip(starts, ends, strict=True)
    }
