"""The metrics of SuperGLUE (arXiv 1905.00537), under the names that the public metric of `evaluate` has."""

from collections import defaultdict
from statistics import mean
from typing import Any

import datasets
import evaluate
from sklearn.metrics import accuracy_score, f1_score

from modeling_fire.evaluation.metrics.texts import exact_match, f1, mean_of_best


ACCURACY = ("boolq", "copa", "rte", "wic", "wsc")
CONFIGURATIONS = ("cb", "multirc", "record", *ACCURACY)


class SuperGlue(evaluate.Metric):
    """
    `evaluate.load(metric_path("super_glue"), configuration)`; a configuration is a task of SuperGLUE.

    `compute` takes `predictions` and `references`: classes as the dataset numbers them. It returns `accuracy`, and
    for `cb` also `f1`, the mean over the classes that were predicted or are right.

    For `multirc` each prediction is `{"idx": {"paragraph": 0, "question": 0, "answer": 0}, "prediction": 1}`, with
    the `idx` of the dataset. It returns `exact_match`, the share of the questions of which every answer is judged
    right; `f1_a`, F1 of class 1 over all answers; and `f1_m`, the mean over the questions of F1, itself the mean over
    the classes that occur there, as the public metric has it.

    For `record` each prediction is `{"idx": {"passage": 0, "query": 0}, "prediction_text": "Ann"}` and each reference
    `{"idx": {"passage": 0, "query": 0}, "answers": ["Ann", "Ann Lee"]}`, in any order. It returns `exact_match` and
    `f1` of the words, both between 0 and 1, the means over the queries of the best over the answers, of texts as
    [`~modeling_fire.evaluation.metrics.texts.normalized`] leaves them.

    Raises:
        ValueError: if there is no such configuration; for `record`, if the queries of the predictions and of the
            references are not the same, if one occurs twice, or if one has no answers.
    """

    def _info(self) -> evaluate.MetricInfo:
        if self.config_name not in CONFIGURATIONS:
            raise ValueError(
                f"SuperGLUE has no configuration {self.config_name!r}. Known are {', '.join(sorted(CONFIGURATIONS))}."
            )
        answer: Any = datasets.Value("int64")
        prediction = reference = answer
        if self.config_name == "multirc":
            prediction = {"idx": dict.fromkeys(("paragraph", "question", "answer"), answer), "prediction": answer}
        if self.config_name == "record":
            text, idx = datasets.Value("string"), dict.fromkeys(("passage", "query"), answer)
            prediction = {"idx": idx, "prediction_text": text}
            reference = {"idx": idx, "answers": datasets.Sequence(text)}
        return evaluate.MetricInfo(
            description="The metrics of SuperGLUE, by task.",
            citation="Wang et al., SuperGLUE: A stickier benchmark for general-purpose language understanding "
            "systems. arXiv 1905.00537.",
            features=datasets.Features({"predictions": prediction, "references": reference}),
        )

    def compute(self, *, predictions: Any = None, references: Any = None, **kwargs: Any) -> dict[str, float]:
        """As every metric of `evaluate`, which would not say what is missing where their numbers differ."""
        if self.config_name == "record" and predictions is not None and references is not None:
            matched(predictions, references)
        return super().compute(predictions=predictions, references=references, **kwargs)

    def _compute(self, *, predictions: Any, references: Any, **kwargs: Any) -> dict[str, float]:
        if self.config_name == "multirc":
            return judged_by_question(predictions, references)
        if self.config_name == "record":
            texts, answers = matched(predictions, references)
            return {"exact_match": mean_of_best(exact_match, texts, answers), "f1": mean_of_best(f1, texts, answers)}
        figures = {"accuracy": float(accuracy_score(references, predictions))}
        if self.config_name == "cb":
            figures["f1"] = float(f1_score(references, predictions, average="macro", zero_division=0))
        return figures


def judged_by_question(predictions: list[dict[str, Any]], references: list[int]) -> dict[str, float]:
    """The figures of MultiRC, see [`SuperGlue`]."""
    questions = defaultdict(list)
    for each, reference in zip(predictions, references, strict=True):
        questions[each["idx"]["paragraph"], each["idx"]["question"]].append((reference, each["prediction"]))
    answers = [answer for of_question in questions.values() for answer in of_question]
    f1_by_question = [
        float(f1_score(*zip(*of_question, strict=True), average="macro", zero_division=0))
        for of_question in questions.values()
    ]
    return {
        "exact_match": mean(float(all(right == given for right, given in each)) for each in questions.values()),
        "f1_m": mean(f1_by_question),
        "f1_a": float(f1_score(*zip(*answers, strict=True), zero_division=0)),
    }


def matched(predictions: list[dict[str, Any]], references: list[dict[str, Any]]) -> tuple[list[str], list[list[str]]]:
    """The texts of the predictions for ReCoRD, and the answers to the query of each; raises as [`SuperGlue`] says."""
    given, right = by_query(predictions, "prediction_text"), by_query(references, "answers")
    for query in sorted(given.keys() ^ right.keys()):
        raise ValueError(f"{named(query)} has no {'prediction' if query in right else 'reference'}.")
    for query in right:
        if not right[query]:
            raise ValueError(f"{named(query)} has no answers.")
    return list(given.values()), [right[query] for query in given]


def by_query(entries: list[dict[str, Any]], name: str) -> dict[tuple[int, int], Any]:
    """The field `name` of each entry, by the numbers of its passage and query."""
    fields: dict[tuple[int, int], Any] = {}
    for entry in entries:
        query = entry["idx"]["passage"], entry["idx"]["query"]
        if query in fields:
            raise ValueError(f"{named(query)} occurs twice.")
        fields[query] = entry[name]
    return fields


def named(query: tuple[int, int]) -> str:
    return "Passage {}, query {}".format(*query)
