"""The model that a run starts from: what is known of it before its weights are loaded."""

import shutil
from pathlib import Path
from typing import Any

from huggingface_hub import snapshot_download
from settings import SettingsError
from transformers import AutoConfig, AutoTokenizer, PreTrainedTokenizerBase

from modeling_fire.conversion import check_out
from modeling_fire.evaluation.loading import LOADING_ERRORS


def read_pretrained(source: str, field: str, **options: Any) -> tuple[Any, PreTrainedTokenizerBase]:
    """
    Args:
        source (`str`): a folder, or a name on the Hub.
        field (`str`): of the YAML, which names it.

    The others are those of `from_pretrained`.

    Returns:
        `tuple[PreTrainedConfig, PreTrainedTokenizerBase]`: as they are saved.

    Raises:
        SettingsError: if there is no such model.
    """
    try:
        return AutoConfig.from_pretrained(source, **options), AutoTokenizer.from_pretrained(source, **options)
    except LOADING_ERRORS as error:  # which may say what went wrong, and not with what
        raise SettingsError(f"`{field}`: {source} cannot be loaded: {error}") from error


def open_pretrained(source: str, field: str, **options: Any) -> tuple[Any, PreTrainedTokenizerBase]:
    """
    [`read_pretrained`] for those who do not look at the tokens of their text: raises [`SettingsError`] as well if the
    tokenizer has tokens that the model does not know.
    """
    config, tokenizer = read_pretrained(source, field, **options)
    highest, known = max(tokenizer.get_vocab().values()), config.get_text_config().vocab_size
    if highest >= known:
        raise SettingsError(
            f"`{field}`: the tokenizer of {source} has tokens up to number {highest}, the model only {known} of them, "
            "from 0: give it the tokenizer that it was trained with, or resize its embeddings."
        )
    return config, tokenizer


def copy_pretrained(source: str, folder: Path, revision: str | None) -> None:
    """
    Args:
        source (`str`): a folder, or a name on the Hub.
        folder (`Path`): where its files are to lie, once all of them do; not what lies in folders of its own.
        revision (`str`, *optional*): on the Hub.

    Raises:
        ConversionError: if something lies in `folder`.
    """
    check_out(folder, source, overwrite=False)
    found = Path(source) if Path(source).is_dir() else Path(snapshot_download(source, revision=revision))
    unfinished = folder.with_name(f"{folder.name}.unfinished")
    shutil.rmtree(unfinished, ignore_errors=True)  # which may be of another source
    unfinished.mkdir(parents=True)
    for path in found.iterdir():
        if path.is_file():
            shutil.copyfile(path, unfinished / path.name)
    unfinished.rename(folder)
