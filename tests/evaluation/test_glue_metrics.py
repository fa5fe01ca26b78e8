"""The metrics of GLUE and SuperGLUE against figures worked out by hand, and where they are loaded from."""

import math
import os
import subprocess
import sys
from pathlib import Path

import evaluate
import pytest

from modeling_fire.evaluation.metrics import metric_path


REFERENCES = [0, 1, 0, 0]
MIXED, ONES, ZEROS = [0, 1, 1, 0], [1, 1, 1, 1], [0, 0, 0, 0]  # one false positive; all one class

OFFLINE = """
import socket, sys
def refuse(*args, **kwargs): raise AssertionError("a connection was tried")
socket.socket.connect = socket.getaddrinfo = refuse
import evaluate
from modeling_fire.evaluation.metrics import metric_path
for name, configuration in (("glue", "mrpc"), ("super_glue", "cb")):
    figures = evaluate.load(metric_path(name), configuration).compute(predictions=[0, 1], references=[0, 1])
    assert figures == {"accuracy": 1.0, "f1": 1.0}, figures
"""


def score(name: str, configuration: str, predictions: list, references: list) -> dict[str, float]:
    metric = evaluate.load(metric_path(name), configuration, keep_in_memory=True)
    return metric.compute(predictions=predictions, references=references)


@pytest.mark.parametrize(
    "name,configuration",
    [("glue", name) for name in ("mnli", "mnli_matched", "mnli_mismatched", "qnli", "rte", "sst2", "wnli")]
    + [("super_glue", name) for name in ("boolq", "copa", "rte", "wic", "wsc")],
)
def test_accuracy(name, configuration):
    assert score(name, configuration, MIXED, REFERENCES) == {"accuracy": 0.75}
    assert score(name, configuration, ONES, REFERENCES) == {"accuracy": 0.25}


@pytest.mark.parametrize("configuration", ["mrpc", "qqp"])
def test_accuracy_and_f1(configuration):
    # Of two that are called 1 one is, and it is the only one: precision 1/2, recall 1.
    assert score("glue", configuration, MIXED, REFERENCES) == pytest.approx({"accuracy": 0.75, "f1": 2 / 3})
    assert score("glue", configuration, ONES, REFERENCES) == pytest.approx({"accuracy": 0.25, "f1": 0.4})
    assert score("glue", configuration, ZEROS, REFERENCES) == {"accuracy": 0.75, "f1": 0.0}


def test_matthews_correlation():
    # (TP TN - FP FN) / sqrt((TP + FP)(TP + FN)(TN + FP)(TN + FN)) with TP, TN, FP, FN of 1, 2, 1, 0
    found = score("glue", "cola", MIXED, REFERENCES)
    assert found == pytest.approx({"matthews_correlation": 2 / math.sqrt(2 * 1 * 3 * 2)})
    assert score("glue", "cola", ONES, REFERENCES) == {"matthews_correlation": 0.0}


def test_correlations():
    # Deviations from the means: (-1.75, -0.75, 0.25, 2.25) and (-1.5, -0.5, 1.5, 0.5). Two ranks change places.
    found = score("glue", "stsb", [1.0, 2.0, 3.0, 5.0], [1.0, 2.0, 4.0, 3.0])
    assert found == pytest.approx({"pearson": 4.5 / math.sqrt(8.75 * 5), "spearmanr": 1 - 6 * 2 / (4 * 15)})


@pytest.mark.filterwarnings("ignore:An input array is constant")
def test_a_constant_correlates_with_nothing():
    found = score("glue", "stsb", [2.5, 2.5, 2.5], [1.0, 2.0, 4.0])
    assert found.keys() == {"pearson", "spearmanr"} and all(map(math.isnan, found.values()))


def test_cb_has_f1_as_the_mean_over_the_classes():
    found = score("super_glue", "cb", [0, 1, 1, 1], [0, 1, 2, 1])
    assert found == pytest.approx({"accuracy": 0.75, "f1": (1 + 0.8 + 0) / 3})
    found = score("super_glue", "cb", [1, 1, 1, 1], [0, 1, 2, 1])
    assert found == pytest.approx({"accuracy": 0.5, "f1": 2 / 3 / 3})


