"""Texts and figures: what was trained and measured on, and how the Hub is told of it."""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from statistics import mean
from typing import Any

from huggingface_hub import EvalResult
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id

from ..text import FORMATS


STDLIB, STDLIB_NAME = "stdlib", "Python's standard library"
# The Hub's names of metrics, where the recipes have others (https://huggingface.co/metrics).
METRICS = {"pearson": "pearsonr", "spearmanr": "spearmanr", "f1_a": "f1", "f1_m": "f1"}


@dataclass(frozen=True)
class Text:
    """
    What was trained or measured on.

    Args:
        name (`str`): Hub id of a dataset, or name of a file without its path.
        on_hub (`bool`): which of them.
        loader (`str`): what `datasets.load_dataset` is to be told: the id, or the kind of the file.
        configuration (`str`, *optional*): of the dataset.
        split (`str`, *optional*): likewise.
    """

    name: str
    on_hub: bool
    loader: str
    configuration: str | None = None
    split: str | None = None

    @classmethod
    def of(cls, source: str) -> "Text":
        """
        Of a dataset of the Hub, as `name:configuration:split`, of a file, or of `stdlib`. A name without either `/` or
        `:` counts as a file's, and so does the path of whatever is there.
        """
        path = Path(source)
        name, configuration, split = (*source.split(":"), "", "")[:3]
        ending = next((end for end in path.suffixes if end in (".txt", *FORMATS)), "")
        if name == STDLIB:
            return cls(STDLIB_NAME, False, "text", split=split or None)
        if not ending and ("/" in source or ":" in source) and not path.exists() and is_hub_id(name):
            return cls(name, True, name, configuration or None, split or None)
        return cls(path.name, False, FORMATS.get(ending, "text"))

    def __str__(self) -> str:
        if not self.on_hub:
            return self.name if self.name == STDLIB_NAME else f"`{self.name}`"
        parts = ", ".join(part for part in (self.configuration, self.split) if part)
        return f"[{self.name}](https://huggingface.co/datasets/{self.name})" + (f" ({parts})" if parts else "")


@dataclass(frozen=True)
class Perplexities:
    """
    Losses of the same tokens by context.

    Args:
        texts (`list[Text]`): that they are of.
        settings (`dict`): `num_windows` and `num_targets`.
        losses (`dict`): by model and context; the mean, or that of each window, in nats per token.
        own (`str`): the model that the card is of.
        held_out (`bool`): whether the run kept these tokens from its training.
    """

    texts: list[Text]
    settings: dict[str, Any]
    losses: dict[str, dict[str, Any]]
    own: str
    held_out: bool = False

    def means(self) -> dict[str, dict[int, float]]:
        """By model and context."""
        return {
            name: {
                int(context): mean(loss) if isinstance(loss, list) else loss for context, loss in by_context.items()
            }
            for name, by_context in self.losses.items()
        }


def texts(sources: Any) -> list[Text]:
    """Of a source, see [`Text.of`], or of lists and dicts of them."""
    if isinstance(sources, dict):
        return texts(list(sources.values()))
    if isinstance(sources, list):
        return [text for source in sources for text in texts(source)]
    return [Text.of(sources)] if sources else []


def is_hub_id(name: str) -> bool:
    try:
        validate_repo_id(name)
    except HFValidationError:
        return False
    return True


@dataclass(frozen=True)
class Score:
    """
    One figure of a task.

    Args:
        on (`str`): what it was measured on.
        metric (`str`): its name.
        value (`float`): the figure.
        majority (`float`, *optional*): what the best constant answer reaches.
        context (`int`, *optional*): tokens that the model was given at the most.
    """

    on: str
    metric: str
    value: float
    majority: float | None = None
    context: int | None = None


def task_scores(results: dict[str, Any]) -> list[Score]:
    """Of the recipes `finetune` and `classify`."""
    task = results.get("settings", {}).get("task")
    scores = [
        Score(task, metric, value, context=int(length))
        for length, figures in results.get("scores", {}).items()
        for metric, value in figures.items()
    ]
    for name, measured in results.get("measured", {}).items():
        majority = measured.get("majority", {})
        on = f"{task}, {name}"
        scores += [Score(on, metric, value, majority.get(metric)) for metric, value in measured["metrics"].items()]
    return scores


def passkeys(figures: dict[str, Any]) -> dict[int, float]:
    """The share that was found, by length."""
    found = figures.get("passkey", {})
    return {int(length): mean(by_depth.values()) for length, by_depth in found.items()}


def eval_results(
    perplexities: list[Perplexities], scores: list[Score], held_out: list[Text], head: str
) -> Iterator[EvalResult]:
    """
    The figures of the model, in the form of the Hub's `model-index`
    (https://github.com/huggingface/hub-docs/blob/main/modelcard.md).

    Args:
        perplexities (`list[Perplexities]`): of which only the model's own are told.
        scores (`list[Score]`): of tasks.
        held_out (`list[Text]`): that the scores are of.
        head (`str`): the task of the model.
    """
    for measured in [each for each in perplexities if each.texts]:
        for context, loss in measured.means()[measured.own].items():
            yield EvalResult(
                task_type=head,
                metric_type="perplexity",
                metric_name=f"Perplexity at {context} tokens",
                metric_value=math.exp(loss),
                metric_args={"context": context},
                **dataset(measured.texts),
            )
    for score in scores if held_out else []:
        name = f"{score.on}: {score.metric}" + ("" if score.context is None else f" at {score.context} tokens")
        metric = score.metric.partition("/")[0]
        yield EvalResult(
            task_type=head,
            metric_type=METRICS.get(metric, metric),
            metric_name=name,
            metric_value=score.value,
            metric_args=None if score.context is None else {"context": score.context},
            **dataset(held_out),
        )


def dataset(measured_on: list[Text]) -> dict[str, Any]:
    """The fields of [`EvalResult`] that name a dataset; of several texts only the first has an id."""
    first = measured_on[0]
    files = [text.name for text in measured_on if not text.on_hub and text.name != STDLIB_NAME]
    return {
        "dataset_type": first.loader,
        "dataset_name": ", ".join(text.name for text in measured_on),
        "dataset_config": first.configuration if first.on_hub else first.name,  # which tells files from each other
        "dataset_split": first.split,
        "dataset_args": {"data_files": files} if files else None,
    }
