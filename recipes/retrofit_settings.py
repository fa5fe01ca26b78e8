"""The YAML of a retrofit."""

import math
from dataclasses import asdict, dataclass, field
from typing import Any, Literal, get_type_hints

from huggingface_hub.dataclasses import type_validator
from settings import SettingsError, check_names

from modeling_fire import FireConfig
from modeling_fire.conversion import CalibrationOptions
from modeling_fire.conversion.calibrate import SAMPLE


# Fields of FireConfig that weights do not depend on. With another bias those of the converted one go.
FREE = (
    "position_bias",
    "rope_parameters",
    "rope_max_period",
    "attention_dropout",
    "max_position_embeddings",
    "use_cache",
    "pad_token_id",
    "bos_token_id",
    "eos_token_id",
)


@dataclass
class Model:
    """What is converted, and how."""

    source: str
    gguf_file: str | None = None
    revision: str | None = None
    rotation: Literal["drop", "fast", "keep"] = (
        "drop"  # or "fast" or "keep", also in the trained model; `heal.anneal` begins with all of it
    )
    max_length: int | None = None  # `L` of the conversion, in tokens: 64 times the training length, if not set
    calibrate: dict | None = None  # fields of CalibrationOptions; the text is that of the training, if not set
    config: dict = field(default_factory=dict)  # fields of FireConfig, those of FREE, that differ from the converted

    def __post_init__(self):
        if self.rotation not in ("drop", "fast", "keep"):
            raise ValueError(f"`model.rotation` must be 'drop', 'fast' or 'keep', got {self.rotation!r}.")
        if self.max_length is not None and not (type(self.max_length) is int and self.max_length > 0):
            raise ValueError(f"`model.max_length` must be a whole number of tokens, got {self.max_length!r}.")
        if self.calibrate is not None:
            check_calibrate(self.calibrate)
        check_names(FireConfig, self.config, "model.config")
        for name in self.config:
            if name not in FREE:
                raise SettingsError(
                    f"`model.config.{name}` is settled by the weights that are converted: only {', '.join(FREE)} may "
                    "differ; what the bias starts as is up to `model.max_length` and `model.calibrate`."
                )


def check_calibrate(given: Any) -> None:
    """Raises [`SettingsError`] for what are no fields of CalibrationOptions, or not of their types, which it takes."""
    if not isinstance(given, dict):
        raise SettingsError(f"`model.calibrate` has fields of its own, got {given!r}.")
    check_names(CalibrationOptions, given, "model.calibrate")
    hints = get_type_hints(CalibrationOptions)
    for name, value in given.items():
        try:
            type_validator(name, value, hints[name])
        except TypeError as error:
            raise SettingsError(f"`model.calibrate`: {error}.") from error


@dataclass
class Data:
    """What is trained and evaluated on."""

    text: str  # a file or a dataset, or "sample": what the source writes; as for CalibrationOptions
    length: int  # tokens in a training window
    tokens: int | None = None  # to sample for training
    held_out: float | None = None  # share of the text, at its end, that is for evaluation: 0.05, if not set
    documents: int | None = None  # read no more than these

    @property
    def is_sampled(self) -> bool:
        return self.text == SAMPLE


@dataclass
class Heal:
    """How training differs from plain next-token training of all weights alike."""

    anneal: float | None = None  # fraction of the steps, see RotationAnnealing
    distill: float | None = None  # weight, see FireTrainer; the teacher is the source
    teacher_device: str | None = None  # the student's, if not set
    lora: dict | None = None  # fields of LoraConfig; the position bias is trained beside it
    bias_lr_multiplier: float = 1.0

    def __post_init__(self):
        if self.distill is not None and not (type(self.distill) in (int, float) and 0 < self.distill <= 1):
            raise ValueError(f"`heal.distill` must be a number in (0, 1], got {self.distill!r}.")
        if self.teacher_device is not None and self.distill is None:
            raise ValueError("`heal.teacher_device` is for the teacher of `heal.distill`, which is not set.")
        multiplier = self.bias_lr_multiplier
        if type(multiplier) not in (int, float) or not 0 < multiplier < math.inf:
            raise ValueError(f"`heal.bias_lr_multiplier` must be a positive number, got {multiplier!r}.")


