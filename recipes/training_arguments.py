"""transformers' TrainingArguments, from the block `training` of a YAML, and one clear error for what is wrong."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import NoneType
from typing import Any, get_args, get_type_hints

import torch
from settings import SettingsError, check_names
from transformers import Trainer, TrainingArguments
from transformers.integrations import get_available_reporting_integrations
from transformers.training_args import OptimizerNames


def training_arguments(folder: Path, training: dict[str, Any]) -> TrainingArguments:
    """
    Args:
        folder (`Path`): of the run; the checkpoints lie under it.
        training (`dict`): fields of TrainingArguments; unless they say so, nothing is saved on the way or reported.

    Raises:
        SettingsError: if a field is unknown, a value is refused, or what is to be reported to is not installed.
    """
    with blamed_on("training"):
        check_names(TrainingArguments, training, "training")
        hints = get_type_hints(TrainingArguments)
        for name, value in training.items():  # it would keep a text as a number, and training would stumble over it
            kinds = set(get_args(hints[name]) or [hints[name]])
            if kinds <= {int, float, NoneType} and type(value) not in kinds | {int, float}:
                raise ValueError(f"`{name}` must be a number, got {value!r}.")
        given = {
            "output_dir": str(folder / "checkpoints"),
            "use_cpu": not torch.accelerator.is_available(),  # else processes without GPUs would not find each other
            "report_to": "none",
            "save_strategy": "no",
            **training,
        }
        arguments = TrainingArguments(**given)
        for name in ("per_device_train_batch_size", "per_device_eval_batch_size", "gradient_accumulation_steps"):
            value = getattr(arguments, name)
            if not isinstance(value, int) or value < 1:
                raise ValueError(f"`{name}` must be a whole number, at least 1, got {value}.")
        if arguments.save_only_model and arguments.save_strategy != "no":
            raise ValueError("`save_only_model` keeps nothing that a killed run could go on from: leave it out.")
        # AdamW itself refuses numbers out of range.
        if arguments.optim in (OptimizerNames.ADAMW_TORCH, OptimizerNames.ADAMW_TORCH_FUSED):
            make, options = Trainer.get_optimizer_cls_and_kwargs(arguments)
            make([torch.nn.Parameter(torch.zeros(1))], weight_decay=arguments.weight_decay, **options)
        missing = set(arguments.report_to) - set(get_available_reporting_integrations())
        if missing:
            raise ValueError(f"`report_to`: {', '.join(sorted(missing))} is not installed, or not known.")
    return arguments


@contextmanager
def blamed_on(field: str) -> Iterator[None]:
    """Makes a [`SettingsError`] of what is refused inside, because `field` of the YAML asks for it."""
    try:
        yield
    except (ImportError, TypeError, ValueError) as error:
        raise SettingsError(f"`{field}`: {error}") from error
