"""What is on the disk: the checkpoint that a run goes on from, how it does, and the room for those to come."""

import json
import shutil
from pathlib import Path
from typing import Any

from settings import SettingsError
from transformers import Trainer, TrainerState, TrainingArguments


def last_checkpoint(folder: str) -> str | None:
    """The last one that is whole. It may be that of the last step, which [`train_from`] knows how to go on from."""
    steps = {}
    for path in Path(folder).glob("*/trainer_state.json"):
        try:
            state = TrainerState.load_from_json(str(path))
        except (json.JSONDecodeError, TypeError):  # half a file, which a killed run or a full disk leaves
            continue
        steps[path.parent] = state.global_step
    return str(max(steps, key=steps.__getitem__)) if steps else None


def train_from(trainer: Trainer, checkpoint: str | None) -> None:
    """
    `trainer.train`, from a checkpoint that [`last_checkpoint`] found, if any. With that of the last step, Trainer
    would take one step too many: here it loads the model and its history, and ends as after a training.
    """
    if checkpoint is not None:
        state = TrainerState.load_from_json(str(Path(checkpoint) / "trainer_state.json"))
        if state.global_step >= state.max_steps:
            loaded: Any = trainer
            first = trainer.set_initial_training_values
            loaded.set_initial_training_values = lambda *given: (0, *first(*given)[1:])  # a training of 0 epochs
    trainer.train(resume_from_checkpoint=checkpoint)


def check_room(folder: Path, num_parameters: int, arguments: TrainingArguments) -> None:
    """
    Refuses to start what cannot be saved: the disk needs room for the model, and for the checkpoints that Trainer
    keeps (at least one) with the one that it writes before it deletes the oldest.

    Args:
        folder (`Path`): of the outputs, which need not exist yet.
        num_parameters (`int`): all of them trained in float32 with AdamW, whose moments take twice as much again.
        arguments (`TrainingArguments`): how often to save, and how much to keep.

    Raises:
        SettingsError: if less is free. What earlier runs left in the folder counts as room.
    """
    saves = arguments.save_strategy != "no"
    checkpoints = (arguments.save_total_limit or 1) + 1 if saves else 0
    needed = 4 * num_parameters * (1 + 3 * checkpoints)
    existing = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    held = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    free = shutil.disk_usage(existing).free + held
    if free < needed:
        raise SettingsError(
            f"{folder} has room for {free / 2**30:.1f} GiB, and the model with {checkpoints} checkpoints takes "
            f"{needed / 2**30:.1f} GiB: free some, or choose another `output_dir` or a smaller "
            "`training.save_total_limit`."
        )
