"""The YAML of a study: what its models share, how they differ, and what may be said of either."""

from copy import copy
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from additions import ADDITIONS
from settings import SettingsError, changed, check_names
from training_arguments import training_arguments

from modeling_fire import FireConfig


# What may change without making a finished run another one.
NOT_OF_A_RUN = {"output_dir", "variants", "seeds", "show", "prompt"}
# What a variant may have for itself: fields of the study; `random_positions`, below which its positions are drawn, or
# the mean length of the `documents` that its rows are cut into; and the name of an `addition` to the model.
OF_THE_ROWS = {"random_positions", "documents"}
OF_ONE_RUN = {"length", "training", "bias_lr_multiplier", "bias_weight_decay", "addition", *OF_THE_ROWS}
# TrainingArguments that the study sets.
SET_HERE = {"output_dir", "seed", "data_seed", "save_strategy", "report_to"}


@dataclass
class Study:
    """
    The YAML. `variants` maps a name to the fields of [`FireConfig`] in which it differs from `model`, and may have
    those of `OF_ONE_RUN` for itself. One that has `from` is not trained: it is the variant of that name, with other
    fields where it is tested. `training` holds transformers' TrainingArguments.
    """

    output_dir: str
    model: dict
    variants: dict[str, dict]
    length: int  # of the training texts, in tokens
    contexts: list[int]  # of the test, in tokens
    training: dict
    text: str | None = None  # pattern of the names of text files; None: what Python comes with
    seeds: list[int] = field(default_factory=lambda: [0])
    num_windows: int = 64
    num_targets: int = 64
    bias_lr_multiplier: float = 1.0  # learning rate of the position bias, as a multiple of the others'
    bias_weight_decay: float = 0.0  # of the weights of f; its biases, c and L never decay
    show: str | None = None  # the variant whose biases are drawn and that speaks at the end
    prompt: str = "def "

    def __post_init__(self):
        trained = {variant: changes for variant, changes in self.variants.items() if "from" not in changes}
        named = [changes["from"] for changes in self.variants.values() if "from" in changes]
        for name in [*named, *([self.show] if self.show else [])]:
            if name not in trained:
                raise SettingsError(f"{name!r} is not among the variants that are trained: {', '.join(trained)}.")
            if "addition" in trained[name]:
                raise SettingsError(f"{name!r} cannot be loaded again: what is added to it is not saved.")
        for variant, changes in self.variants.items():
            own = set() if "from" in changes else OF_ONE_RUN
            self.check(variant, {name: value for name, value in changes.items() if name not in {*own, "from"}})
            if set(changes) >= OF_THE_ROWS:
                raise SettingsError(f"{variant!r} has both {' and '.join(sorted(OF_THE_ROWS))}: choose one.")
            if changes.get("addition") not in (None, *ADDITIONS):
                raise SettingsError(f"{changes['addition']!r} is no addition: there are {', '.join(ADDITIONS)}.")
            training = {**self.training, **changes.get("training", {})}
            if SET_HERE & set(training):
                raise SettingsError(f"Leave out `training.{min(SET_HERE & set(training))}`: the study sets it.")
            training_arguments(Path(self.output_dir), training)  # raises for what is wrong with them
        if not 1 <= self.num_targets <= min(self.contexts):
            raise SettingsError(f"`num_targets` ({self.num_targets}) do not fit into contexts of {self.contexts}.")

    def check(self, variant: str, changes: dict[str, Any]) -> None:
        """Refuses fields of the config that there are not, which would leave the model as it is, or bad values."""
        check_names(FireConfig, self.model, "model")
        check_names(FireConfig, changes, f"variants.{variant}")
        if FireConfig(**{**self.model, **changes}).vocab_size < 256:
            raise SettingsError("`model.vocab_size` must be 256 or more: tokens are bytes.")

    def folder(self, variant: str, seed: int) -> Path:
        return Path(self.output_dir) / f"{variant}-seed{seed}"

    def of(self, variant: str) -> "Study":
        """With what a variant has for itself."""
        names = set(vars(self)) & OF_ONE_RUN
        own = {name: value for name, value in self.variants[variant].items() if name in names}
        result = copy(self)  # as it was checked
        vars(result).update(changed(vars(self), own))
        return result
