"""The YAML of a retrofit, and how such settings are read and changed."""

import argparse
import dataclasses
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import yaml

from modeling_fire import FireConfig
from modeling_fire.conversion import ConversionError


Fields = TypeVar("Fields")


class SettingsError(ValueError):
    """Settings that are wrong, or do not fit the data. The message says what to change."""


@contextmanager
def one_line_errors() -> Iterator[None]:
    """Ends the program with one line where its input is at fault."""
    try:
        yield
    except (SettingsError, ConversionError) as error:
        raise SystemExit(f"Error: {' '.join(str(error).split())}") from error


def settings_from_command_line(fields_class: type[Fields], description: str) -> Fields:
    """
    A dataclass of the YAML that the command line names, with the changes that it asks for. Ends the program with a
    message if something is wrong with them.
    """
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("settings", type=Path, help="a YAML")
    parser.add_argument("changes", nargs="*", help="fields that differ from the YAML, as name=value")
    given = parser.parse_args()
    try:
        settings = numbers(yaml.safe_load(given.settings.read_text()))
        return read_fields(fields_class, changed(settings, parse_changes(given.changes)))
    except (OSError, TypeError, ValueError, yaml.YAMLError) as error:
        parser.error(str(error))


def changed(settings: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    """`settings` with `changes`: blocks are merged, `a.b` names the field `b` of the block `a`, all else replaces."""
    result = dict(settings)
    for name, value in changes.items():
        block, _, rest = name.partition(".")
        if rest:
            value = {rest: value}
        if isinstance(value, dict):
            old = result.get(block)
            value = changed(old if isinstance(old, dict) else {}, value)
        result[block] = value
    return result


def parse_changes(arguments: list[str]) -> dict[str, Any]:
    """`["data.length=128"]` as `{"data.length": 128}`; values are YAML."""
    changes = {}
    for argument in arguments:
        name, equals, value = argument.partition("=")
        if not equals:
            raise ValueError(f"Changes have the form name=value, got {argument!r}.")
        changes[name] = numbers(yaml.safe_load(value))
    return changes


def numbers(value: Any) -> Any:
    """`value` with texts like `1e-3` as numbers, which YAML takes for texts unless they have a point."""
    if isinstance(value, dict):
        return {name: numbers(each) for name, each in value.items()}
    if isinstance(value, list):
        return [numbers(each) for each in value]
    return float(value) if isinstance(value, str) and re.fullmatch(r"[-+]?\d+e[-+]?\d+", value) else value


def read_fields(fields_class: type[Fields], values: dict[str, Any], block: str = "") -> Fields:
    """
    A dataclass of the values of a YAML; fields that are dataclasses are its blocks.

    Raises:
        ValueError: if a field is unknown or missing.
    """
    if not isinstance(values, dict):
        raise ValueError(f"`{block.rstrip('.')}` has fields of its own, got {values!r}.")
    fields: dict[str, Any] = {each.name: each for each in dataclasses.fields(fields_class)}  # type: ignore[arg-type]
    read = {}
    for name, value in values.items():
        if name not in fields:
            raise ValueError(f"There is no field `{block}{name}`. Known are {', '.join(fields)}.")
        is_block = dataclasses.is_dataclass(fields[name].type)
        read[name] = read_fields(fields[name].type, value, f"{block}{name}.") if is_block else value
    for name, each in fields.items():
        if name not in read and each.default is each.default_factory is dataclasses.MISSING:
            raise ValueError(f"The field `{block}{name}` is missing.")
    return fields_class(**read)


def check_names(fields_class: type, values: dict[str, Any], where: str) -> None:
    """
    What some classes would pass over in silence.

    Raises:
        SettingsError: if a name in `values`, which stand at `where` in the YAML, is no field of the dataclass.
    """
    unknown = set(values) - {each.name for each in dataclasses.fields(fields_class)}
    if unknown:
        raise SettingsError(f"{fields_class.__name__} has no fields {', '.join(sorted(unknown))} (in `{where}`).")


@dataclass
class Model:
    """What is converted, and how."""

    source: str
    gguf_file: str | None = None
    revision: str | None = None
    rotation: str = "drop"  # or "keep", also in the trained model; `heal.anneal` begins with it in any case
    calibrate: dict | None = None  # fields of CalibrationOptions; the text is that of the training, if not set
    config: dict = field(default_factory=dict)  # fields of FireConfig that differ from the converted model's

    def __post_init__(self):
        if self.rotation not in ("drop", "keep"):
            raise ValueError(f"`model.rotation` must be 'drop' or 'keep', got {self.rotation!r}.")
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
        contexts, num_targets = self.evaluation.contexts, self.evaluation.num_targets
        if self.data.length not in contexts:
            raise ValueError(f"`data.length` ({self.data.length}) is not among `evaluation.contexts`: {contexts}.")
        if not 1 <= num_targets <= min(contexts):
            raise ValueError(f"`evaluation.num_targets` ({num_targets}) do not fit into contexts of {contexts}.")

    @property
    def settings(self) -> dict[str, Any]:
        """All that the result depends on."""
        return {name: value for name, value in asdict(self).items() if name != "output_dir"}

    @property
    def source(self) -> dict[str, Any]:
        """Arguments of whatever reads the source, as far as they are set."""
        arguments = {"revision": self.model.revision, "gguf_file": self.model.gguf_file}
        return {name: value for name, value in arguments.items() if value is not None}
