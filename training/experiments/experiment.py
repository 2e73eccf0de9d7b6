"""One experiment: which classes, conditional or not, which configuration, and what was reported of it.

    title = "cGAN w/o color"             how tables name it
    source = "arXiv 2208.11702, table 1" where it comes from
    classes = ["benign", "malignant"]    images of other classes take no part
    conditional = true                   learn one label a class
    base = "auto"                        auto, paper256 or stylegan2
    resolution = 256                     pixels, a power of two
    [options]                            further fields of GanConfig
    [reported]                           optional: kid_percent, fid, precision, recall, ppl

The five experiments of arXiv 2208.11702 lie beside this file. They ran the official code at 256 px; base, length and
mirroring are that code's own defaults and examples.
"""

from __future__ import annotations

import math
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from dermis.errors import TrainingError, escape, quote
from training.gan.config import BASES, GanConfig, base_config

TABLE1 = ("ben-gan", "mal-gan", "cgan", "cgan-no-color", "cgan-no-augmentation")
REPORTED = ("kid_percent", "fid", "precision", "recall", "ppl")
_FOLDER = Path(__file__).parent
_KEYS: dict[str, type] = {
    "title": str,
    "source": str,
    "classes": list,
    "conditional": bool,
    "base": str,
    "resolution": int,
    "options": dict,
    "reported": dict,
}
_OPTIONAL = {"options", "reported"}
_OWN_OPTION = {
    "resolution": "--resolution",
    "size": "--resolution",
    "total_kimg": "--kimg or --scale",
    "seed": "--seed",
}
_WANTED: dict[type, str] = {
    str: "text",
    list: "a list",
    bool: "true or false",
    int: "a whole number",
    float: "a number",
    dict: "a table",
}


@dataclass(frozen=True)
class Experiment:
    """What a file says. `name` is the file's, without its ending; `reported` holds only what the source reports."""

    name: str
    title: str
    source: str
    classes: tuple[str, ...]
    conditional: bool
    base: str
    resolution: int
    options: Mapping[str, Any]
    reported: Mapping[str, float]

    def config(self, *, resolution: int | None = None, **overrides: Any) -> GanConfig:
        """The run's configuration. `overrides` are GanConfig fields that win over the file's; None leaves one to it."""
        given = {option: value for option, value in overrides.items() if value is not None}
        c_dim = len(self.classes) if self.conditional else 0
        return base_config(self.base, resolution or self.resolution, c_dim, **{**self.options, **given})


def experiment_names() -> tuple[str, ...]:
    """Experiments that come with dermis."""
    return tuple(sorted(path.stem for path in _FOLDER.glob("*.toml")))


def read_experiment(name_or_path: str | Path) -> Experiment:
    """An experiment by its name or from a file. TrainingError names the file and the key that is wrong."""
    path = Path(name_or_path)
    if str(name_or_path) in experiment_names():
        path = _FOLDER / f"{name_or_path}.toml"
    try:
        content = tomllib.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, IsADirectoryError):
        names = ", ".join(experiment_names())
        raise TrainingError(f"{name_or_path}: no such file, and no experiment of that name ({names})") from None
    except OSError as error:
        raise TrainingError(f"{path}: cannot be read ({error.strerror})") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise TrainingError(f"{path}: not a TOML file ({escape(error)})") from None
    return _parse(path, content)


def checked_options(options: Mapping[str, Any], where: str, of: type[Any] = GanConfig) -> dict[str, Any]:
    """Fields of a configuration class, of the right type; whole numbers pass for real ones.

    TrainingError: `where`, then the option.
    """
    allowed = {field.name: str(field.type) for field in fields(of) if field.name not in {"resolution", "c_dim"}}
    checked = {}
    for name, value in options.items():
        if name not in allowed:
            raise TrainingError(f"{where}{name}: unknown option; known are {', '.join(allowed)}")
        kind = {"bool": bool, "int": int, "float": float}.get(allowed[name].removesuffix(" | None"), str)
        if not (_is_number(value) if kind is float else type(value) is kind):
            raise TrainingError(f"{where}{name}: must be {_WANTED[kind]}, not {quote(value)}")
        checked[name] = kind(value)
    return checked


def parse_settings(texts: Sequence[str], of: type[Any] = GanConfig, where: str = "--set ") -> dict[str, Any]:
    """Options of a configuration class from "option=value", each checked as those of a file are.

    A value is written as in TOML, text also bare. TrainingError: `where`, then the option.
    """
    given = parse_bare(texts, where)
    for name in given:
        if name in _OWN_OPTION:
            raise TrainingError(f"{where}{name}: give {_OWN_OPTION[name]}")
    return checked_options(given, where, of)


def parse_bare(texts: Sequence[str], where: str = "--set ") -> dict[str, Any]:
    """Values by name from "name=value", as they are. TrainingError if one is not of this form."""
    given: dict[str, Any] = {}
    for text in texts:
        name, separator, value = (part.strip() for part in text.partition("="))
        if not separator:
            raise TrainingError(f"{where}{text}: must be option=value")
        try:
            given[name] = tomllib.loads(f"value = {value}")["value"]
        except tomllib.TOMLDecodeError:
            given[name] = value
    return given


def _parse(path: Path, content: Mapping[str, Any]) -> Experiment:
    for key in content:
        if key not in _KEYS:
            raise TrainingError(f"{path}: {key}: unknown key; known are {', '.join(_KEYS)}")
    for key, kind in _KEYS.items():
        if key not in content:
            if key not in _OPTIONAL:
                raise TrainingError(f"{path}: {key}: is missing")
        elif type(content[key]) is not kind:
            raise TrainingError(f"{path}: {key}: must be {_WANTED[kind]}, not {quote(content[key])}")

    classes, conditional = content["classes"], content["conditional"]
    if not classes or not all(isinstance(name, str) and name for name in classes) or len(set(classes)) < len(classes):
        raise TrainingError(f"{path}: classes: must be different class names, not {quote(classes)}")
    if conditional and len(classes) < 2:
        raise TrainingError(f"{path}: conditional: needs at least two classes")
    if content["base"] not in BASES:
        raise TrainingError(f"{path}: base: {quote(content['base'])} is none of {', '.join(BASES)}")

    experiment = Experiment(
        name=path.stem,
        title=content["title"],
        source=content["source"],
        classes=tuple(classes),
        conditional=conditional,
        base=content["base"],
        resolution=content["resolution"],
        options=checked_options(content.get("options", {}), f"{path}: options."),
        reported=_reported(path, content.get("reported", {})),
    )
    try:
        config = experiment.config()
        _ = config.generator, config.discriminator
    except (TrainingError, ValueError) as error:
        raise TrainingError(f"{path}: {error}") from None
    return experiment


def _reported(path: Path, reported: Mapping[str, Any]) -> dict[str, float]:
    for name, value in reported.items():
        if name not in REPORTED:
            raise TrainingError(f"{path}: reported.{name}: unknown metric; known are {', '.join(REPORTED)}")
        if not _is_number(value):
            raise TrainingError(f"{path}: reported.{name}: must be a number, not {quote(value)}")
    return {name: float(reported[name]) for name in REPORTED if name in reported}


def _is_number(value: object) -> bool:
    return type(value) in (int, float) and math.isfinite(value)  # type: ignore[arg-type]
