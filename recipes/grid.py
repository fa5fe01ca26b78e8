"""Runs of several variants and seeds: what is finished is kept, and what came of them is one table."""

import json
import math
import os
import platform
import shlex
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import torch
import transformers
from accelerate import PartialState
from accelerate.utils.memory import clear_device_cache
from settings import one_line_errors

from modeling_fire.cards import write_card
from modeling_fire.evaluation.report import write_json


@dataclass
class Job:
    """
    One variant with one seed.

    Args:
        variant (`str`): its name.
        seed (`int`): its seed.
        path (`Path`): where its result is kept, as JSON.
        settings (`dict`): all that the result depends on; kept beside it.
        run (`Callable`): makes the result, a `dict`.
    """

    variant: str
    seed: int
    path: Path
    settings: dict[str, Any]
    run: Callable[[], dict[str, Any]]

    def do(self) -> dict[str, Any]:
        """Runs it; and what it leaves in this process, no later one finds."""
        result = self.run()
        torch.compiler.reset()  # after a few models that differ it would give up compiling
        if "wandb" in sys.modules:
            sys.modules["wandb"].finish()  # else the next run would be logged as part of this one
        clear_device_cache(garbage_collection=True)
        return result


def run_grid(jobs: list[Job]) -> dict[str, dict[int, dict[str, Any]]]:
    """Runs the jobs that are not finished yet; returns the results of all, by variant and seed."""
    finished = [read_finished(job.path, job.settings) for job in jobs]  # all refusals before any work
    results: dict[str, dict[int, dict[str, Any]]] = {}
    for number, (job, result) in enumerate(zip(jobs, finished, strict=True), start=1):
        if result is None:
            print(f"\n[{number}/{len(jobs)}] {job.variant}, seed {job.seed}", flush=True)
            start = time.monotonic()
            result = job.do()
            result = {"settings": job.settings, "seconds": round(time.monotonic() - start), **result}
            job.path.parent.mkdir(parents=True, exist_ok=True)
            write_json(job.path, result)
            result = json.loads(job.path.read_text())  # with keys of the same type as if it had been kept
        results.setdefault(job.variant, {})[job.seed] = result
    return results


def read_finished(path: Path, settings: dict[str, Any]) -> dict[str, Any] | None:
    """The result in `path`, if there is one; ends the program if it was made with other settings."""
    if not path.exists():
        return None
    result = json.loads(path.read_text())
    if result["settings"] != json.loads(json.dumps(settings)):
        raise SystemExit(f"{path.parent} was made with other settings: delete it, or choose another `output_dir`.")
    return result


def run_once(path: Path, settings: dict[str, Any], run: Callable[[], dict[str, Any]]) -> dict[str, Any] | None:
    """
    The result of a run whose model lies beside it, in `model`: it is kept in `path`, and not made again.

    Args:
        path (`Path`): a JSON.
        settings (`dict`): all that the result depends on.
        run (`Callable`): makes the result, which is empty on all processes but the main one.

    Returns:
        `dict`, *optional*: on all processes but the main one `None`.
    """
    result = read_finished(path, settings)
    if result is None:
        with one_line_errors():
            made = run()
            PartialState().destroy_process_group()  # a process that exits while threads of it still talk may abort
        if made:
            result = {"settings": settings, **made}
            write_card(path.parent / "model", results=result)
            write_json(path, result)
    return result if is_first_process() else None


def is_first_process() -> bool:
    """Also before the processes know each other, which takes TrainingArguments."""
    return os.environ.get("RANK", "0") == "0"


def losses_by_context(results: dict[str, dict[int, dict[str, Any]]]) -> dict[str, dict[int, dict[int, float]]]:
    """By variant, seed and context: the mean of the losses by window that each result has under `loss`."""
    return {
        variant: {
            seed: {int(context): mean(losses) for context, losses in result["loss"].items()}
            for seed, result in by_seed.items()
        }
        for variant, by_seed in results.items()
    }


def mean_losses(losses: dict[str, dict[int, dict[int, float]]]) -> dict[str, dict[int, float]]:
    """The mean over the seeds, by variant and context."""
    return {
        variant: {
            context: mean(loss[context] for loss in by_seed.values()) for context in next(iter(by_seed.values()))
        }
        for variant, by_seed in losses.items()
    }


# Student's t for a two-sided interval of 95%, by degrees of freedom from 1 on; the last for any more.
T_95 = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262)


def half_interval(values: list[float]) -> float:
    """Half the width of the 95% confidence interval of the mean of two or more values."""
    return T_95[min(len(values), len(T_95) + 1) - 2] * stdev(values) / math.sqrt(len(values))


def print_perplexities(
    losses: dict[str, dict[int, dict[int, float]]], more: dict[str, dict[str, str]] | None = None
) -> None:
    """
    Prints a row a variant and a column a context: the mean perplexity over seeds, with its 95% confidence interval.

    Args:
        losses (`dict`): by variant, seed and context, in nats per token.
        more (`dict`, *optional*): further columns, by name and variant.
    """
    width = max(map(len, losses))
    more = more or {}
    contexts = next(iter(next(iter(losses.values())).values()))
    print(" " * width + "".join(f"{name:>16}" for name in [*contexts, *more]))
    for variant, by_seed in losses.items():
        cells = []
        for context in contexts:
            perplexities = [math.exp(loss[context]) for loss in by_seed.values()]
            spread = f" ±{half_interval(perplexities):.3f}" if len(perplexities) > 1 else ""
            cells.append(f"{mean(perplexities):.3f}{spread}")
        cells += [column[variant] for column in more.values()]
        print(variant.ljust(width) + "".join(f"{cell:>16}" for cell in cells))


def origin() -> dict[str, Any]:
    """Where figures come from; the command is without the launcher."""
    is_gpu = torch.cuda.is_available()
    return {
        "command": shlex.join(["python", *sys.argv]),
        "machine": torch.cuda.get_device_name() if is_gpu else f"{os.cpu_count()} CPUs, {platform.machine()}",
        "date": time.strftime("%Y-%m-%d"),
        "versions": {
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "python": platform.python_version(),
        },
    }
