"""The metrics of GLUE (arXiv 1804.07461, table 1), under the names that the public `glue` metric of `evaluate` has."""

from typing import Any

import datasets
import evaluate
from scipy.stats import pearsonr, spearmanr
from sklearn.metrics import accuracy_score, f1_score, matthews_corrcoef


ACCURACY = ("mnli", "mnli_matched", "mnli_mismatched", "qnli", "rte", "sst2", "wnli")
ACCURACY_AND_F1 = ("mrpc", "qqp")
CONFIGURATIONS = ("cola", "stsb", *ACCURACY, *ACCURACY_AND_F1)


class Glue(evaluate.Metric):
    """
    `evaluate.load(metric_path("glue"), configuration)`; a configuration is a task of GLUE.

    `compute` takes `predictions` and `references`: classes as the dataset numbers them, or for `stsb` numbers. It
    returns `accuracy`; with `f1` of class 1 for `mrpc` and `qqp`; `matthews_correlation` for `cola`; `pearson` and
    `spearmanr` for `stsb`. Where nothing is predicted to be of class 1, `f1` is 0; where all predictions are one
    class, so is `matthews_correlation`; where all are one number, `pearson` and `spearmanr` are not defined: NaN.

    Raises:
        ValueError: if there is no such configuration.
    """

    def _info(self) -> evaluate.MetricInfo:
        if self.config_name not in CONFIGURATIONS:
            raise ValueError(
                f"GLUE has no configuration {self.config_name!r}. Known are {', '.join(sorted(CONFIGURATIONS))}."
            )
        kind = datasets.Value("float32" if self.config_name == "stsb" else "int64")
        return evaluate.MetricInfo(
            description="The metrics of GLUE, by task.",
            citation="Wang et al., GLUE: A multi-task benchmark and analysis platform for natural language "
            "understanding. arXiv 1804.07461.",
            features=datasets.Features({"predictions": kind, "references": kind}),
            format="numpy",
        )

    def _compute(self, *, predictions: Any, references: Any, **kwargs: Any) -> dict[str, float]:
        if self.config_name == "cola":
            return {"matthews_correlation": float(matthews_corrcoef(references, predictions))}
        if self.config_name == "stsb":
            return {
                "pearson": float(pearsonr(predictions, references)[0]),
                "spearmanr": float(spearmanr(predictions, references)[0]),
            }
        figures = {"accuracy": float(accuracy_score(references, predictions))}
        if self.config_name in ACCURACY_AND_F1:
            figures["f1"] = float(f1_score(references, predictions, zero_division=0))
        return figures