def test_multirc_goes_by_question():
    """Two questions with the number 0, in two paragraphs; the answers of the first do not stand together."""
    answers = [(0, 0, 0, 1), (1, 0, 0, 0), (0, 0, 1, 0)]  # paragraph, question, answer, reference

    def judged(*given: int) -> dict[str, float]:
        predictions = [
            {"idx": {"paragraph": paragraph, "question": question, "answer": answer}, "prediction": prediction}
            for (paragraph, question, answer, _), prediction in zip(answers, given, strict=True)
        ]
        return score("super_glue", "multirc", predictions, [reference for *_, reference in answers])

    assert judged(1, 0, 0) == {"exact_match": 1.0, "f1_m": 1.0, "f1_a": 1.0}
    # First question: F1 is 2/3 for class 1 and 0 for class 0.
    assert judged(1, 0, 1) == pytest.approx({"exact_match": 0.5, "f1_m": (1 / 3 + 1) / 2, "f1_a": 2 / 3})
    assert judged(0, 0, 0) == pytest.approx({"exact_match": 0.5, "f1_m": (1 / 3 + 1) / 2, "f1_a": 0.0})


def texts(**fields) -> list[dict]:
    """Entries of ReCoRD, of passage 4 and query 0, 1, ...: a field is given for each of them."""
    [(name, values)] = fields.items()
    return [{"idx": {"passage": 4, "query": query}, name: value} for query, value in enumerate(values)]


def test_record_takes_the_best_of_the_answers():
    """
    Of the second both words are right, of three in one answer and of four in the other; of the third one of two is,
    which the answer has twice. Articles, signs and capitals do not count.
    """
    predictions = texts(prediction_text=["the U.S. Senate!", "Ann Lee", "Lee Ray"])
    answers = [["Senate", "us senate"], ["Ann Mary Lee", "Ann Lee of Rome"], ["Lee Lee"]]
    expected = pytest.approx({"exact_match": 1 / 3, "f1": (1 + 4 / 5 + 2 / 4) / 3})
    assert score("super_glue", "record", predictions, texts(answers=answers)) == expected
    assert score("super_glue", "record", predictions[::-1], texts(answers=answers)) == expected
    apart = {"passage": 5, "query": 0}  # the same query of another passage
    predictions[1]["idx"] = (references := texts(answers=answers))[1]["idx"] = apart
    assert score("super_glue", "record", predictions, references) == expected
    nothing = score("super_glue", "record", texts(prediction_text=["", "a"]), texts(answers=[["Ann"], ["the"]]))
    assert nothing == {"exact_match": 0.5, "f1": 0.0}


def test_record_names_the_query_that_is_missing():
    three, right = texts(prediction_text=["Ann"] * 3), texts(answers=[["Ann"]] * 3)
    for predictions, references, message in (
        (three[:2], right, "Passage 4, query 2 has no prediction"),
        (three, right[1:], "Passage 4, query 0 has no reference"),
        (three[:2], right[1:], "Passage 4, query 0 has no reference"),
        ([three[0]] * 3, right, "Passage 4, query 0 occurs twice"),
        (three, texts(answers=[["Ann"], [], ["Ann"]]), "Passage 4, query 1 has no answers"),
    ):
        with pytest.raises(ValueError, match=message):
            score("super_glue", "record", predictions, references)


def test_loads_without_a_network(tmp_path):
    environment = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "HF_HOME": str(tmp_path)}
    environment |= {"PYTHONPATH": str(Path(__file__).parents[2]), "OMP_NUM_THREADS": "1"}
    child = [sys.executable, "-c", OFFLINE]
    loaded = subprocess.run(child, env={**os.environ, **environment}, capture_output=True, text=True)
    assert loaded.returncode == 0, loaded.stderr


def test_unknown_names_are_refused():
    with pytest.raises(ValueError, match=r"no metric 'blue'. Known are glue, .*super_glue"):
        metric_path("blue")
    with pytest.raises(ValueError, match=r"GLUE has no configuration 'ax'. Known are cola, mnli"):
        evaluate.load(metric_path("glue"), "ax")
    with pytest.raises(ValueError, match=r"SuperGLUE has no configuration 'axb'. Known are boolq, cb, copa, mul"):
        evaluate.load(metric_path("super_glue"), "axb")