@dataclass
class Evaluation:
    """The last `num_targets` tokens of each window, predicted from each of the `contexts`."""

    contexts: list[int]  # in tokens, `data.length` among them
    num_targets: int = 64
    num_windows: int = 64
    text: str | None = None  # a file or a dataset; a part of what is trained on is held out, if not set


@dataclass
class Retrofit:
    """The YAML. `training` holds transformers' TrainingArguments."""

    output_dir: str
    model: Model
    data: Data
    training: dict
    evaluation: Evaluation
    heal: Heal = field(default_factory=Heal)

    def __post_init__(self):
        if self.model.calibrate is not None and (self.model.rotation == "keep" or self.heal.anneal is not None):
            raise ValueError("`model.calibrate` is for a rotation that is dropped at once: not kept, nor annealed.")
        if self.model.rotation == "fast" and self.heal.anneal is not None:
            raise ValueError("`heal.anneal` takes the whole rotation: `model.rotation` cannot be 'fast'.")
        for name in ("rope_parameters", "rope_max_period"):
            if self.rotation == "drop" and self.model.config.get(name) is not None:
                raise ValueError(f"`model.rotation: drop` and `model.config.{name}` contradict each other.")
        tokens, is_sampled, is_split = self.data.tokens, self.data.is_sampled, self.evaluation.text is None
        if (type(tokens) is not int) if is_sampled else (tokens is not None):
            raise ValueError(
                "`data.tokens` says how many to sample, a whole number: it goes with `data.text: sample`, got "
                f"{tokens!r} with {self.data.text!r}."
            )
        if self.data.held_out is not None and (is_sampled or not is_split):
            raise ValueError("`data.held_out` is for a text that is read, where there is no `evaluation.text`.")
        if self.data.documents is not None and is_sampled and is_split:
            raise ValueError(
                "`data.documents` is for texts that are read, and with `data.text: sample` there are none."
            )
        contexts, num_targets = self.evaluation.contexts, self.evaluation.num_targets
        if self.data.length not in contexts:
            raise ValueError(f"`data.length` ({self.data.length}) is not among `evaluation.contexts`: {contexts}.")
        if not 1 <= num_targets <= min(contexts):
            raise ValueError(f"`evaluation.num_targets` ({num_targets}) do not fit into contexts of {contexts}.")

    @property
    def rotation(self) -> Literal["drop", "fast", "keep"]:
        """What the conversion does with the rotation."""
        return self.model.rotation if self.heal.anneal is None else "keep"

    @property
    def changes(self) -> dict[str, Any]:
        """Of the config, as training begins."""
        return self.model.config if self.rotation != "drop" else {"rope_parameters": None, **self.model.config}

    @property
    def held_out(self) -> float:
        """Share of `data.text`."""
        if self.evaluation.text is not None:
            return 0.0
        return 0.05 if self.data.held_out is None else self.data.held_out

    @property
    def conversion(self) -> dict[str, Any]:
        """All that the converted model depends on."""
        model = {name: value for name, value in asdict(self.model).items() if name != "config"}
        calibrated_on = {name: getattr(self.data, name) for name in ("text", "documents")}
        calibrated_on |= {"held_out": self.held_out, "seed": self.training.get("seed")}
        return model | {"rotation": self.rotation} | (calibrated_on if self.model.calibrate is not None else {})

    @property
    def sampling(self) -> dict[str, Any]:
        """All that the sampled text depends on."""
        names = ("seed", "bf16", "per_device_eval_batch_size")
        held_out = [max(self.evaluation.contexts), self.evaluation.num_windows]
        return {
            "source": [self.model.source, self.source],
            "train": [self.data.length, self.data.tokens],
            "held_out": held_out if self.evaluation.text is None else None,
            "training": {name: self.training.get(name) for name in names},
        }

    @property
    def settings(self) -> dict[str, Any]:
        """All that the result depends on."""
        training = {name: value for name, value in self.training.items() if name != "run_name"}
        return {name: value for name, value in asdict(self).items() if name != "output_dir"} | {"training": training}

    @property
    def source(self) -> dict[str, Any]:
        """Arguments of whatever reads the source, as far as they are set."""
        arguments = {"revision": self.model.revision, "gguf_file": self.model.gguf_file}
        return {name: value for name, value in arguments.items() if value is not None}
