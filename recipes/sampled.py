"""Text that the source of a retrofit writes by itself, in parts: several processes share them, and none is lost."""

from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from accelerate import PartialState
from grid import read_finished, write_json
from retrofit_settings import Retrofit
from safetensors.torch import load_file, save_file
from transformers import TrainingArguments
from transformers.utils import logging
from windows import Windows

from modeling_fire.conversion.sampling import sampled_windows


# A folder of the outputs, and a file in it.
SAMPLED, WINDOWS = "sampled", "windows.safetensors"
# Of a part at the most.
PART_TOKENS = 2**20
# Between the seeds of two parts, so that they are not those of a run with another seed.
SEED_STEP = 10**6


class Part(NamedTuple):
    """Some windows of those that are trained on, or held out."""

    name: str
    number: int
    length: int
    windows: int
    seed: int

    @property
    def file(self) -> str:
        return f"{self.name}-{self.number}.safetensors"


def parts(run: Retrofit, seed: int) -> Iterator[Part]:
    """All that a run asks for; what is held out is of another seed: it shall not be what is trained on."""
    asked = [("train", run.data.length, run.data.tokens // run.data.length)]
    if run.evaluation.text is None:
        asked.append(("held_out", max(run.evaluation.contexts) + 1, run.evaluation.num_windows))
    for offset, (name, length, count) in enumerate(asked):
        size = max(1, PART_TOKENS // length)
        for number, start in enumerate(range(0, count, size)):
            yield Part(name, number, length, min(size, count - start), seed + offset + SEED_STEP * number)


def unfinished_folder(run: Retrofit) -> Path:
    return Path(run.output_dir) / f"{SAMPLED}.unfinished"


def check_sampled(run: Retrofit) -> None:
    """Ends the program if what was sampled, or begun to be, was so with other settings."""
    for folder in (Path(run.output_dir) / SAMPLED, unfinished_folder(run)):
        read_finished(folder / "settings.json", run.sampling)


def sample(run: Retrofit, arguments: TrainingArguments, load_source: Callable[[], Any]) -> None:
    """
    Has the source write what is trained on, and what is held out where there is no text for it, as far as it is not
    written yet. The processes take turns at the parts, and the main one puts them together.
    """
    folder, unfinished = Path(run.output_dir) / SAMPLED, unfinished_folder(run)
    if folder.exists():
        return
    is_main = arguments.process_index == 0
    with arguments.main_process_first(local=False):
        if is_main:
            unfinished.mkdir(parents=True, exist_ok=True)
            write_json(unfinished / "settings.json", {"settings": run.sampling})
    everything = list(parts(run, arguments.seed))
    mine = everything[arguments.process_index :: arguments.world_size]
    mine = [part for part in mine if not (unfinished / part.file).exists()]
    model = load_source().to(arguments.device) if mine else None
    for part in logging.tqdm(mine, desc="Parts of the text", disable=len(mine) < 2):
        windows = sampled_windows(model, part.length, part.windows, part.seed, arguments.per_device_eval_batch_size)
        path = unfinished / part.file
        save_file({"windows": windows}, path.with_suffix(".unfinished"))
        path.with_suffix(".unfinished").rename(path)
    PartialState().wait_for_everyone()
    if is_main:
        files: dict[str, list[Path]] = {}
        for part in everything:
            files.setdefault(part.name, []).append(unfinished / part.file)
        joined = {name: torch.cat([load_file(path)["windows"] for path in paths]) for name, paths in files.items()}
        save_file(joined, unfinished / WINDOWS)
        unfinished.rename(folder)
        for part in everything:
            (folder / part.file).unlink()


def with_sampled(windows: Windows, output: Path) -> Windows:
    """Together with those that were sampled in a run's folder, if any were."""
    path = output / SAMPLED / WINDOWS
    sampled: dict[str, Any] = load_file(path) if path.exists() else {}
    return replace(windows, **sampled)
