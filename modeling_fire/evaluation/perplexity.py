"""
How well a causal language model predicts text: the same tokens by the length of their context, or every token of a
long text by its position.
"""

import inspect
from collections.abc import Iterator
from typing import Any

import torch
from tqdm.auto import tqdm
from transformers import PreTrainedModel

from ..borrowed import evaluating
from ..cache_fire import CACHE
from ..errors import EvaluationError


@torch.no_grad()
def loss_by_context(
    model: PreTrainedModel,
    windows: torch.Tensor,
    contexts: list[int],
    num_targets: int = 64,
    tokens_per_batch: int = 2**15,
    chunk_size: int = 2048,
) -> dict[int, list[float]]:
    """
    The loss of the *same* target tokens, predicted from contexts of different lengths.

    The targets are the last `num_targets` tokens of each window. With a context of `n` the model sees the `n` tokens
    before the last one, so that the first target has `n - num_targets + 1` tokens before it and the last has `n`. What
    differs between two contexts is thus only how far the model can look back, not what it has to predict.

    A context of up to `chunk_size` tokens is one forward. A longer one goes through the model in chunks, with a KV
    cache, so that memory is linear in the context whatever the attention; logits are kept for the targets alone. A
    recurrent model, whose state goes on by single tokens, reads any context at once, and so does one whose rotation
    depends on the length of the text (dynamic NTK, LongRoPE): in chunks, cached keys would keep that of their time.

    Windows may overlap. With `tokens.unfold(0, context + 1, num_targets)` the targets of one window begin where those
    of the last one end: perplexity by a sliding window, every token with at least `context - num_targets + 1` tokens
    before it.

    Args:
        model (`PreTrainedModel`): any causal language model of transformers.
        windows (`torch.LongTensor` of shape `(num_windows, max(contexts) + 1)`): token ids.
        contexts (`list[int]`): lengths in tokens, each at least `num_targets`.
        num_targets (`int`, *optional*, defaults to 64): tokens of each window that count.
        tokens_per_batch (`int`, *optional*, defaults to 32768):
            How many tokens the windows that are read side by side have at the most. A model whose forward cannot leave
            out logits (no `logits_to_keep`) reads one window at a time.
        chunk_size (`int`, *optional*, defaults to 2048): how many tokens of a window one forward takes at the most.

    Returns:
        `dict[int, list[float]]`: for each context the mean loss of each window, in nats per token.

    Raises:
        ValueError: if a context is shorter than the targets, or longer than the windows allow.
        [`~modeling_fire.errors.EvaluationError`]: if a context takes several chunks, and the model returns
            no KV cache, though it is not recurrent, or a cache that can only be continued one token at a time.
    """
    if min(contexts) < num_targets or max(contexts) >= windows.shape[1]:
        raise ValueError(
            f"`contexts` must lie between `num_targets` ({num_targets}) and the length of the windows less one "
            f"({windows.shape[1] - 1}), got {contexts}."
        )
    windows = windows.to(model.device)
    targets = windows[:, -num_targets:]
    losses: dict[int, list[float]] = {}
    with (
        evaluating(model),
        tqdm(total=len(contexts) * len(windows), desc="evaluating", unit="window", leave=False) as progress,
    ):
        if max(contexts) > chunk_size and not rotates_by_length(model):
            check_chunks(model, windows[0], chunk_size)
        for context in sorted(contexts):  # ascending: dynamic NTK does not forget the longest text it has seen
            losses[context] = []
            size = context if rotates_by_length(model) else chunk_size
            batch_size = max(1, tokens_per_batch // context) if takes(model, "logits_to_keep") else 1
            for inputs, labels in zip(windows.split(batch_size), targets.split(batch_size), strict=True):
                chunks = losses_in_chunks(model, inputs[:, -context - 1 : -1], labels, size)
                losses[context] += torch.cat(list(chunks), dim=1).mean(dim=1).tolist()
                progress.update(len(inputs))
    return {context: losses[context] for context in contexts}


@torch.no_grad()
def loss_by_position(model: PreTrainedModel, windows: torch.Tensor, chunk_size: int = 512) -> torch.Tensor:
    """
    The loss of every token of long texts, each predicted from all that come before it.

    A window goes through the model in chunks, with a KV cache, and the logits of a chunk are gone before the next one:
    memory is linear in the length, and the logits take no more than a chunk's. A recurrent model, whose state goes on
    by single tokens, reads a window at once, and its logits take the window's length times the vocabulary. Where the
    rotation depends on the length of the text, it is that of the text up to each chunk, as in `generate`.

    Args:
        model (`PreTrainedModel`): any causal language model of transformers.
        windows (`torch.LongTensor` of shape `(num_windows, length)`): token ids.
        chunk_size (`int`, *optional*, defaults to 512): how many tokens one forward takes at the most.

    Returns:
        `torch.Tensor` of shape `(num_windows, length - 1)`: in nats, float32, on the CPU. Column `n` is the token that
        has `n + 1` tokens before it.

    Raises:
        [`~modeling_fire.errors.EvaluationError`]: if a window takes several chunks, and the model returns
            no KV cache, though it is not recurrent, or a cache that can only be continued one token at a time.
    """
    losses = torch.empty(len(windows), windows.shape[1] - 1)
    with (
        evaluating(model),
        tqdm(total=losses.numel(), desc="evaluating", unit="token", leave=False) as progress,
    ):
        if windows.shape[1] - 1 > chunk_size and not rotates_by_length(model):
            check_chunks(model, windows[0].to(model.device), chunk_size)
        for window, loss in zip(windows.to(model.device), losses, strict=True):
            end = 0
            for chunk_loss in losses_in_chunks(model, window[None, :-1], window[None, 1:], chunk_size):
                start, end = end, end + chunk_loss.shape[1]
                loss[start:end] = chunk_loss[0]
                progress.update(end - start)
    return losses


def check_chunks(model: PreTrainedModel, text: torch.Tensor, chunk_size: int) -> None:
    """
    Reads the beginning of a text in chunks and at once, which is the same if the KV cache of the model is sound. That
    of MiniMax goes on one token at a time.

    Raises:
        [`~modeling_fire.errors.EvaluationError`]: if there is no cache, or the loss is another in chunks.
    """
    length = min(64, chunk_size)
    inputs, labels = text[None, :length], text[None, 1 : length + 1]

    def loss(size: int) -> float:
        return torch.cat(list(losses_in_chunks(model, inputs, labels, size)), dim=1).mean().item()

    try:
        at_once, in_chunks = loss(length), loss(-(-length // 4))
        if abs(in_chunks - at_once) > 0.05:  # more than rounding does, in any type
            raise EvaluationError(
                f"{type(model).__name__} loses {at_once:.3f} nats a token if it reads a text at once, and "
                f"{in_chunks:.3f} in chunks: its KV cache does not take several tokens at once."
            )
    except EvaluationError as error:
        raise EvaluationError(f"{error} Take contexts up to {chunk_size}.") from error


def losses_in_chunks(
    model: PreTrainedModel, inputs: torch.Tensor, labels: torch.Tensor, chunk_size: int
) -> Iterator[torch.Tensor]:
    """
    Gives texts to a model chunk by chunk, and yields what it loses on the last tokens.

    Args:
        model (`PreTrainedModel`): in evaluation mode.
        inputs (`torch.LongTensor` of shape `(batch, length)`): token ids.
        labels (`torch.LongTensor` of shape `(batch, num_labels)`): the tokens that follow on the last of these.
        chunk_size (`int`): how many tokens of a text one forward takes; a recurrent model takes all.

    Yields:
        `torch.Tensor` of shape `(batch, labels of the chunk)`: in nats, float32; of no label for the chunks before
        them. Side by side they are the loss of all labels.

    Raises:
        [`~modeling_fire.errors.EvaluationError`]: if there are several chunks, and no KV cache.
    """
    remaining, num_labels = inputs.shape[1], labels.shape[1]
    chunk_size = remaining if model._is_stateful else chunk_size
    given: dict[str, Any] = {"use_cache": remaining > chunk_size}
    for chunk in inputs.split(chunk_size, dim=1):
        remaining -= chunk.shape[1]
        count = max(0, min(chunk.shape[1], num_labels - remaining))
        if takes(model, "logits_to_keep"):  # xLSTM and ProphetNet compute all
            given["logits_to_keep"] = max(1, count)  # 0 would be all
        outputs = model(chunk, **given)
        logits = outputs.logits[:, outputs.logits.shape[1] - count :].float()
        expected = labels[:, num_labels - remaining - count : num_labels - remaining]
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), expected.flatten(), reduction="none")
        if remaining:
            cache = outputs.get(CACHE)
            if cache is None:
                raise EvaluationError(
                    f"{type(model).__name__} returns no KV cache (`{CACHE}`): it cannot read a text in chunks."
                )
            given["cache" if takes(model, "cache") else "past_key_values"] = cache
        del outputs, logits  # before the next forward
        yield loss.view_as(expected)


def rotates_by_length(model: PreTrainedModel) -> bool:
    """Whether the rotation of all tokens depends on how many there are."""
    rope = getattr(model.config.get_text_config(), "rope_parameters", None) or {}
    return rope.get("rope_type") in ("dynamic", "longrope")


def takes(model: PreTrainedModel, argument: str) -> bool:
    """Whether the `forward` of the model has an argument of that name."""
    return argument in inspect.signature(model.forward).parameters


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
