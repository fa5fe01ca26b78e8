"""The SCROLLS metric against figures worked out by hand; it loads from disk, and needs no Hub."""

import os
import subprocess
import sys
from pathlib import Path

import evaluate
import pytest

from modeling_fire.evaluation.metrics import metric_path


pytest.importorskip("rouge_score", reason="rouge-score is of the extra `tasks`")


def score(task: str, predictions: list[str], references: list[list[str]]) -> dict[str, float]:
    metric = evaluate.load(metric_path("scrolls"), task)
    return metric.compute(predictions=predictions, references=references)


@pytest.mark.parametrize("task", ["gov_report", "summ_screen_fd", "qmsum"])
def test_summaries(task):
    """
    Of 5 words given and 6 right, 4 are common (cats is not cat: nothing is stemmed); of 4 and 5 pairs 2 are (on the,
    the mat); the longest common subsequence has 4 words, over the end of a line.
    """
    figures = score(task, ["The cats on the mat."], [["the cat sat\non the mat"]])
    rouge1, rouge2, rouge_l = 100 * 8 / 11, 100 * 4 / 9, 100 * 8 / 11
    geometric_mean = (rouge1 * rouge2 * rouge_l) ** (1 / 3)
    assert figures == pytest.approx(
        {
            "rouge/rouge1": rouge1,
            "rouge/rouge2": rouge2,
            "rouge/rougeL": rouge_l,
            "rouge/geometric_mean": geometric_mean,
            "scrolls_score": geometric_mean,
        }
    )


def test_the_best_summary_is_that_of_each_figure():
    """One reference has more of the words, the other more of their order; then the mean over two predictions."""
    references = [["d c b a", "a b"], ["x y"]]
    figures = score("qmsum", ["a b c d", "z"], references)
    assert figures["rouge/rouge1"] == pytest.approx(100 * (1 + 0) / 2)
    assert figures["rouge/rouge2"] == pytest.approx(100 * (2 * 1 / (3 + 1)) / 2)
    assert figures["rouge/rougeL"] == pytest.approx(100 * (2 * 2 / (4 + 2)) / 2)


@pytest.mark.parametrize("task", ["qasper", "narrative_qa"])
def test_f1(task):
    """Two of three words given, two of four right; the article and the signs do not count, the second time nothing."""
    figures = score(task, ["The old, old Man!", "yes"], [["a", "old man of sea"], ["no", "No."]])
    assert figures == pytest.approx({"f1": 100 * (4 / 7) / 2, "scrolls_score": 100 * (4 / 7) / 2})


def test_words_count_as_often_as_they_occur():
    assert score("qasper", ["no no no"], [["no no"]])["f1"] == pytest.approx(100 * 4 / 5)


@pytest.mark.parametrize("task", ["quality", "contract_nli"])
def test_exact_match(task):
    predictions = ["  not  mentioned.", "Entailment", "Entailments"]
    figures = score(task, predictions, [["Not mentioned"], ["Contradiction", "the entailment"], ["Entailment"]])
    assert figures == pytest.approx({"exact_match": 200 / 3, "scrolls_score": 200 / 3})


@pytest.mark.parametrize("task", ["qmsum", "narrative_qa", "quality"])
def test_an_empty_prediction_scores_nothing(task):
    assert score(task, [""], [["something"]])["scrolls_score"] == 0.0


def test_wrong_input_is_refused():
    with pytest.raises(ValueError, match=r"no configuration 'narrativeqa'. Known are contract_nli, gov_report, narr"):
        score("narrativeqa", [], [])
    with pytest.raises(ValueError, match="Prediction 1 has no references"):
        score("qasper", ["a", "b"], [["a"], []])


def test_loads_from_disk_alone(tmp_path):
    program = "import sys, evaluate; m = evaluate.load(sys.argv[1], 'qasper'); "
    program += "print(m.compute(predictions=['a fox'], references=[['fox']])['f1'])"
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path)}
    command = [sys.executable, "-c", program, str(Path(metric_path("scrolls")).resolve())]
    run = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=tmp_path)
    assert run.stdout.strip() == "100.0", run.stderr
