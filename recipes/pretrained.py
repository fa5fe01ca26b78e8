"""The model that a run starts from: what is known of it before its weights are loaded."""

from typing import Any

from settings import SettingsError
from transformers import AutoConfig, AutoTokenizer, PreTrainedTokenizerBase

from modeling_fire.evaluation.loading import LOADING_ERRORS


def open_pretrained(source: str, field: str, **options: Any) -> tuple[Any, PreTrainedTokenizerBase]:
    """
    Args:
        source (`str`): a folder, or a name on the Hub.
        field (`str`): of the YAML, which names it.

    The others are those of `from_pretrained`.

    Returns:
        `tuple[PreTrainedConfig, PreTrainedTokenizerBase]`: as they are saved.

    Raises:
        SettingsError: if there is no such model, or if its tokenizer has tokens that it does not know.
    """
    try:
        config = AutoConfig.from_pretrained(source, **options)
        tokenizer = AutoTokenizer.from_pretrained(source, **options)
    except LOADING_ERRORS as error:  # which may say what went wrong, and not with what
        raise SettingsError(f"`{field}`: {source} cannot be loaded: {error}") from error
    highest, known = max(tokenizer.get_vocab().values()), config.get_text_config().vocab_size
    if highest >= known:
        raise SettingsError(
            f"`{field}`: the tokenizer of {source} has tokens up to number {highest}, the model only {known} of them, "
            "from 0: give it the tokenizer that it was trained with, or resize its embeddings."
        )
    return config, tokenizer
