"""Text as bytes: any files, or what every machine with Python has, the standard library and its documentation."""

import random
import sysconfig
from glob import glob
from pathlib import Path

import torch
from datasets import Dataset
from settings import SettingsError
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast
from transformers.convert_slow_tokenizer import bytes_to_unicode


def corpus(pattern: str | None = None, held_out_share: float = 0.1) -> tuple[list[bytes], list[bytes]]:
    """
    Text files, shuffled, parted by *file*.

    Args:
        pattern (`str`, *optional*): of their names, as in a shell. By default what Python comes with.
        held_out_share (`float`, *optional*, defaults to 0.1): share of the files that are not for training.

    Returns:
        `tuple[list[bytes], list[bytes]]`: the files for training, and the held-out ones, at least one.

    Raises:
        SettingsError: if there are fewer than two files.
    """
    files = python_files() if pattern is None else [Path(name).read_bytes() for name in sorted(glob(pattern))]
    if len(files) < 2:
        raise SettingsError(f"{pattern!r} names {len(files)} files: one to train on and one to test are the least.")
    random.Random(0).shuffle(files)
    num_held_out = max(1, round(len(files) * held_out_share))
    return files[num_held_out:], files[:num_held_out]


def python_files(min_bytes: int = 3000) -> list[bytes]:
    """The modules of the standard library (without its tests) and the topics of `help()`, unless they are shorter."""
    from pydoc_data.topics import topics

    root = Path(sysconfig.get_path("stdlib"))
    skipped = {"site-packages", "dist-packages", "test", "tests", "idle_test", "lib2to3", "pydoc_data"}
    paths = [path for path in sorted(root.rglob("*.py")) if not skipped & set(path.relative_to(root).parts)]
    files = [path.read_bytes() for path in paths] + [text.encode() for _, text in sorted(topics.items())]
    return [file for file in files if len(file) >= min_bytes]


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """A tokenizer whose token ids are bytes (0 to 255) and nothing else; loads anywhere through AutoTokenizer."""
    vocabulary = {character: byte for byte, character in bytes_to_unicode().items()}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        clean_up_tokenization_spaces=False,
        model_input_names=["input_ids", "attention_mask"],
    )


def as_tokens(text: bytes) -> torch.Tensor:
    """The bytes as token ids, of shape `(len(text),)`."""
    return torch.frombuffer(bytearray(text), dtype=torch.uint8).long()


def training_blocks(files: list[bytes], length: int) -> Dataset:
    """All files in a row, cut into blocks of `length` tokens, with `labels` for a causal language model."""
    tokens = as_tokens(b"".join(files))
    blocks = tokens[: len(tokens) // length * length].view(-1, length).numpy()
    return Dataset.from_dict({"input_ids": blocks, "labels": blocks}).with_format("torch")


def evaluation_windows(files: list[bytes], length: int, count: int) -> torch.Tensor:
    """
    `count` windows of `length` tokens, evenly spread over the files that are long enough, none overlapping another.

    Raises:
        SettingsError: if the files hold fewer windows.
    """
    windows = [as_tokens(file[i : i + length]) for file in files for i in range(0, len(file) - length + 1, length)]
    if len(windows) < count:
        raise SettingsError(f"The held-out files hold only {len(windows)} windows of {length} tokens, not {count}.")
    return torch.stack([windows[i * len(windows) // count] for i in range(count)])
