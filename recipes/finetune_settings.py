"""The YAML of a fine-tuning run."""

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from settings import SettingsError
from training_arguments import training_arguments
from transformers import TrainingArguments
from transformers.integrations import is_deepspeed_zero3_enabled


@dataclass
class Model:
    """What is fine-tuned: any causal language model that transformers loads, a folder or a name on the Hub."""

    source: str
    revision: str | None = None


@dataclass
class Data:
    """What is read; sources are files or datasets, see `read_examples` in questions.py."""

    train: str | list[str]
    length: int  # tokens of question, document and answer together; the document is cut to fit
    held_out: str | list[str] | float = 0.1  # a source, or the share of the documents of `train`


@dataclass
class Evaluation:
    """Greedy answers to held-out questions, from documents cut to each of the `lengths`."""

    lengths: list[int]  # in tokens, prompt and answer together
    max_new_tokens: int
    num_examples: int | None = None  # at most so many, evenly spread


@dataclass
class Finetune:
    """The YAML. `training` holds transformers' TrainingArguments, `lora` the fields of peft's LoraConfig."""

    output_dir: str
    task: str  # of SCROLLS: which metric, and how SCROLLS's own files are read
    model: Model
    data: Data
    training: dict
    evaluation: Evaluation
    lora: dict | None = None  # the position bias is trained beside it; all weights are, if not set
    bias_lr_multiplier: float = 1.0  # learning rate of the position bias, as a multiple of the others'

    def __post_init__(self):
        share = self.data.held_out
        if isinstance(share, (int, float)) and not 0 < share < 1:
            raise ValueError(f"`data.held_out` must be a source or lie between 0 and 1, got {share}.")
        count = self.evaluation.num_examples
        if count is not None and count < 1:
            raise ValueError(f"`evaluation.num_examples` must be 1 or more, or null for all, got {count}.")
        lengths, new = self.evaluation.lengths, self.evaluation.max_new_tokens
        if not lengths or not 1 <= new < min(lengths):
            raise ValueError(f"`evaluation.max_new_tokens` ({new}) do not fit into `evaluation.lengths`: {lengths}.")

    @property
    def settings(self) -> dict[str, Any]:
        """All that the result depends on."""
        return {name: value for name, value in asdict(self).items() if name != "output_dir"}

    def arguments(self) -> TrainingArguments:
        """Raises [`SettingsError`] for what is wrong with `training`."""
        arguments = training_arguments(Path(self.output_dir), self.training)
        if is_deepspeed_zero3_enabled():
            raise SettingsError("ZeRO-3 shards what this recipe saves and evaluates by itself: take FSDP2.")
        return arguments
