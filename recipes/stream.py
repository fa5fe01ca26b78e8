"""Text as a stream of packed windows of tokens that goes on exactly where it was, and as windows to evaluate."""

import random
from collections import deque
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from typing import Any

import torch
from settings import SettingsError
from sources import open_documents, texts
from torch.utils.data import IterableDataset
from transformers import PreTrainedTokenizerBase


# The tokens of each document, or part of one, in a window.
Window = list[list[int]]


def tokenize(documents: list[str], tokenizer: PreTrainedTokenizerBase) -> list[list[int]]:
    """Each document with the special tokens that the tokenizer gives it, and with its end token, if it knows one."""
    tokens = tokenizer(documents, verbose=False).input_ids  # not verbose: it would warn of long texts
    end = tokenizer.eos_token_id
    if end is not None:
        tokens = [ids if ids[-1:] == [end] else [*ids, end] for ids in tokens]
    return tokens


class PackedStream(IterableDataset):
    """
    Windows of tokens, packed from documents without padding, over and over: every token once in each pass.

    A document that does not fit goes on in another window. `position_ids` start again at 0 with each document and each
    window, so that documents do not see each other, and the label of a token there is -100, because nothing before it
    may predict it. So many documents at a time are read, shuffled and packed, and their windows shuffled; what does
    not fill a window begins the first window of the next ones.

    Args:
        source (`str` or `list[str]`): see [`~sources.open_documents`].
        column (`str`): see [`~sources.open_documents`].
        tokenizer (`PreTrainedTokenizerBase`): its tokens.
        length (`int`): tokens in a window.
        buffer_size (`int`): documents that are shuffled together.
        seed (`int`): of the shuffling, which differs from pass to pass.
        windows_per_step (`int`): `state_after` knows the multiples of it.
        state (`dict`, *optional*): where to begin, from `state_after` of a stream with the same arguments.

    Raises:
        SettingsError: as it is read: if the source cannot be, if a row has no text, or if a whole pass has not the
            windows of one step.
    """

    def __init__(
        self,
        source: str | list[str],
        column: str,
        tokenizer: PreTrainedTokenizerBase,
        length: int,
        buffer_size: int,
        seed: int,
        windows_per_step: int,
        state: dict[str, Any] | None = None,
    ):
        self.source = source
        self.column = column
        self.tokenizer = tokenizer
        self.length = length
        self.buffer_size = buffer_size
        self.seed = seed
        self.windows_per_step = windows_per_step
        self.start = state or {"windows": 0, "passes": 0, "buffers": 0, "rows": None, "tail": [], "used": 0}
        # Of the last steps: Trainer has read less than two steps ahead of the one that it takes.
        self.states: deque[dict[str, Any]] = deque([self.start], maxlen=4)

    def state_after(self, windows: int) -> dict[str, Any]:
        """The state after so many windows since the first start, as JSON; only the last few steps are remembered."""
        return next(state for state in self.states if state["windows"] == windows)

    def __iter__(self) -> Iterator[dict[str, torch.Tensor]]:
        used = self.start["used"]
        with ThreadPoolExecutor(1) as reader:
            buffers = self.buffers()
            coming = reader.submit(next, buffers)
            while True:
                place, windows = coming.result()
                coming = reader.submit(next, buffers)  # read and tokenised while these windows are trained on
                for index in range(used, len(windows)):
                    count = place["windows"] + index + 1
                    if count % self.windows_per_step == 0:
                        self.states.append({**place, "windows": count, "used": index + 1})
                    yield as_features(windows[index])
                used = 0

    def buffers(self) -> Iterator[tuple[dict[str, Any], list[Window]]]:
        """The state before each buffer, and its windows; without end."""
        place = {**self.start, "windows": self.start["windows"] - self.start["used"], "used": 0}
        while True:
            rows = open_documents(self.source, self.column)
            if place["rows"] is not None:
                rows.load_state_dict(place["rows"])
            read = texts(rows, self.source, self.column, place["buffers"] * self.buffer_size)
            while documents := [*islice(read, self.buffer_size)]:
                shuffle = random.Random(f"{self.seed}-{place['passes']}-{place['buffers']}").shuffle
                shuffle(documents)
                windows, tail = self.pack(documents, place["tail"])
                shuffle(windows)
                yield place, windows
                place = {
                    **place,
                    "windows": place["windows"] + len(windows),
                    "buffers": place["buffers"] + 1,
                    "rows": rows.state_dict(),
                    "tail": tail,
                }
            if place["windows"] < self.windows_per_step:
                raise SettingsError(
                    f"{self.source} holds {place['windows']} windows of {self.length} tokens; one step takes "
                    f"{self.windows_per_step}: take more text, or a smaller `batch_size`."
                )
            place = {**place, "passes": place["passes"] + 1, "buffers": 0, "rows": None}

    def pack(self, documents: list[str], tail: Window) -> tuple[list[Window], Window]:
        """The windows that `tail` and the documents fill, and the new tail."""
        windows, window, room = [], list(tail), self.length - sum(map(len, tail))
        for ids in tokenize(documents, self.tokenizer):
            start = 0
            while start < len(ids):
                window.append(ids[start : start + room])
                start, room = start + room, room - len(window[-1])
                if room == 0:
                    windows.append(window)
                    window, room = [], self.length
        return windows, window


def as_features(window: Window) -> dict[str, torch.Tensor]:
    """What the model takes, each of shape `(length,)`."""
    return {
        "input_ids": torch.tensor([token for piece in window for token in piece]),
        "position_ids": torch.cat([torch.arange(len(piece)) for piece in window]),
        "labels": torch.tensor([label for piece in window for label in (-100, *piece[1:])]),
    }


def held_out_windows(
    source: str | list[str], column: str, tokenizer: PreTrainedTokenizerBase, length: int, count: int
) -> torch.Tensor:
    """
    The first `count` windows of `length` tokens that lie within one document each, none overlapping another.

    Args:
        source (`str` or `list[str]`): see [`~sources.open_documents`].
        column (`str`): see [`~sources.open_documents`].
        tokenizer (`PreTrainedTokenizerBase`): its tokens.
        length (`int`): tokens in a window.
        count (`int`): how many windows.

    Returns:
        `torch.LongTensor` of shape `(count, length)`.

    Raises:
        SettingsError: if the source cannot be read, a row has no text, or there are fewer windows.
    """
    windows: list[list[int]] = []
    for text in texts(open_documents(source, column), source, column):
        # No token is shorter than a byte, so that most documents need not be tokenised.
        ids = tokenize([text], tokenizer)[0] if len(text.encode()) >= length - 1 else []
        windows += [ids[i : i + length] for i in range(0, len(ids) - length + 1, length)]
        if len(windows) >= count:
            return torch.tensor(windows[:count])
    raise SettingsError(
        f"The held-out {source} has {len(windows)} windows of {length} tokens within one document, not {count}: take "
        "more or longer documents, or evaluate fewer or shorter windows."
    )
