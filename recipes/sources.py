"""Rows of files and datasets, read as they are asked for, with one clear error for whatever cannot be read."""

from collections.abc import Iterator
from glob import glob
from pathlib import Path
from typing import Any

import datasets
from corpus import corpus
from datasets import load_dataset
from settings import SettingsError

from modeling_fire.text import FORMATS, READING_ERRORS


def open_rows(source: str | list[str]) -> tuple[datasets.IterableDataset, dict[str, Any]]:
    """
    The rows of a source.

    Args:
        source (`str` or `list[str]`):
            Files, of which `*` and `**` may name many: jsonl, json, csv and parquet (also compressed) have a document
            a row, any other file is one document, in the column `text`. Or a dataset of the Hub, as `name`,
            `name:configuration` or `name:configuration:split`; the split is `train`, if not given. Or `stdlib`,
            Python's standard library, with the split `held_out`.

    Returns:
        `tuple[IterableDataset, dict[str, Any]]`: all rows, and the first of them.

    Raises:
        SettingsError: if there is no such file or dataset, if it cannot be read, or has no rows.
    """
    patterns = [source] if isinstance(source, str) else source
    paths = sorted({path for pattern in patterns for path in glob(pattern, recursive=True) if Path(path).is_file()})
    name, configuration, split = (*patterns[0].split(":"), "", "")[:3]
    if not paths and name == "stdlib":
        files = corpus()[split == "held_out"]
        texts = [file.decode(errors="replace") for file in files]
        return datasets.Dataset.from_dict({"text": texts}).to_iterable_dataset(), {"text": texts[0]}
    if not paths and Path(name).suffix in (".txt", *FORMATS):
        raise SettingsError(f"There is no file {source}.")
    formats = {next((FORMATS[end] for end in Path(path).suffixes if end in FORMATS), "text") for path in paths}
    if len(formats) > 1:
        raise SettingsError(f"{source} names files of several kinds ({', '.join(sorted(formats))}): choose one.")
    try:
        if paths:
            options: dict[str, Any] = {"sample_by": "document"} if formats == {"text"} else {}
            rows = load_dataset(formats.pop(), data_files=paths, split="train", streaming=True, **options)
        else:
            rows = load_dataset(name, configuration or None, split=split or "train", streaming=True)
        return rows, next(iter(rows))
    except StopIteration as error:
        raise SettingsError(f"{source} has no rows.") from error
    except READING_ERRORS as error:
        known = "cannot be read" if paths else "names no file, and cannot be read as a dataset"
        raise SettingsError(f"{source} {known}: {error}") from error


def open_documents(source: str | list[str], column: str) -> datasets.IterableDataset:
    """
    The rows of a source, see [`open_rows`], with the column `column`, that [`texts`] reads.

    Raises:
        SettingsError: if they cannot be read, or have no such column.
    """
    rows, first = open_rows(source)
    if column not in first:
        raise SettingsError(f"{source} has no column {column!r}, but {', '.join(first)}: set `data.column`.")
    return rows


def texts(rows: datasets.IterableDataset, source: str | list[str], column: str, number: int = 0) -> Iterator[str]:
    """
    The texts of the rows that [`open_documents`] opened.

    Args:
        rows (`IterableDataset`): they may begin where an earlier reading ended.
        source (`str` or `list[str]`): their source, for messages.
        column (`str`): the column with the text, which may be empty.
        number (`int`, *optional*, defaults to 0): rows before these, for messages.

    Raises:
        SettingsError: as they are read: if a row cannot be, or has no text.
    """
    try:
        for row in rows:
            number += 1
            text = row.get(column)
            if not isinstance(text, str):
                raise SettingsError(
                    f"Row {number} of {source} has {text!r} in the column {column!r}, which is no text: mend it, or "
                    "leave it out."
                )
            yield text
    except SettingsError:
        raise
    except READING_ERRORS as error:
        raise SettingsError(f"{source} cannot be read after row {number}: {error}") from error
