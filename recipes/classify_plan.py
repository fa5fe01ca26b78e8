"""What a classification run is made of: all that is known of it before any work is done."""

from collections import Counter
from dataclasses import dataclass
from typing import Any

from classify_kinds import Row, Task
from classify_settings import Classify
from classify_tasks import TASKS
from datasets import Dataset
from pretrained import open_pretrained
from settings import SettingsError
from sources import open_rows
from transformers import PreTrainedConfig, PreTrainedTokenizerBase

from modeling_fire.text import READING_ERRORS


@dataclass
class Examples:
    """
    Args:
        rows (`list[dict]`): as they were read.
        labels (`list`):
            For each example, of which a row has one or more: the number of its class, or a number, where the task has
            no classes.
        dataset (`Dataset`): what the model takes of the examples.
        cut (`float`): share of the examples that lost tokens to `length`.
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
        examples = []
        for number, row in enumerate(rows, start=1):
            there = [name for name, value in row.items() if value not in (None, [])]
            missing = [name for name in task.needed if name not in there]
            if missing:
                raise ValueError(
                    f"{source}: row {number} has no {', '.join(missing)}, but {', '.join(there)}; the task needs "
                    f"{', '.join(task.needed[:-1])} and {task.needed[-1]}."
                )
            try:
                examples += task.examples_of(row)
            except ValueError as error:
                raise ValueError(f"{source}: row {number} {error}.") from error
        texts, labels = map(list, zip(*examples, strict=True))
        features, num_cut = encode(texts, task.cut, tokenizer, length)
        return cls(rows, labels, Dataset.from_dict({**features, "labels": labels}), num_cut / len(labels))

    def counts(self, task: Task) -> dict[str, int]:
        """Examples by the name of their class; empty where the task has no classes."""
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
            rows += [row for read in open_rows(each)[0] for row in as_on_the_hub(read)]
        except READING_ERRORS as error:
            raise SettingsError(f"{each} cannot be read: {error}") from error
    return rows


def as_on_the_hub(row: Row) -> list[Row]:
    """
    What the Hub has for a row of SuperGLUE's own files: they have a block of WSC's spans, and ReCoRD's queries
    together with their passage, the entities of which are given by their first and last characters.
    """
    if isinstance(row.get("target"), dict):
        return [{**row, **row["target"]}]
    if not isinstance(row.get("qas"), list):
        return [row]
    try:
        text = row["passage"]["text"]
        entities = [text[span["start"] : span["end"] + 1] for span in row["passage"]["entities"]]
        return [
            {
                "passage": text,
                "query": query["query"],
                "entities": entities,
                "answers": [answer["text"] for answer in query.get("answers") or []],  # test sets have none
            }
            for query in row["qas"]
        ]
    except (KeyError, TypeError) as error:
        raise ValueError(f"a row with `qas` is not as in SuperGLUE's files of ReCoRD ({error!r})") from error


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
                task.score(task.right(each.rows), each.rows)
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
    config, tokenizer = open_pretrained(source, "model")
    num_labels = max(1, len(task.labels))
    trained_head = any(name.endswith("ForSequenceClassification") for name in config.architectures or ())
    if trained_head and config.num_labels != num_labels:
        raise ValueError(
            f"{source} has a head for {config.num_labels} labels, and {task.configuration} has {num_labels}: take the "
            "model that this one was made of."
        )
    if tokenizer.pad_token is None:
        # One of its own: the head reads the last token that is not this one.
        tokenizer.add_special_tokens({"pad_token": "<pad>"})
    names = task.labels or ("score",)
    config.id2label, config.label2id = dict(enumerate(names)), {name: i for i, name in enumerate(names)}
    config.problem_type = "single_label_classification" if task.labels else "regression"
    return config, tokenizer
