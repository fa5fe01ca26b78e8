"""Miniature runs of the retrofit recipe, for the tests of it: source, settings, and how they run."""

from functools import partial
from pathlib import Path

import pytest
from checkpoints import llama, save_tokenizer
from helpers import recipe_command
from retrofit import retrofit
from retrofit_settings import Retrofit
from settings import changed, read_fields


TEXT = "Once upon a time there was a little fox. It ran through the woods, and the woods were dark and deep. "


@pytest.fixture(name="source", scope="module")
def small_source(tmp_path_factory) -> Path:
    """A random LLaMA with its tokenizer, and a text of some 6000 letters, one token each."""
    folder = tmp_path_factory.mktemp("source")
    llama().save_pretrained(folder)
    save_tokenizer(folder)
    (folder / "text.txt").write_text("".join(f"{TEXT}{number} " for number in range(60)))
    return folder


@pytest.fixture(name="settings")
def small_settings(source, tmp_path) -> dict:
    return {
        "output_dir": str(tmp_path / "out"),
        "model": {"source": str(source)},
        "data": {"text": str(source / "text.txt"), "length": 32, "held_out": 0.2},
        "training": {
            "max_steps": 6,
            "per_device_train_batch_size": 4,
            "learning_rate": 1.0e-3,
            "logging_steps": 1,
            "eval_strategy": "steps",
            "eval_steps": 3,
            "eval_on_start": True,
            "save_strategy": "steps",
            "save_steps": 2,
            "disable_tqdm": True,
            "use_cpu": True,
        },
        "evaluation": {"contexts": [32, 64], "num_targets": 8, "num_windows": 4},
    }


@pytest.fixture(name="sampling")
def sampling_settings(settings) -> dict:
    data = {"text": "sample", "length": 32, "tokens": 1300}
    return {**settings, "data": data, "evaluation": {"contexts": [16, 32], "num_targets": 8, "num_windows": 8}}


def run(settings: dict, **changes) -> dict:
    """The result of a run in this process; the name of a field is written with `__` for each dot."""
    changes = {name.replace("__", "."): value for name, value in changes.items()}
    return retrofit(read_fields(Retrofit, changed(settings, changes)))


command = partial(recipe_command, "retrofit")
