"""The YAML of a classification run, and all that is known of the run before any work is done."""

import dataclasses
from collections import Counter
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from classify_tasks import TASKS, Row, Task
from datasets import Dataset
from settings import SettingsError
from sources import READING_ERRORS, open_rows
from transformers import AutoConfig, AutoTokenizer, PreTrainedConfig, PreTrainedTokenizerBase, TrainingArguments

from modeling_fire.evaluation.loading import LOADING_ERRORS


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
        unknown = set(self.training) - {each.name for each in dataclasses.fields(TrainingArguments)}
        if unknown:
            raise ValueError(f"TrainingArguments has no fields {', '.join(sorted(unknown))} (in `training`).")
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
        given = {
            "use_cpu": not torch.accelerator.is_available(),  # else processes without GPUs would not find each other
            "report_to": "none",
            "save_strategy": "no",
            **self.training,
        }
        return TrainingArguments(output_dir=str(self.folder(seed) / "checkpoints"), seed=seed, **given)


@dataclass
class Examples:
    """
    Args:
        rows (`list[dict]`): as they were read.
        labels (`list`): numbers of classes; numbers, where the task has no classes.
        dataset (`Dataset`): what the model takes.
        cut (`float`): share of the rows that lost tokens to `length`.
    """

    rows: list[Row]
    labels: list[int | float]
    dataset: Dataset
    cut: float

    @classmethod
    def of(
        cls, rows: list[Row], source: Any, task: Task, tokenizer: PreTrainedTokenizerBase, length: int
    ) -> "Examples":
        """Raises `ValueError` for the first row that does not fit the task."""
        if not rows:
            raise ValueError(f"{source} has no rows.")
        labels = []
        for number, row in enumerate(rows, start=1):
            missing = [name for name in (*task.columns, "label") if row.get(name) is None]
            if missing:
                raise ValueError(
                    f"{source}: row {number} has no {', '.join(missing)}, but {', '.join(row)}; the task needs "
                    f"{', '.join(task.columns)} and label."
                )
            try:
                labels.append(task.label_of(row["label"]))
            except ValueError as error:
                raise ValueError(f"{source}: row {number} {error}.") from error
        features, num_cut = encode([task.texts_of(row) for row in rows], task.cut, tokenizer, length)
        return cls(rows, labels, Dataset.from_dict({**features, "labels": labels}), num_cut / len(rows))

    def counts(self, task: Task) -> dict[str, int]:
        """Rows by the name of their class; empty where the task has no classes."""
        counted = Counter(self.labels)
        return {name: counted[number] for number, name in enumerate(task.labels)}


def encode(
    texts: list[tuple[str, ...]], cut: str, tokenizer: PreTrainedTokenizerBase, length: int
) -> tuple[dict[str, list[list[int]]], int]:
    """
    What the model takes of the texts, and how many of them were cut to `length` tokens. A second text begins a new
    line, because not all tokenizers mark where it begins.

    Raises:
        ValueError: if the text that is not to be cut fills `length` alone.
    """
    firsts = [first for first, *_ in texts]
    seconds = [f"\n{second}" for _, *rest in texts for second in rest] or None
    features = dict(tokenizer(firsts, seconds, verbose=False))
    too_long = [index for index, ids in enumerate(features["input_ids"]) if len(ids) > length]
    for index in too_long:
        first, second = firsts[index], None if seconds is None else seconds[index]
        if cut == "only_first" and len(tokenizer("", second).input_ids) >= length:
            raise ValueError(f"`length` ({length}) has no room beside this text, which is never cut:{second}")
        shorter = tokenizer(first, second, truncation=cut, max_length=length)
        for name, values in features.items():
            values[index] = shorter[name]
    return features, len(too_long)


def read_rows(source: str | list[str]) -> list[Row]:
    """
    Args:
        source (`str` or `list[str]`): see [`~sources.open_rows`]; those of a list one after the other.

    Raises:
        SettingsError: if one is not there or cannot be read.
    """
    rows: list[Row] = []
    for each in [source] if isinstance(source, str) else source:
        try:
            rows += open_rows(each)[0]
        except READING_ERRORS as error:
            raise SettingsError(f"{each} cannot be read: {error}") from error
    # SuperGLUE's own files of WSC have a block that the Hub has not.
    return [{**row, **row["target"]} if isinstance(row.get("target"), dict) else row for row in rows]


@dataclass
class Plan:
    """What a run is made of, before any work is done."""

    task: Task
    config: PreTrainedConfig
    tokenizer: PreTrainedTokenizerBase
    train: Examples
    validation: dict[str, Examples]

    @classmethod
    def of(cls, run: Classify) -> "Plan":
        """Raises [`SettingsError`] for what is wrong with the settings, the model or the data."""
        try:
            task, data = TASKS[run.task], run.data
            run.arguments(run.seeds[0])
            config, tokenizer = open_model(run.model, task)
            sources = data.validation if isinstance(data.validation, dict) else {"validation": data.validation}
            rows = read_rows(data.train)
            if data.held_out is None:
                validation = {name: read_rows(source) for name, source in sources.items()}
            else:
                first = len(rows) - max(1, round(len(rows) * data.held_out))
                sources, validation = {"validation": data.train}, {"validation": rows[first:]}
                rows = rows[:first]
            train = Examples.of(rows, data.train, task, tokenizer, run.length)
            measured = {
                name: Examples.of(each, sources[name], task, tokenizer, run.length)
                for name, each in validation.items()
            }
            for each in measured.values():  # that the metric loads, and takes these rows
                task.score(each.labels, each.labels, each.rows)
            return cls(task, config, tokenizer, train, measured)
        except ImportError as error:
            raise SettingsError(
                "The metrics need scikit-learn and scipy: `pip install modeling-fire[tasks]`."
            ) from error
        except (TypeError, ValueError) as error:
            raise SettingsError(str(error)) from error


def open_model(source: str, task: Task) -> tuple[PreTrainedConfig, PreTrainedTokenizerBase]:
    """
    The config of the classifier, and its tokenizer, which has a token to pad with in any case.

    Raises:
        ValueError: if they cannot be loaded, do not fit each other, or if it classifies into other classes.
    """
    try:
        config: Any = AutoConfig.from_pretrained(source)
        tokenizer = AutoTokenizer.from_pretrained(source)
    except LOADING_ERRORS as error:
        raise ValueError(f"`model`: {source} cannot be loaded: {error}") from error
    num_labels = max(1, len(task.labels))
    trained_head = any(name.endswith("ForSequenceClassification") for name in config.architectures or ())
    if trained_head and config.num_labels != num_labels:
        raise ValueError(
            f"{source} has a head for {config.num_labels} labels, and {task.configuration} has {num_labels}: take the "
            "model that this one was made of."
        )
    if len(tokenizer) > config.vocab_size:
        raise ValueError(f"The tokenizer of {source} has {len(tokenizer)} tokens, the model {config.vocab_size}.")
    if tokenizer.pad_token is None:
        # One of its own: the head reads the last token that is not this one.
        tokenizer.add_special_tokens({"pad_token": "<pad>"})
    names = task.labels or ("score",)
    config.id2label, config.label2id = dict(enumerate(names)), {name: i for i, name in enumerate(names)}
    config.problem_type = "single_label_classification" if task.labels else "regression"
    return config, tokenizer
