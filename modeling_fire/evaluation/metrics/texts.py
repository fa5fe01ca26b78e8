"""How close a text comes to those that are right, as SQuAD measures it (arXiv 1606.05250): for several metrics."""

import re
import string
from collections import Counter
from collections.abc import Callable
from statistics import mean


def normalized(text: str) -> str:
    """Lower case, no punctuation, no articles, single blanks."""
    text = "".join(character for character in text.lower() if character not in string.punctuation)
    return " ".join(re.sub(r"\b(a|an|the)\b", " ", text).split())


def f1(prediction: str, reference: str) -> float:
    """Of the words, counted as often as they occur in both; between 0 and 1."""
    given, right = normalized(prediction).split(), normalized(reference).split()
    common = (Counter(given) & Counter(right)).total()
    return 2 * common / (len(given) + len(right)) if common else 0.0


def exact_match(prediction: str, reference: str) -> float:
    """1 if they are the same when normalised, else 0."""
    return float(normalized(prediction) == normalized(reference))


def mean_of_best(score: Callable[[str, str], float], predictions: list[str], references: list[list[str]]) -> float:
    """Over the predictions, the mean of the best over the references; `score` takes a prediction and a reference."""
    pairs = zip(predictions, references, strict=True)
    return mean(max(score(prediction, each) for each in right) for prediction, right in pairs)
