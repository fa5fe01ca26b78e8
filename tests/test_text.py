"""Texts from files and datasets, and their windows of tokens."""

import json

import checkpoints
import pytest
from datasets import Dataset
from tokenizers import processors

from modeling_fire.errors import TextError
from modeling_fire.text import read_texts, token_windows


def test_texts_from_files(tmp_path):
    documents = ["one", "two\nlines", "Grüße"]
    (tmp_path / "a.txt").write_text("\n".join(documents), encoding="utf-8")
    assert list(read_texts(str(tmp_path / "a.txt"))) == ["\n".join(documents)]
    rows = [{"text": document, "other": 1} for document in documents]
    (tmp_path / "a.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
    assert list(read_texts(str(tmp_path / "a.jsonl"))) == documents
    Dataset.from_list(rows).to_parquet(tmp_path / "a.parquet")
    assert list(read_texts(str(tmp_path / "a.parquet"))) == documents
    (tmp_path / "dataset").mkdir()  # to `datasets` a folder is a dataset like any on the Hub
    Dataset.from_list(rows).to_parquet(tmp_path / "dataset" / "train.parquet")
    assert list(read_texts(str(tmp_path / "dataset"))) == documents
    assert list(read_texts(f"{tmp_path / 'dataset'}:default")) == documents
    with pytest.raises(TextError, match="cannot be read as a file or a dataset"):
        list(read_texts(f"{tmp_path / 'dataset'}:nonesuch"))
    assert list(read_texts(documents)) == documents
    # In another block of the file, a column that nobody asked for has another type.
    row = {"text": "a" * 1000, "other": {"a": 1}}
    changing = f"{json.dumps(row)}\n" * 11_000 + json.dumps(row | {"other": "b"})
    for name, content, message in (
        ("b", '{"body": "x"}', "a row without a text in its column 'text': {'body': 'x'}"),
        ("c", '{"text": null}', "a row without a text in its column 'text': {'text': None}"),
        ("d", '{"text": "whole"}\n{"text": "bro', "cannot be read as a file or a dataset"),
        ("e", "", "cannot be read as a file or a dataset"),
        ("f", changing, "cannot be read as a file or a dataset"),
    ):
        (tmp_path / f"{name}.jsonl").write_text(content)
        with pytest.raises(TextError, match=message):
            list(read_texts(str(tmp_path / f"{name}.jsonl")))
    (tmp_path / "b.txt").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(TextError, match="is not text in UTF-8"):
        list(read_texts(str(tmp_path / "b.txt")))


def test_windows_are_the_documents_in_a_row(tmp_path):
    tokenizer = checkpoints.save_tokenizer(tmp_path)
    read = []

    def documents():
        for text in ("A fire", "needs", "three", "things"):
            read.append(text)
            yield text

    windows = token_windows(documents(), tokenizer, 4, 2)
    # The tokenizer marks neither beginning nor end.
    assert tokenizer.convert_ids_to_tokens(windows.flatten().tolist()) == [*"A fire", "</s>", "n"]
    assert read == ["A fire", "needs"], "no more is read than is needed"
    assert token_windows(["A fire"], tokenizer, 4, 9).shape == (1, 4)
    tokenizer._tokenizer.post_processor = processors.TemplateProcessing("<s> $0", special_tokens=[("<s>", 1)])
    windows = token_windows(["A", "fire", "", "x"], tokenizer, 9, 1)
    assert tokenizer.convert_ids_to_tokens(windows[0].tolist()) == ["<s>", "A", "<s>", *"fire", "<s>", "<s>"]
    assert token_windows(["A fire. " * 10**7], tokenizer, 4, 2).shape == (2, 4), "at once: the rest is not looked at"
