"""Models of any kind and the text that they share, with one clear error for whatever does not fit together."""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from safetensors import SafetensorError
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    MptPreTrainedModel,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from ..errors import EvaluationError
from ..text import read_texts, token_windows


# What transformers raises for a checkpoint that is missing, broken, of an unknown kind or of another shape.
LOADING_ERRORS = (OSError, ValueError, KeyError, ImportError, RuntimeError, SafetensorError)
# Where the config does not say how long the training texts were (BLOOM, Mamba).
DEFAULT_TRAIN_LENGTH = 512


@dataclass
class Checkpoint:
    """
    A causal language model whose weights are still to be loaded.

    Args:
        source (`str`): folder or Hub id.
        name (`str`): what it is called in tables and plots; says nothing of the machine.
        trust_remote_code (`bool`): whether code that comes with it may run.
        config (`PreTrainedConfig`): of the language model, where there are others beside it.
        tokenizer (`PreTrainedTokenizerBase`): its tokenizer.
    """

    source: str
    name: str
    trust_remote_code: bool
    config: PreTrainedConfig
    tokenizer: PreTrainedTokenizerBase

    @classmethod
    def open(cls, source: str, name: str, trust_remote_code: bool = False) -> "Checkpoint":
        """Reads config and tokenizer. Raises [`EvaluationError`] if there are none."""
        try:
            config = AutoConfig.from_pretrained(source, trust_remote_code=trust_remote_code).get_text_config()
            tokenizer = AutoTokenizer.from_pretrained(source, trust_remote_code=trust_remote_code)
        except LOADING_ERRORS as error:
            raise EvaluationError(f"{source} cannot be loaded: {error}") from error
        return cls(source, name, trust_remote_code, config, tokenizer)

    @property
    def train_length(self) -> int:
        """Length of the training texts in tokens, as far as the config tells."""
        names = ("max_position_embeddings", "max_seq_len")  # the latter is MPT's
        return next((length for name in names if (length := getattr(self.config, name, None))), DEFAULT_TRAIN_LENGTH)

    def load(self, dtype: str = "auto", longest: int = 0) -> PreTrainedModel:
        """
        The model in evaluation mode, on a GPU if there is one.

        Args:
            dtype (`str`, *optional*, defaults to `"auto"`): of the weights; `"auto"` is that of the checkpoint.
            longest (`int`, *optional*, defaults to 0): how many tokens it will be given at once.

        Raises:
            [`EvaluationError`]: if it does not load whole, or has position embeddings for fewer tokens.
        """
        try:
            loaded: Any = AutoModelForCausalLM.from_pretrained(
                self.source, dtype=dtype, trust_remote_code=self.trust_remote_code, output_loading_info=True
            )
        except UnpicklingError as error:
            raise EvaluationError(
                f"The weights of {self.source} are refused: they are broken, or a pickle of more than tensors, which "
                "could run code as it is read. Take the model as safetensors."
            ) from error
        except LOADING_ERRORS as error:
            raise EvaluationError(f"{self.source} cannot be loaded: {error}") from error
        model, report = loaded
        if report["missing_keys"]:  # transformers draws them at random, with no more than a warning
            raise EvaluationError(f"{self.source} lacks weights, among them {min(report['missing_keys'])}.")
        if isinstance(model, MptPreTrainedModel):  # computes its biases up to a length, which nothing else limits
            model.config.max_seq_len = max(model.config.max_seq_len, longest)
        tokens = model.get_input_embeddings()
        rows = [m.num_embeddings for m in model.modules() if isinstance(m, torch.nn.Embedding) and m is not tokens]
        positions = self.train_length
        # A table of positions, as of GPT-2; that of OPT has two rows more.
        if longest > positions and any(positions <= number <= positions + 2 for number in rows):
            raise EvaluationError(
                f"{self.name} has embeddings for no more than {positions} positions: take contexts up to that."
            )
        return model.to("cuda" if torch.cuda.is_available() else "cpu").eval()


def distinct_names(sources: Sequence[str]) -> list[str]:
    """
    Names of models for tables and plots: the Hub id, or as many of the last parts of a folder's path as tell it from
    the others.

    Raises:
        [`EvaluationError`]: if one is given twice.
    """
    parts = [Path(source).resolve().parts if Path(source).is_dir() else (source,) for source in sources]
    if len(set(parts)) < len(parts):
        raise EvaluationError("A model is given twice.")
    for depth in itertools.count(1):
        names = ["/".join(part[-depth:]) for part in parts]
        if len(set(names)) == len(names):
            break
    return names


def shared_tokens(text: str, checkpoints: Sequence[Checkpoint], count: int) -> torch.Tensor:
    """
    The first tokens of a text, the same for all models.

    Args:
        text (`str`): file or dataset, see [`~modeling_fire.text.read_texts`].
        checkpoints (`Sequence[Checkpoint]`): whose tokenizers to ask.
        count (`int`): how many tokens at the most.

    Returns:
        `torch.LongTensor` of shape `(at most count,)`.

    Raises:
        [`EvaluationError`]: if tokenizers differ on this text, or one has tokens that its model does not know.
        [`~modeling_fire.errors.TextError`]: if the text cannot be read.
    """
    first, *others = (token_windows(read_texts(text), c.tokenizer, 1, count).flatten() for c in checkpoints)
    for checkpoint, tokens in zip(checkpoints[1:], others, strict=True):
        if not torch.equal(first, tokens):
            raise EvaluationError(
                f"{checkpoint.name} cuts the text into other tokens than {checkpoints[0].name}, so that perplexities "
                "per token cannot be compared: evaluate them one by one."
            )
    for checkpoint in checkpoints:
        if len(first) and int(first.max()) >= checkpoint.config.vocab_size:
            raise EvaluationError(
                f"The tokenizer of {checkpoint.name} does not fit the model: it makes token {int(first.max())}, and "
                f"the model has {checkpoint.config.vocab_size}."
            )
    return first
