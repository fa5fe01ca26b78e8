"""The YAML of a classification run."""

from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from classify_tasks import TASKS
from training_arguments import training_arguments
from transformers import TrainingArguments


@dataclass
class Data:
    """
    What is trained and measured on: files (jsonl, json, csv, parquet), or datasets of the Hub as
    `name:configuration:split`. `validation` may map names to several, each of which is measured.
    """

    train: str | list
    validation: str | list | dict | None = None
    held_out: float | None = None  # instead of `validation`: share of the rows of `train`, at their end

    def __post_init__(self):
        if (self.validation is None) == (self.held_out is None):
            raise ValueError("Set one of `data.validation` and `data.held_out`.")
        if self.held_out is not None and not 0 < self.held_out < 1:
            raise ValueError(f"`data.held_out` is a share of the rows, between 0 and 1, got {self.held_out}.")


@dataclass
class Classify:
    """The YAML. `training` holds transformers' TrainingArguments."""

    output_dir: str
    task: str  # a name in TASKS
    model: str  # folder or Hub id, of FIRE or another model
    data: Data
    length: int  # tokens that the model reads at the most
    training: dict
    seeds: list[int] = field(default_factory=lambda: [0])  # of the new head, the order of the rows, and dropout
    random_start: bool = False  # only shape and tokenizer of the model, for comparison
    bias_lr_multiplier: float = 1.0  # learning rate of the position bias, as a multiple of the others'

    def __post_init__(self):
        if self.task not in TASKS:
            raise ValueError(f"There is no task {self.task!r}. Known are {', '.join(TASKS)}.")
        for name in ("output_dir", "seed"):
            if name in self.training:
                raise ValueError(f"Leave out `training.{name}`: it follows from `output_dir` and `seeds`.")
        if not self.seeds or len(set(self.seeds)) < len(self.seeds):
            raise ValueError(f"`seeds` is a list of different numbers, got {self.seeds}.")

    @property
    def settings(self) -> dict[str, Any]:
        """All that the result of a seed depends on."""
        return {name: value for name, value in asdict(self).items() if name not in ("output_dir", "seeds")}

    def folder(self, seed: int) -> Path:
        return Path(self.output_dir) / f"seed{seed}"

    def arguments(self, seed: int) -> TrainingArguments:
        """Raises [`SettingsError`] for what is wrong with `training`."""
        return training_arguments(self.folder(seed), {**self.training, "seed": seed})
