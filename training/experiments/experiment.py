"""One experiment: which classes, conditional or not, which configuration, and the numbers that its source reports.

    title = "cGAN w/o color"             name in tables
    source = "arXiv 2208.11702, table 1" where it comes from
    classes = ["benign", "malignant"]    images of other classes are left out
    conditional = true                   one label for each class
    base = "auto"                        auto, paper256 or stylegan2
    resolution = 256                     pixels, a power of two
    [options]                            further fields of GanConfig
    [reported]                           optional: kid_percent, fid, precision, recall, ppl

The five experiments of arXiv 2208.11702 are the TOML files of this folder. Their authors ran the official code at 256 px;
base, length and mirroring are defaults and examples of that code.
"""

from __future__ import annotations

import tomllib
from collections.abc import Mapping
from dataclasses import MISSING, dataclass, field, fields
from pathlib import Path
from typing import Any

from dermis.errors import TrainingError, escape, quote
from training.gan.config import BASES, GanConfig, base_config
from training.options import DERIVED, check_options, check_value

TABLE1 = ("ben-gan", "mal-gan", "cgan", "cgan-no-color", "cgan-no-augmentation")
REPORTED = ("kid_percent", "fid", "precision", "recall", "ppl")
_FOLDER = Path(__file__).parent


@dataclass(frozen=True)
class _ExperimentFile:
    """Keys of a file, with the types of their values."""

    title: str
    source: str
    classes: list[Any]
    conditional: bool
    base: str
    resolution: int
    options: dict[str, Any] = field(default_factory=dict)
    reported: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Experiment:
    """A checked experiment file.

    Attributes:
        name: The file's name without its suffix.
        options: Further fields of `GanConfig`.
        reported: The numbers that the source reports, by metric; those that it does not report are missing.
    """

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
        """Return the configuration of a run. `overrides` are fields of `GanConfig` that replace the file's, unless None."""
        options = {option: value for option, value in overrides.items() if value is not None}
        c_dim = len(self.classes) if self.conditional else 0
        return base_config(self.base, resolution or self.resolution, c_dim, **{**self.options, **options})


def experiment_names() -> tuple[str, ...]:
    """Names of the experiments that come with dermis."""
    return tuple(sorted(path.stem for path in _FOLDER.glob("*.toml")))


def read_experiment(name_or_path: str | Path) -> Experiment:
    """Read an experiment by its name or from a file.

    Raises:
        TrainingError: There is no such experiment, or the file is wrong; the message names the file and the key.
    """
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


def _parse(path: Path, content: Mapping[str, Any]) -> Experiment:
    values = check_options(content, _ExperimentFile, f"{path}: ", noun="key")
    for key in fields(_ExperimentFile):
        if key.name not in values and key.default_factory is MISSING:
            raise TrainingError(f"{path}: {key.name}: is missing")
    file = _ExperimentFile(**values)
    classes = file.classes
    if not classes or not all(isinstance(name, str) and name for name in classes) or len(set(classes)) < len(classes):
        raise TrainingError(f"{path}: classes: must be different class names, not {quote(classes)}")
    if file.conditional and len(classes) < 2:
        raise TrainingError(f"{path}: conditional: needs at least two classes")
    if file.base not in BASES:
        raise TrainingError(f"{path}: base: {quote(file.base)} is none of {', '.join(BASES)}")

    experiment = Experiment(
        name=path.stem,
        title=file.title,
        source=file.source,
        classes=tuple(classes),
        conditional=file.conditional,
        base=file.base,
        resolution=file.resolution,
        options=check_options(file.options, GanConfig, f"{path}: options.", exclude=DERIVED),
        reported=_reported(path, file.reported),
    )
    try:
        config = experiment.config()
        _ = config.generator, config.discriminator
    except (TrainingError, ValueError) as error:
        raise TrainingError(f"{path}: {error}") from None
    return experiment


def _reported(path: Path, reported: Mapping[str, Any]) -> dict[str, float]:
    for name in reported:
        if name not in REPORTED:
            raise TrainingError(f"{path}: reported.{name}: unknown metric; known are {', '.join(REPORTED)}")
    return {
        name: check_value(f"{path}: reported.{name}", reported[name], float) for name in REPORTED if name in reported
    }
