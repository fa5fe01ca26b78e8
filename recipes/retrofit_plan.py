"""What a retrofit is made of: all that is known of it before any work is done."""

import json
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from peft import LoraConfig, get_peft_model
from pretrained import open_pretrained
from retrofit_settings import Retrofit
from settings import SettingsError, changed
from training_arguments import blamed_on, training_arguments
from transformers import PreTrainedConfig, PreTrainedTokenizerBase, TrainingArguments
from transformers.integrations import is_deepspeed_zero3_enabled
from transformers.utils import cached_file
from windows import Windows, read_windows

from modeling_fire import FireConfig, FireForCausalLM
from modeling_fire.conversion import FAMILIES, RECORD_NAME, CalibrationOptions, fire_configs
from modeling_fire.training import RotationAnnealing


@dataclass
class Plan:
    """What a run is made of, before any work is done."""

    arguments: TrainingArguments
    tokenizer: PreTrainedTokenizerBase
    windows: Windows
    windows_per_step: int
    is_fire: bool  # the source is converted already
    calibrate: CalibrationOptions | None
    lora: LoraConfig | None
    annealing: RotationAnnealing | None

    @classmethod
    def of(cls, run: Retrofit) -> "Plan":
        """Raises [`SettingsError`] for what is wrong with the settings or the text."""
        try:
            arguments = training_arguments(Path(run.output_dir), run.training)
            if is_deepspeed_zero3_enabled():
                raise ValueError("ZeRO-3 shards what this recipe converts and measures on one process: take FSDP2.")
            config, tokenizer = open_pretrained(run.model.source, "model.source", **run.source)
            check_source(run, config)
            windows = windows_of(run, tokenizer)
            per_step = arguments.train_batch_size * arguments.gradient_accumulation_steps * arguments.world_size
            if len(windows.train) < per_step:
                raise ValueError(
                    f"{run.data.text} has {len(windows.train)} training windows; one step takes {per_step}."
                )
            calibrate, lora = None, None
            if run.model.calibrate is not None:
                texts = {"text": windows.train_texts, "seed": arguments.seed}
                calibrate = CalibrationOptions(**{**texts, **run.model.calibrate})
            if run.heal.lora is not None:
                trained = sorted({"position_bias", *run.heal.lora.get("modules_to_save", ())})
                lora = LoraConfig(**{"task_type": "CAUSAL_LM", **run.heal.lora, "modules_to_save": trained})
            check_model(run, config, lora)
            annealing = None if run.heal.anneal is None else RotationAnnealing(run.heal.anneal)
            is_fire = isinstance(config, FireConfig)
            return cls(arguments, tokenizer, windows, per_step, is_fire, calibrate, lora, annealing)
        except (OSError, TypeError, ValueError) as error:
            raise SettingsError(str(error)) from error


def windows_of(run: Retrofit, tokenizer: PreTrainedTokenizerBase) -> Windows:
    """The text of a run, tokenised."""
    data, longest = run.data, max(run.evaluation.contexts) + 1
    return read_windows(
        data.text, tokenizer, data.length, data.held_out, longest, run.evaluation.num_windows, data.documents
    )


def check_source(run: Retrofit, config: PreTrainedConfig) -> None:
    """Raises a ValueError if what the settings ask for cannot be done with a source that has this `config`."""
    rotation = run.rotation
    if not isinstance(config, FireConfig):
        if config.model_type not in FAMILIES:
            raise ValueError(f"{config.model_type} cannot be converted. Supported are {', '.join(FAMILIES)}.")
        if rotation != "drop" and FAMILIES[config.model_type].alibi_slopes is not None:
            raise ValueError(f"{config.model_type} has no rotation to keep or to anneal.")
        return
    if run.model.calibrate is not None or rotation == "fast":
        raise ValueError(
            f"{run.model.source} is converted already: `model.calibrate` and `model.rotation: fast` are for what is "
            "not. `fire convert` has both."
        )
    if rotation == "keep" and config.rope_parameters is None:
        raise ValueError(f"{run.model.source} has no rotation to keep or to anneal.")
    if rotation == "drop" and config.rope_max_period is not None:
        raise ValueError(f"{run.model.source} was converted to keep part of its rotation: set `model.rotation: keep`.")
    if run.heal.distill is not None and is_changed(run, config):
        raise ValueError("`heal.distill`: the teacher is `model.source`, which has to be with its whole rotation.")


def is_changed(run: Retrofit, config: FireConfig) -> bool:
    """Whether a FIRE source is known to compute something else than what it was converted from."""
    where = {"_raise_exceptions_for_missing_entries": False, "_raise_exceptions_for_connection_errors": False}
    path = cached_file(run.model.source, RECORD_NAME, revision=run.model.revision, **where)
    record = {"rotation": None, "calibration": None} if path is None else json.loads(Path(path).read_text())
    return (
        record["rotation"] in ("drop", "fast")
        or record["calibration"] is not None
        or config.rope_max_period is not None
    )


def check_model(run: Retrofit, config: PreTrainedConfig, lora: LoraConfig | None) -> None:
    """Makes the model of the training without its weights: FIRE or PEFT may refuse it, which would be late else."""
    if not isinstance(config, FireConfig):
        _, config = fire_configs(FAMILIES[config.model_type], config, run.rotation, None)
    try:
        config = changed_config(config, run.changes)
    except (KeyError, StrictDataclassError) as error:
        raise ValueError(f"`model.config`: {error.__cause__ or error}") from error
    with torch.device("meta"):
        model = FireForCausalLM(config)
        if lora is not None:
            lora = deepcopy(lora)  # PEFT writes into it
            lora.init_lora_weights = False  # some ways to begin take the weights
            with blamed_on("heal.lora"):
                get_peft_model(model, lora)


def changed_config(config: FireConfig, changes: dict[str, Any]) -> FireConfig:
    """With `changes`; those to `rope_parameters` go by name."""
    return FireConfig.from_dict(changed(config.to_dict(), changes))
