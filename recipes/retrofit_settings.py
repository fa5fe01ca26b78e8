"""The YAML of a retrofit."""

import math
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

from settings import check_names

from modeling_fire import FireConfig


@dataclass
class Model:
    """What is converted, and how."""

    source: str
    gguf_file: str | None = None
    revision: str | None = None
    rotation: Literal["drop", "fast", "keep"] = (
        "drop"  # or "fast" or "keep", also in the trained model; `heal.anneal` begins with all of it
    )
    calibrate: dict | None = None  # fields of CalibrationOptions; the text is that of the training, if not set
    config: dict = field(default_factory=dict)  # fields of FireConfig that differ from the converted model's

    def __post_init__(self):
        if self.rotation not in ("drop", "fast", "keep"):
            raise ValueError(f"`model.rotation` must be 'drop', 'fast' or 'keep', got {self.rotation!r}.")
        check_names(FireConfig, self.config, "model.config")


@dataclass
class Data:
    """What is trained and evaluated on."""

    text: str  # a file or a dataset, as for CalibrationOptions
    length: int  # tokens in a training window
    held_out: float = 0.05  # share of the text, at its end, that is for evaluation
    documents: int | None = None  # read no more than these


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
        multiplier = self.bias_lr_multiplier
        if type(multiplier) not in (int, float) or not 0 < multiplier < math.inf:
            raise ValueError(f"`heal.bias_lr_multiplier` must be a positive number, got {multiplier!r}.")


@dataclass
class Evaluation:
    """The last `num_targets` tokens of each window, predicted from each of the `contexts`."""

    contexts: list[int]  # in tokens, `data.length` among them
    num_targets: int = 64
    num_windows: int = 64


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
        rope = [value for name, value in self.model.config.items() if name.partition(".")[0] == "rope_parameters"]
        if self.rotation == "drop" and any(value is not None for value in rope):
            raise ValueError("`model.rotation: drop` and `model.config.rope_parameters` contradict each other.")
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
    def conversion(self) -> dict[str, Any]:
        """All that the converted model depends on."""
        model = {name: value for name, value in asdict(self.model).items() if name != "config"}
        calibrated_on = {name: getattr(self.data, name) for name in ("text", "held_out", "documents")}
        calibrated_on["seed"] = self.training.get("seed")
        return model | {"rotation": self.rotation} | (calibrated_on if self.model.calibrate is not None else {})

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
