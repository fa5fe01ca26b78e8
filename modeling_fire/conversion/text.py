"""Text to calibrate on: from files, from the Hub's datasets, or from the model itself."""

from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from datasets import load_dataset
from datasets.exceptions import DatasetsError
from huggingface_hub.errors import HFValidationError
from transformers import GenerationConfig, PreTrainedTokenizerBase
from transformers.utils import logging

from .family import ConversionError


COLUMN = "text"
# Of a token, on the average; ten times what is usual.
MAX_CHARACTERS = 50
FORMATS = {".jsonl": "json", ".json": "json", ".parquet": "parquet", ".csv": "csv"}


def read_texts(source: str | Sequence[str]) -> Iterator[str]:
    """
    The documents of a source, one by one.

    Args:
        source (`str` or `Sequence[str]`):
            A file: plain text is one document; jsonl, json, csv and parquet have theirs in a column `text`. The name
            of a dataset, with its configuration after a colon if it has several: its `train` split, streamed. Or
            the documents themselves.

    Raises:
        [`ConversionError`]: if there is no such file or dataset, or it has no column `text`.
    """
    if not isinstance(source, str):
        yield from source
        return
    path = Path(source)
    if path.is_file() and path.suffix not in FORMATS:
        try:
            yield path.read_text(encoding="utf-8")
        except UnicodeDecodeError as error:
            raise ConversionError(f"{source} is not text in UTF-8: {error}.") from error
        return
    if not source or (not path.is_file() and path.suffix in (".txt", *FORMATS)):
        raise ConversionError(f"There is no file {source!r}.")
    try:
        if path.is_file():
            rows = load_dataset(FORMATS[path.suffix], data_files=source, split="train", streaming=True)
        else:
            name, _, configuration = source.partition(":")
            rows = load_dataset(name, configuration or None, split="train", streaming=True)
        for row in rows:
            if not isinstance(row.get(COLUMN), str):
                raise ConversionError(f"{source} has a row without a text in its column {COLUMN!r}: {row}.")
            yield row[COLUMN]
    except ConversionError:
        raise
    # What `datasets` raises for what is missing, broken, empty, or no dataset.
    except (DatasetsError, HFValidationError, OSError, RuntimeError, StopIteration, ValueError) as error:
        raise ConversionError(f"{source} cannot be read as a file or a dataset: {error}") from error


def token_windows(texts: Iterable[str], tokenizer: PreTrainedTokenizerBase, length: int, count: int) -> torch.Tensor:
    """
    All documents in a row, cut into windows. Each has the special tokens that the tokenizer gives it, and if those
    mark neither its beginning nor its end, an `eos_token` after it.

    Args:
        texts (`Iterable[str]`): documents; no more are read than are needed.
        tokenizer (`PreTrainedTokenizerBase`): of the model.
        length (`int`): tokens in a window.
        count (`int`): how many windows there may be at the most.

    Returns:
        `torch.LongTensor` of shape `(windows, length)`.
    """
    marks = {tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.cls_token_id, tokenizer.sep_token_id} - {None}
    tokens: list[int] = []
    for text in texts:
        # Of a text much longer than what is left to read, the rest need not be looked at.
        text = text[: MAX_CHARACTERS * (length * count - len(tokens))]
        ids = tokenizer(text, verbose=False).input_ids  # not verbose: it would warn of a long text
        if ids and not marks & {ids[0], ids[-1]} and tokenizer.eos_token_id is not None:
            ids.append(tokenizer.eos_token_id)
        tokens += ids
        if len(tokens) >= length * count:
            break
    windows = min(count, len(tokens) // length)
    return torch.tensor(tokens[: windows * length], dtype=torch.long).view(windows, length)


def check_tokens(ids: torch.Tensor, vocab_size: int) -> None:
    """
    Raises [`ConversionError`] if a text has tokens that the model does not know. That a tokenizer has such is no fault
    yet: to that of a GGUF file transformers may add one, which no text has.
    """
    if ids.numel() and int(ids.max()) >= vocab_size:
        raise ConversionError(
            f"The tokenizer makes token number {int(ids.max())} of a text, and the model has {vocab_size}, from 0: "
            "give it the tokenizer that it was trained with, or resize its embeddings."
        )


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
    generation_config = model.generation_config
    # One that knows no end: a text may end before its window, and another begin.
    model.generation_config = GenerationConfig()
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        batches = torch.full((count, 1), start, device=device).split(batch_size)
        for batch in logging.tqdm(batches, desc="Sampling text", unit=" batches"):
            mask = torch.ones_like(batch)
            windows.append(
                model.generate(batch, attention_mask=mask, max_length=length, do_sample=True, top_k=0).cpu()
            )
    model.generation_config = generation_config
    return torch.cat(windows)
