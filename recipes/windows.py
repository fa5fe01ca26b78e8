"""Text as windows of tokens: the beginning to train on, the end to evaluate."""

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import islice

import torch
from datasets import Dataset
from transformers import PreTrainedTokenizerBase

from modeling_fire.text import read_texts, token_windows


@dataclass
class Windows:
    """
    Args:
        train_texts (`list[str]`): the documents, without what is held out.
        train (`torch.LongTensor` of shape `(windows, length)`): all of them.
        held_out (`torch.LongTensor` of shape `(num_windows, held_out_length)`): evenly spread over the rest.
    """

    train_texts: list[str]
    train: torch.Tensor
    held_out: torch.Tensor


def read_windows(
    text: str | Sequence[str],
    tokenizer: PreTrainedTokenizerBase,
    length: int,
    held_out: float,
    held_out_length: int,
    num_windows: int,
    documents: int | None = None,
    other: str | None = None,
) -> Windows:
    """
    Args:
        text (`str` or `Sequence[str]`):
            A file or a dataset, see [`~modeling_fire.text.read_texts`], or the documents themselves.
        tokenizer (`PreTrainedTokenizerBase`): also gives each document its special tokens.
        length (`int`): tokens in a window for training.
        held_out (`float`): share of the text, in characters.
        held_out_length (`int`): tokens in a held-out window.
        num_windows (`int`): how many of these.
        documents (`int`, *optional*): read no more than these.
        other (`str`, *optional*): a text that is held out instead of a share of the first.

    Raises:
        ValueError: if the held-out text is too short.
    """
    train_texts, held_out_texts = split(list(islice(read_texts(text), documents)), held_out)
    if other is not None:
        held_out_texts = list(islice(read_texts(other), documents))
    train = token_windows(train_texts, tokenizer, length, sys.maxsize)
    windows = token_windows(held_out_texts, tokenizer, held_out_length, sys.maxsize)
    if len(windows) < num_windows:
        where = f"the held-out {held_out:.0%} of {text}" if other is None else other
        raise ValueError(
            f"There are {len(windows)} windows of {held_out_length} tokens in {where}, not {num_windows}: take more "
            "text, hold out more of it, or evaluate fewer or shorter windows."
        )
    return Windows(train_texts, train, windows[torch.arange(num_windows) * len(windows) // num_windows])


def split(texts: list[str], held_out: float) -> tuple[list[str], list[str]]:
    """Parts the texts in two, at a character, so that the second part is the last share `held_out` of all."""
    left = round(sum(map(len, texts)) * (1 - held_out))
    first, second = [], []
    for text in texts:
        part = min(left, len(text))
        left -= part
        first.append(text[:part])
        second.append(text[part:])
    return [text for text in first if text], [text for text in second if text]


def as_dataset(windows: torch.Tensor, num_targets: int | None = None) -> Dataset:
    """With `labels` for a causal language model: all tokens, or only the last `num_targets`."""
    labels = windows.clone()
    if num_targets is not None:
        labels[:, :-num_targets] = -100
    return Dataset.from_dict({"input_ids": windows.numpy(), "labels": labels.numpy()}).with_format("torch")
