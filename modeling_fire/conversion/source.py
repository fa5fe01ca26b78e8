"""Where a checkpoint comes from: a folder, the Hub, or a GGUF file; and what is read of it besides the weights."""

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HFValidationError
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedConfig, PreTrainedTokenizerBase
from transformers.utils import CONFIG_NAME, logging

from .family import ConversionError, reading
from .weights import WEIGHT_FILES, Shard, find_shards, shard_names


logger = logging.get_logger(__name__)

TOKENIZER_FILES = ("tokenizer*", "vocab.*", "merges.txt", "special_tokens_map.json", "added_tokens.json")
TEKKEN = "tekken.json"  # Mistral's own format
LICENCE_FILES = ("LICENSE*", "USE_POLICY*", "NOTICE*")  # which cards link to
SMALL_FILES = (
    "config.json",
    "generation_config.json",
    "README.md",
    "*chat_template*",
    *TOKENIZER_FILES,
    *LICENCE_FILES,
)


@dataclass(frozen=True)
class Source:
    """
    A checkpoint, with its weights still to be fetched if it is on the Hub.

    Args:
        name (`str`): the Hub id, or the name of the folder.
        folder (`Path`): where its files are.
        revision (`str`, *optional*): the commit; `None` for a local folder.
        gguf_file (`str`, *optional*): the file in the folder to read weights, config and tokenizer from.
    """

    name: str
    folder: Path
    revision: str | None = None
    gguf_file: str | None = None

    @classmethod
    def open(cls, source: str | Path, revision: str | None = None, gguf_file: str | None = None) -> "Source":
        """
        Takes a local folder, or fetches all but the weights from the Hub. Raises [`ConversionError`] if there is
        neither.
        """
        folder = Path(source)
        if folder.is_dir():
            if revision is not None:
                raise ConversionError("`revision` is for checkpoints on the Hub.")
            if gguf_file is not None and not (folder / gguf_file).is_file():
                raise ConversionError(f"{source} has no file {gguf_file}.")
            return cls(folder.resolve().name, folder, None, gguf_file)
        files = [*SMALL_FILES, gguf_file] if gguf_file is not None else SMALL_FILES
        folder = fetch(str(source), revision, files)
        return cls(str(source), folder, folder.name, gguf_file)

    @property
    def on_hub(self) -> bool:
        return self.revision is not None

    def config_dict(self) -> dict[str, Any]:
        """The config as it is stored, before any class of transformers reads it."""
        with reading(f"{self.gguf_file or CONFIG_NAME} of {self.name}"):
            return PreTrainedConfig.get_config_dict(self.folder, **self.gguf)[0]

    def config(self) -> PreTrainedConfig:
        with reading(f"{self.gguf_file or CONFIG_NAME} of {self.name}"):
            return AutoConfig.from_pretrained(self.folder, trust_remote_code=False, **self.gguf)

    def shards(self) -> list[Shard]:
        """The weights, fetched by now. Of a GGUF file: all of them, as transformers reads them, in float32."""
        if self.gguf_file is not None:
            return [self.model().state_dict()]
        if self.on_hub:
            for files in WEIGHT_FILES:
                fetch(self.name, self.revision, files)
                if names := shard_names(self.folder):
                    fetch(self.name, self.revision, names)
                    break
        return list(find_shards(self.folder))

    def model(self) -> torch.nn.Module:
        """The original model in float32."""
        with reading(f"{self.gguf_file or 'The model'} of {self.name}"):
            return AutoModelForCausalLM.from_pretrained(
                self.folder, dtype=torch.float32, trust_remote_code=False, **self.gguf
            ).eval()

    def tokenizer(self) -> PreTrainedTokenizerBase | None:
        """The tokenizer, if the checkpoint has one."""
        if self.gguf_file is None and not any(any(self.folder.glob(pattern)) for pattern in TOKENIZER_FILES):
            if (self.folder / TEKKEN).exists():
                logger.warning(f"{self.name} has its tokenizer as {TEKKEN} alone, which does not come along.")
            return None
        with reading(f"The tokenizer of {self.name}"):
            return AutoTokenizer.from_pretrained(self.folder, trust_remote_code=False, **self.gguf)

    @property
    def gguf(self) -> dict[str, str]:
        """The argument of transformers' `from_pretrained` methods, where it applies."""
        return {} if self.gguf_file is None else {"gguf_file": self.gguf_file}


def fetch(source: str, revision: str | None, files: Iterable[str]) -> Path:
    """The folder with files of a repository on the Hub. Raises [`ConversionError`] if there is no such repository."""
    try:
        return Path(snapshot_download(source, revision=revision, allow_patterns=list(files)))
    except (OSError, HFValidationError) as error:
        raise ConversionError(f"{source} is no folder, and could not be fetched from the Hub: {error}") from error
