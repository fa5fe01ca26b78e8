"""
Models that are pushed while they train, by transformers' Trainer and by ours, and a training that goes on from there.

    python trainers.py FOLDER

`FOLDER` has what they leave on this machine.
"""

import sys
from pathlib import Path

from checkpoints import save_tokenizer
from helpers import FEW_STEPS, random_ids, tiny_model
from huggingface_hub import HfApi, snapshot_download
from transformers import Trainer, TrainerCallback, TrainingArguments

from modeling_fire.training import FireTrainer


def build(trainer_class, name: str, work: Path, **changes) -> Trainer:
    arguments = {"max_steps": 4, "save_strategy": "steps", "save_steps": 2, **changes}
    data = [{"input_ids": row, "labels": row} for row in random_ids(16, 12)]
    return trainer_class(
        tiny_model(),
        TrainingArguments(str(work / name), **FEW_STEPS | arguments),
        train_dataset=data,
        processing_class=save_tokenizer(work / "tokenizer"),
    )


class Patience(TrainerCallback):
    """Waits for each push: training these models takes less time, and Trainer leaves out what comes too soon."""

    def __init__(self, trainer: Trainer):
        self.trainer = trainer

    def on_save(self, *args, **kwargs) -> None:
        self.trainer.push_in_progress.wait_until_done()


def push(trainer_class, name: str, work: Path, **changes) -> None:
    trainer = build(trainer_class, name, work, push_to_hub=True, hub_model_id=f"owner/{name}", **changes)
    trainer.add_callback(Patience(trainer))
    trainer.train()
    trainer.push_to_hub()


def main() -> None:
    work = Path(sys.argv[1])
    push(Trainer, "trainer", work, hub_strategy="every_save")
    push(FireTrainer, "fire-trainer", work, hub_strategy="checkpoint", hub_private_repo=True)

    titles = {commit.title: commit.commit_id for commit in HfApi().list_repo_commits("owner/fire-trainer")}
    folder = snapshot_download("owner/fire-trainer", revision=titles["Training in progress, step 2, checkpoint"])
    resumed = build(FireTrainer, "resumed", work)
    resumed.train(resume_from_checkpoint=f"{folder}/last-checkpoint")
    resumed.save_model()


if __name__ == "__main__":
    main()
