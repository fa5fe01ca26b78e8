"""How the YAML of a run is read, changed and checked."""

import argparse
import dataclasses
import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from difflib import get_close_matches
from pathlib import Path
from typing import Any, TypeVar

import yaml

from modeling_fire.errors import FULL_DISK as SYSTEM_FULL_DISK
from modeling_fire.errors import FireError


Fields = TypeVar("Fields")


# What is said of a file that cannot be written to its end: by the system; and by torch.save, of whatever the cause.
FULL_DISK = (*SYSTEM_FULL_DISK, "PytorchStreamWriter failed", "unexpected pos ")


class SettingsError(FireError):
    """Settings that are wrong, or do not fit the data. The message says what to change."""


@contextmanager
def one_line_errors() -> Iterator[None]:
    """Ends the program with one line where its input is at fault, or the disk is full."""
    try:
        yield
    except FireError as error:
        raise SystemExit(f"Error: {' '.join(str(error).split())}") from error
    except Exception as error:
        if not any(sign in str(error) for sign in FULL_DISK):
            raise
        raise SystemExit(
            f"Error: the disk takes no more ({' '.join(str(error).split())}). What was finished is whole: free some "
            "room and run the same command again."
        ) from error


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


def check_names(fields_class: type, values: Iterable[str], where: str, also: Iterable[str] = ()) -> None:
    """
    What some classes would pass over in silence.

    Args:
        fields_class (`type`): a dataclass.
        values (iterable of `str`): names that are meant for its fields.
        where (`str`): what holds them, for the message.
        also (iterable of `str`): what may be among them besides.

    Raises:
        SettingsError: if one is unknown; the message has names that are near to it.
    """
    known = {each.name for each in dataclasses.fields(fields_class)} | set(also)
    for name in values:
        if name not in known:
            near = ", ".join(f"`{each}`" for each in get_close_matches(name, sorted(known)))
            meant = f" Did you mean {near}?" if near else ""
            raise SettingsError(f"{fields_class.__name__} has no field `{name}` (in `{where}`).{meant}")
