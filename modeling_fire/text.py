"""Text from files and from the Hub's datasets, and as tokens."""

from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import torch
from datasets import load_dataset
from datasets.exceptions import DatasetsError
from huggingface_hub.errors import HFValidationError
from transformers import PreTrainedTokenizerBase

from .errors import TextError


COLUMN = "text"
# Of a token, on the average; ten times what is usual.
MAX_CHARACTERS = 50
# What `datasets` raises for what is missing, broken, empty, or no dataset.
READING_ERRORS = (DatasetsError, HFValidationError, OSError, RuntimeError, StopIteration, TypeError, ValueError)
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
        [`TextError`]: if there is no such file or dataset, or it has no column `text`.
    """
    if not isinstance(source, str):
        yield from source
        return
    path = Path(source)
    if path.is_file() and path.suffix not in FORMATS:
        try:
            yield path.read_text(encoding="utf-8")
        except UnicodeDecodeError as error:
            raise TextError(f"{source} is not text in UTF-8: {error}.") from error
        return
    if not source or (not path.is_file() and path.suffix in (".txt", *FORMATS)):
        raise TextError(f"There is no file {source!r}.")
    try:
        if path.is_file():
            rows = load_dataset(FORMATS[path.suffix], data_files=source, split="train", streaming=True)
        else:
            name, _, configuration = source.partition(":")
            rows = load_dataset(name, configuration or None, split="train", streaming=True)
        for row in rows:
            if not isinstance(row.get(COLUMN), str):
                raise TextError(f"{source} has a row without a text in its column {COLUMN!r}: {row}.")
            yield row[COLUMN]
    except TextError:
        raise
    except READING_ERRORS as error:
        raise TextError(f"{source} cannot be read as a file or a dataset: {error}") from error


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
    Raises [`TextError`] if a text has tokens that the model does not know. That a tokenizer has such is no fault
    yet: to that of a GGUF file transformers may add one, which no text has.
    """
    if ids.numel() and int(ids.max()) >= vocab_size:
        raise TextError(
            f"The tokenizer makes token number {int(ids.max())} of a text, and the model has {vocab_size}, from 0: "
            "give it the tokenizer that it was trained with, or resize its embeddings."
        )
