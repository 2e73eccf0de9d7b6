"""Options by name: from "name=value", TOML files and Flower's tables to the checked values of a configuration.

A configuration is a dataclass. Each value is checked against the type of its field by pydantic, without conversion: a text
is never read as a number. Integers are accepted for floats, and texts for paths; nothing else is converted.
"""

from __future__ import annotations

import tomllib
from collections.abc import Collection, Mapping, Sequence
from dataclasses import fields
from functools import cache
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from pydantic import ConfigDict, TypeAdapter, ValidationError

from dermis.errors import TrainingError, quote

DERIVED = ("resolution", "c_dim")
"""Fields of a generator's configuration that follow from other options and from the images."""
_OTHER_OPTION = {
    "resolution": "--resolution",
    "size": "--resolution",
    "total_kimg": "--kimg or --scale",
    "seed": "--seed",
}
_EXPECTED: Mapping[object, str] = {
    bool: "true or false",
    int: "a whole number",
    float: "a number",
    str: "text",
    list: "a list",
    dict: "a table",
    Path: "a path",
}


def parse_assignments(texts: Sequence[str], where: str) -> dict[str, Any]:
    """Parse "name=value" texts. A value is written as in TOML, but texts do not need quotation marks.

    Args:
        texts: One assignment each; of two with the same name the later one counts.
        where: Begins every message, such as "--set ".

    Returns:
        Values by name, of the types that TOML gives them.

    Raises:
        TrainingError: A text has no "=".
    """
    values: dict[str, Any] = {}
    for text in texts:
        name, separator, value = (part.strip() for part in text.partition("="))
        if not separator:
            raise TrainingError(f"{where}{text}: must be option=value")
        try:
            values[name] = tomllib.loads(f"value = {value}")["value"]
        except tomllib.TOMLDecodeError:
            values[name] = value
    return values


def parse_settings(texts: Sequence[str], configuration: type, where: str = "--set ") -> dict[str, Any]:
    """Parse "option=value" texts for the configuration of a training.

    Args:
        texts: One assignment each, as for `parse_assignments`.
        configuration: The dataclass of the configuration.
        where: Begins every message.

    Returns:
        Checked values by option.

    Raises:
        TrainingError: An option is unknown, has a value of another type, or has an option of its own on the command line.
    """
    values = parse_assignments(texts, where)
    for name in values:
        if name in _OTHER_OPTION:
            raise TrainingError(f"{where}{name}: give {_OTHER_OPTION[name]}")
    return check_options(values, configuration, where, exclude=DERIVED)


def check_options(
    values: Mapping[str, Any],
    configuration: type,
    where: str = "",
    *,
    noun: str = "option",
    exclude: Collection[str] = (),
    dashes: bool = False,
) -> dict[str, Any]:
    """Check values against the fields of a configuration.

    Args:
        values: Values by name of the field.
        configuration: A dataclass.
        where: Begins every message.
        noun: Word for a name in the message about an unknown one.
        exclude: Fields that cannot be given here.
        dashes: The names in `values` have dashes instead of underscores, as in Flower's tables.

    Returns:
        The values by name of the field: whole numbers converted where the field is a float, texts where it is a path.

    Raises:
        TrainingError: A name is unknown, or a value has another type; the message names it.
    """
    kinds = {
        name.replace("_", "-") if dashes else name: (name, kind) for name, kind in field_types(configuration).items()
    }
    known = {spelling: field for spelling, field in kinds.items() if field[0] not in exclude}
    checked = {}
    for spelling, value in values.items():
        if spelling not in known:
            raise TrainingError(f"{where}{spelling}: unknown {noun}; known are {', '.join(known)}")
        name, kind = known[spelling]
        checked[name] = check_value(f"{where}{spelling}", value, kind)
    return checked


def check_choices(configuration: Any) -> None:
    """Check the fields of a dataclass object that can have a few values only.

    Raises:
        TrainingError: One has another value; the message names the field and the accepted values.
    """
    cls: type = type(configuration)
    for name, kind in field_types(cls).items():
        if get_origin(kind) is Literal:
            check_value(name, getattr(configuration, name), kind)


def check_value(name: str, value: object, kind: Any) -> Any:
    """Return `value` as the type `kind`.

    Raises:
        TrainingError: It has another type, or is not finite; the message begins with `name`.
    """
    try:
        return _adapter(kind).validate_python(value)
    except ValidationError:
        pass
    kind = _without_none(kind)
    if get_origin(kind) is Literal:
        raise TrainingError(f"{name}: {quote(value)} is none of {', '.join(map(str, get_args(kind)))}")
    raise TrainingError(f"{name}: must be {_EXPECTED[get_origin(kind) or kind]}, not {quote(value)}")


@cache
def field_types(configuration: type) -> Mapping[str, Any]:
    """Types of a dataclass's fields by name, in their order."""
    hints = get_type_hints(configuration)
    return {field.name: hints[field.name] for field in fields(configuration)}


@cache
def _adapter(kind: Any) -> TypeAdapter[Any]:
    # pydantic's strict mode refuses texts as paths.
    return TypeAdapter(kind, config=ConfigDict(strict=_without_none(kind) is not Path, allow_inf_nan=False))


def _without_none(kind: Any) -> Any:
    """The type T of `T | None`; every other type as it is."""
    if get_origin(kind) not in (Union, UnionType):
        return kind
    (kind,) = [each for each in get_args(kind) if each is not NoneType]
    return kind
