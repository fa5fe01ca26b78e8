"""The metrics of SCROLLS (arXiv 2201.03533, section 4), under the names that the official evaluator gives them."""

import math
from typing import Any

import datasets
import evaluate
from rouge_score.rouge_scorer import RougeScorer

from modeling_fire.evaluation.metrics.texts import exact_match, f1, mean_of_best


# What each of them is judged by.
ROUGE = ("gov_report", "qmsum", "summ_screen_fd")
F1 = ("narrative_qa", "qasper")
EXACT_MATCH = ("contract_nli", "quality")
ROUGES = ("rouge1", "rouge2", "rougeL")


class Scrolls(evaluate.Metric):
    """
    `evaluate.load(metric_path("scrolls"), configuration)`; a configuration is a task of SCROLLS.

    `compute` takes `predictions`, texts, and `references`, for each a list of the texts that are right. Every figure
    lies between 0 and 100 and is the mean over the predictions of the best over the references. It returns

    - for summaries `rouge/rouge1`, `rouge/rouge2`, `rouge/rougeL` and their `rouge/geometric_mean`: F-measures without
      stemming, the longest common subsequence over the whole text (`rougeL`, not `rougeLsum`), each the best over the
      references by itself;
    - for `qasper` and `narrative_qa` `f1` of the words, for `quality` and `contract_nli` `exact_match`, both of texts
      as [`~modeling_fire.evaluation.metrics.texts.normalized`] leaves them. Where nothing is left of a prediction,
      `f1` is 0;

    and the one of them that the benchmark counts as `scrolls_score`.

    Raises:
        ValueError: if there is no such configuration, or a prediction has no references.
    """

    def _info(self) -> evaluate.MetricInfo:
        known = sorted((*ROUGE, *F1, *EXACT_MATCH))
        if self.config_name not in known:
            raise ValueError(f"SCROLLS has no configuration {self.config_name!r}. Known are {', '.join(known)}.")
        text = datasets.Value("string")
        return evaluate.MetricInfo(
            description="The metrics of SCROLLS, by task.",
            citation="Shaham et al., SCROLLS: Standardized CompaRison Over Long Language Sequences. arXiv 2201.03533.",
            features=datasets.Features({"predictions": text, "references": datasets.Sequence(text)}),
        )

    def _compute(self, *, predictions: list[str], references: list[list[str]], **kwargs: Any) -> dict[str, float]:
        if not all(references):
            raise ValueError(f"Prediction {references.index([])} has no references.")
        if self.config_name in ROUGE:
            figures = rouge(predictions, references)
            return {**figures, "scrolls_score": figures["rouge/geometric_mean"]}
        name, score = ("f1", f1) if self.config_name in F1 else ("exact_match", exact_match)
        figure = 100 * mean_of_best(score, predictions, references)
        return {name: figure, "scrolls_score": figure}


def rouge(predictions: list[str], references: list[list[str]]) -> dict[str, float]:
    """In percent; the geometric mean is that of the three means."""
    figures = {}
    for name in ROUGES:
        scorer = RougeScorer([name], use_stemmer=False)

        def score(prediction: str, reference: str, scorer=scorer, name=name) -> float:
            return scorer.score(reference, prediction)[name].fmeasure

        figures[f"rouge/{name}"] = 100 * mean_of_best(score, predictions, references)
    return {**figures, "rouge/geometric_mean": math.prod(figures.values()) ** (1 / 3)}
