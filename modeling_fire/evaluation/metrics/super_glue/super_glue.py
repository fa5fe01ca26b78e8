"""The metrics of SuperGLUE (arXiv 1905.00537), under the names that the public metric of `evaluate` has."""

from collections import defaultdict
from statistics import mean
from typing import Any

import datasets
import evaluate
from sklearn.metrics import accuracy_score, f1_score


ACCURACY = ("boolq", "copa", "rte", "wic", "wsc")
CONFIGURATIONS = ("cb", "multirc", *ACCURACY)


class SuperGlue(evaluate.Metric):
    """
    `evaluate.load(metric_path("super_glue"), configuration)`; a configuration is a task of SuperGLUE, except for
    `record`, whose answers are texts.

    `compute` takes `predictions` and `references`: classes as the dataset numbers them. It returns `accuracy`, and
    for `cb` also `f1`, the mean over the classes that were predicted or are right.

    For `multirc` each prediction is `{"idx": {"paragraph": 0, "question": 0, "answer": 0}, "prediction": 1}`, with
    the `idx` of the dataset. It returns `exact_match`, the share of the questions of which every answer is judged
    right; `f1_a`, F1 of class 1 over all answers; and `f1_m`, the mean over the questions of F1, itself the mean over
    the classes that occur there, as the public metric has it.

    Raises:
        ValueError: if there is no such configuration.
    """

    def _info(self) -> evaluate.MetricInfo:
        if self.config_name not in CONFIGURATIONS:
            raise ValueError(
                f"SuperGLUE has no configuration {self.config_name!r}. Known are {', '.join(sorted(CONFIGURATIONS))}."
            )
        answer: Any = datasets.Value("int64")
        prediction = answer
        if self.config_name == "multirc":
            prediction = {"idx": dict.fromkeys(("paragraph", "question", "answer"), answer), "prediction": answer}
        return evaluate.MetricInfo(
            description="The metrics of SuperGLUE, by task.",
            citation="Wang et al., SuperGLUE: A stickier benchmark for general-purpose language understanding "
            "systems. arXiv 1905.00537.",
            features=datasets.Features({"predictions": prediction, "references": answer}),
        )

    def _compute(self, *, predictions: Any, references: Any, **kwargs: Any) -> dict[str, float]:
        if self.config_name == "multirc":
            return judged_by_question(predictions, references)
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
