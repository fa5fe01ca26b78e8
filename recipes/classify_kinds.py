"""What a task of classification is: the texts of a row, its classes, and the score of answers."""

import re
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar

import evaluate
import numpy as np

from modeling_fire.evaluation.metrics import metric_path


Row = dict[str, Any]


@dataclass(frozen=True)
class Task:
    """
    A task. A row is one example, and its answer the number of a class, or a number if there are none.

    Args:
        metric (`str`): `glue` or `super_glue`, see [`~modeling_fire.evaluation.metrics.metric_path`].
        configuration (`str`): of the metric.
        columns (`tuple[str, ...]`): what is read of a row, named as on the Hub.
        labels (`tuple[str, ...]`): the classes, in the order of the Hub's numbers; none if a label is itself a number.
        cut (`str`, *optional*, defaults to `"longest_first"`):
            Which text loses its end if the two are too long together: `"only_first"`, or the longer one, token by
            token.
        texts (`Callable`, *optional*): makes the texts of a row, one or two; by default they are the columns.
    """

    metric: str
    configuration: str
    columns: tuple[str, ...]
    labels: tuple[str, ...]
    cut: str = "longest_first"
    texts: Callable[[Row], tuple[str, ...]] | None = None

    baseline: ClassVar[str] = "majority class"  # what `majority` answers with

    @property
    def needed(self) -> tuple[str, ...]:
        """The columns that rows must have."""
        return *self.columns, "label"

    def examples_of(self, row: Row) -> list[tuple[tuple[str, ...], int | float]]:
        """
        What a row asks of the model: the texts of each example, and the number of its class.

        Raises:
            ValueError: if the row does not fit the task.
        """
        return [(self.texts_of(row), self.label_of(row["label"]))]

    def texts_of(self, row: Row) -> tuple[str, ...]:
        """What the model reads: one text or two."""
        return tuple(row[name] for name in self.columns) if self.texts is None else self.texts(row)

    def label_of(self, value: Any) -> int | float:
        """
        The number of a class: files have names or truth values, the Hub has numbers. Or the number that the label is.

        Raises:
            ValueError: if it is no label of this task.
        """
        if not self.labels and type(value) in (int, float):
            return float(value)
        if str(value) in self.labels:
            return self.labels.index(str(value))
        if type(value) is int and 0 <= value < len(self.labels):
            return value
        known = ", ".join(self.labels) or "numbers"
        raise ValueError(f"has the label {value!r}; known are {known} (test sets of the benchmarks have none)")

    def right(self, rows: list[Row]) -> list[Any]:
        """A right answer to each row."""
        return [self.label_of(row["label"]) for row in rows]

    def majority(self, rows: list[Row]) -> list[Any]:
        """The most frequent of the right answers, for each row."""
        [(answer, _)] = Counter(self.right(rows)).most_common(1)
        return [answer] * len(rows)

    def answers(self, outputs: np.ndarray, rows: list[Row]) -> list[Any]:
        """
        Args:
            outputs (`np.ndarray` of shape `(examples, classes)`): of the model, for the examples of all `rows`.
            rows (`list[dict]`): what was asked.

        Returns:
            `list`: an answer to each row.
        """
        return outputs.argmax(-1).tolist() if self.labels else outputs[:, 0].tolist()

    def compared(self, answers: list[Any], rows: list[Row]) -> tuple[list[Any], list[Any]]:
        """The predictions and references that the metric takes."""
        if self.configuration == "multirc":
            answers = [{"idx": row["idx"], "prediction": each} for row, each in zip(rows, answers, strict=True)]
        return answers, self.right(rows)

    def score(self, answers: list[Any], rows: list[Row]) -> dict[str, float]:
        """The figures of the metric, for an answer to each row."""
        metric = evaluate.load(metric_path(self.metric), self.configuration, keep_in_memory=True)
        predictions, references = self.compared(answers, rows)
        return metric.compute(predictions=predictions, references=references)


class ChoiceOfEntity(Task):
    """
    A task of which a row is a query about a passage, with an example for each different entity of the passage: does
    it fill the gap of the query? The answer is the text of the likeliest one, as in the baselines of SuperGLUE (arXiv
    1905.00537).
    """

    baseline = "most frequent entity"
    gap: ClassVar[str] = "@placeholder"

    @property
    def needed(self) -> tuple[str, ...]:
        return self.columns

    @staticmethod
    def entities(row: Row) -> list[str]:
        """Each once: SuperGLUE's own files have every mention."""
        return list(dict.fromkeys(row["entities"]))

    def examples_of(self, row: Row) -> list[tuple[tuple[str, ...], int | float]]:
        for name in ("entities", "answers"):
            if not isinstance(row[name], list) or not all(isinstance(each, str) for each in row[name]):
                raise ValueError(f"has {name} that are no list of texts, but {row[name]!r}")
        if not isinstance(row["query"], str) or self.gap not in row["query"]:
            raise ValueError(f"has a query without {self.gap}: {row['query']!r}")
        return [
            ((row["passage"], row["query"].replace(self.gap, entity)), int(entity in row["answers"]))
            for entity in self.entities(row)
        ]

    def right(self, rows: list[Row]) -> list[Any]:
        return [row["answers"][0] for row in rows]

    def majority(self, rows: list[Row]) -> list[Any]:
        """For each row the entity that its passage mentions most often; of several such, the first."""

        def mentions(row: Row, entity: str) -> int:
            return len(re.findall(rf"(?<!\w){re.escape(entity)}(?!\w)", row["passage"]))

        return [max(self.entities(row), key=partial(mentions, row)) for row in rows]

    def answers(self, outputs: np.ndarray, rows: list[Row]) -> list[Any]:
        """For each row the entity whose logit of True is the furthest above that of False."""
        margins = iter((outputs[:, 1] - outputs[:, 0]).tolist())
        return [max(self.entities(row), key=lambda entity: next(margins)) for row in rows]

    def compared(self, answers: list[Any], rows: list[Row]) -> tuple[list[Any], list[Any]]:
        # Not by the numbers that the rows have: those of several files may be the same.
        queries = [{"passage": 0, "query": number} for number in range(len(rows))]
        predictions = [{"idx": idx, "prediction_text": each} for idx, each in zip(queries, answers, strict=True)]
        return predictions, [{"idx": idx, "answers": row["answers"]} for idx, row in zip(queries, rows, strict=True)]
