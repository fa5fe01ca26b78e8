"""The tasks of GLUE and SuperGLUE: what a model reads of a row, what its classes are called, and how it is scored."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import evaluate

from modeling_fire.evaluation.metrics import metric_path


Row = dict[str, Any]


@dataclass(frozen=True)
class Task:
    """
    One task.

    Args:
        metric (`str`): `glue` or `super_glue`, see [`~modeling_fire.evaluation.metrics.metric_path`].
        configuration (`str`): of the metric.
        columns (`tuple[str, ...]`): what rows must have beside `label`, named as on the Hub.
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

    def score(
        self, predictions: Sequence[int | float], references: Sequence[int | float], rows: list[Row]
    ) -> dict[str, float]:
        """The figures of the metric; `rows` are those that were predicted."""
        metric = evaluate.load(metric_path(self.metric), self.configuration, keep_in_memory=True)
        given: list[Any] = list(predictions)
        if self.configuration == "multirc":
            given = [{"idx": row["idx"], "prediction": each} for row, each in zip(rows, given, strict=True)]
        return metric.compute(predictions=given, references=list(references))


def wic_texts(row: Row) -> tuple[str, ...]:
    """The word in question, before the first sentence."""
    return f"{row['word']}: {row['sentence1']}", row["sentence2"]


def copa_texts(row: Row) -> tuple[str, ...]:
    """Both choices in one text, as classes 0 and 1."""
    return row["premise"], f"{row['question']}? 1. {row['choice1']} 2. {row['choice2']}"


def multirc_texts(row: Row) -> tuple[str, ...]:
    return row["paragraph"], f"{row['question']} {row['answer']}"


def wsc_texts(row: Row) -> tuple[str, ...]:
    """The text with the pronoun between stars; then what it may stand for."""
    words = row["text"].split()
    words[row["span2_index"]] = f"*{words[row['span2_index']]}*"
    return " ".join(words), f"{row['span2_text']}: {row['span1_text']}"


TRUTH = ("False", "True")
ENTAILMENT = ("entailment", "not_entailment")
SENTENCES = ("sentence1", "sentence2")
INFERENCE = ("premise", "hypothesis")

TASKS = {
    "cola": Task("glue", "cola", ("sentence",), ("unacceptable", "acceptable")),
    "sst2": Task("glue", "sst2", ("sentence",), ("negative", "positive")),
    "mrpc": Task("glue", "mrpc", SENTENCES, ("not_equivalent", "equivalent")),
    "qqp": Task("glue", "qqp", ("question1", "question2"), ("not_duplicate", "duplicate")),
    "stsb": Task("glue", "stsb", SENTENCES, ()),
    "mnli": Task("glue", "mnli", INFERENCE, ("entailment", "neutral", "contradiction"), "only_first"),
    "qnli": Task("glue", "qnli", ("sentence", "question"), ENTAILMENT, "only_first"),
    # The examples of SuperGLUE's RTE, under other names.
    "glue_rte": Task("glue", "rte", SENTENCES, ENTAILMENT, "only_first"),
    "wnli": Task("glue", "wnli", SENTENCES, ("not_entailment", "entailment"), "only_first"),
    "boolq": Task("super_glue", "boolq", ("passage", "question"), TRUTH, "only_first"),
    "cb": Task("super_glue", "cb", INFERENCE, ("entailment", "contradiction", "neutral"), "only_first"),
    "copa": Task(
        "super_glue",
        "copa",
        ("premise", "question", "choice1", "choice2"),
        ("choice1", "choice2"),
        "only_first",
        copa_texts,
    ),
    "multirc": Task(
        "super_glue", "multirc", ("paragraph", "question", "answer", "idx"), TRUTH, "only_first", multirc_texts
    ),
    "rte": Task("super_glue", "rte", INFERENCE, ENTAILMENT, "only_first"),
    "wic": Task("super_glue", "wic", ("word", *SENTENCES), TRUTH, texts=wic_texts),
    "wsc": Task(
        "super_glue", "wsc", ("text", "span1_text", "span2_text", "span2_index"), TRUTH, "only_first", wsc_texts
    ),
}
