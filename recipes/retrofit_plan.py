"""What a retrofit is made of: all that is known of it before any work is done."""

import json
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from peft import LoraConfig, get_peft_model
from pretrained import read_pretrained
from retrofit_settings import Retrofit
from settings import SettingsError, changed
from training_arguments import blamed_on, training_arguments
from transformers import PreTrainedConfig, PreTrainedTokenizerBase, TrainingArguments
from transformers.integrations import is_deepspeed_zero3_enabled
from transformers.utils import cached_file
from windows import Windows, read_windows

from modeling_fire import FireConfig, FireForCausalLM
from modeling_fire.conversion import FAMILIES, RECORD_NAME, CalibrationOptions, fire_configs
from modeling_fire.conversion.calibrate import SAMPLE
from modeling_fire.conversion.sampling import start_token
from modeling_fire.text import check_tokens
from modeling_fire.training import RotationAnnealing


@dataclass
class Plan:
    """What a run is made of, before any work is done."""

    arguments: TrainingArguments
    tokenizer: PreTrainedTokenizerBase
    windows: Windows  # without those that are still to be sampled
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
            config, tokenizer = read_pretrained(run.model.source, "model.source", **run.source)
            check_source(run, config)
            fire = fire_config(run, config)
            if run.data.is_sampled:
                check_sample(run, fire)
            check_device(run.heal.teacher_device)
            windows = windows_of(run, tokenizer)
            check_tokens(windows.train, fire.vocab_size)
            check_tokens(windows.held_out, fire.vocab_size)
            per_step = arguments.train_batch_size * arguments.gradient_accumulation_steps * arguments.world_size
            count = run.data.tokens // run.data.length if run.data.is_sampled else len(windows.train)
            if count < per_step:
                raise ValueError(f"{run.data.text} has {count} training windows; one step takes {per_step}.")
            calibrate, lora = None, None
            if run.model.calibrate is not None:
                texts = {"text": SAMPLE if run.data.is_sampled else windows.train_texts, "seed": arguments.seed}
                calibrate = CalibrationOptions(**{**texts, **run.model.calibrate})
            if run.heal.lora is not None:
                trained = sorted({"position_bias", *run.heal.lora.get("modules_to_save", ())})
                lora = LoraConfig(**{"task_type": "CAUSAL_LM", **run.heal.lora, "modules_to_save": trained})
            check_model(run, fire, lora)
            annealing = None if run.heal.anneal is None else RotationAnnealing(run.heal.anneal)
            is_fire = isinstance(config, FireConfig)
            return cls(arguments, tokenizer, windows, per_step, is_fire, calibrate, lora, annealing)
        except (OSError, TypeError, ValueError) as error:
            raise SettingsError(str(error)) from error


def windows_of(run: Retrofit, tokenizer: PreTrainedTokenizerBase) -> Windows:
    """The text of a run, tokenised, as far as it is there: see `sampled.py` for the rest."""
    data, evaluation, longest = run.data, run.evaluation, max(run.evaluation.contexts) + 1
    text = () if data.is_sampled else data.text
    count = 0 if data.is_sampled and evaluation.text is None else evaluation.num_windows
    return read_windows(text, tokenizer, data.length, run.held_out, longest, count, data.documents, evaluation.text)


def check_sample(run: Retrofit, config: FireConfig) -> None:
    """Raises a ValueError if the source of the converted model's `config` cannot write what is asked of it."""
    start_token(config)
    lengths = [run.data.length] if run.evaluation.text is not None else run.evaluation.contexts
    if max(lengths) > config.max_position_embeddings:
        raise ValueError(
            f"`data.text: sample`: {run.model.source} was trained on {config.max_position_embeddings} tokens and "
            f"writes no {max(lengths)}: lower `data.length`, or `evaluation.contexts` without an `evaluation.text`."
        )


def check_device(name: str | None) -> None:
    """Raises a ValueError if there is no such device to put the teacher on."""
    try:
        torch.zeros(1, device=name).tolist()  # which the device "meta" has not
    except (AssertionError, RuntimeError) as error:
        raise ValueError(f"`heal.teacher_device`: there is no device {name!r} here.") from error


def check_source(run: Retrofit, config: PreTrainedConfig) -> None:
    """Raises a ValueError if what the settings ask for cannot be done with a source that has this `config`."""
    rotation = run.rotation
    if not isinstance(config, FireConfig):
        if config.model_type not in FAMILIES:
            raise ValueError(f"{config.model_type} cannot be converted. Supported are {', '.join(FAMILIES)}.")
        if rotation != "drop" and FAMILIES[config.model_type].alibi_slopes is not None:
            raise ValueError(f"{config.model_type} has no rotation to keep or to anneal.")
        return
    if run.model.calibrate is not None or run.model.max_length is not None or rotation == "fast":
        raise ValueError(
            f"{run.model.source} is converted already: `model.calibrate`, `model.max_length` and `model.rotation: "
            "fast` are for what is not. `fire convert` has them."
        )
    if rotation == "keep" and config.rope_parameters is None:
        raise ValueError(f"{run.model.source} has no rotation to keep or to anneal.")
    if rotation == "drop" and config.rope_max_period is not None:
        raise ValueError(f"{run.model.source} was converted to keep part of its rotation: set `model.rotation: keep`.")
    if (run.heal.distill is not None or run.data.is_sampled) and is_changed(run, config):
        raise ValueError("`heal.distill` and `data.text: sample` take a `model.source` with its whole rotation.")


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


def fire_config(run: Retrofit, config: PreTrainedConfig) -> FireConfig:
    """That of the converted model, whose source has this `config`."""
    if isinstance(config, FireConfig):
        return config
    return fire_configs(FAMILIES[config.model_type], config, run.rotation, run.model.max_length)[1]


def check_model(run: Retrofit, config: FireConfig, lora: LoraConfig | None) -> None:
    """Makes the model of the training without its weights: FIRE or PEFT may refuse it, which would be late else."""
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
