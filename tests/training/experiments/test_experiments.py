"""Tests of experiment files: the paper's five have its values, and an invalid file is refused with its name and key."""

from __future__ import annotations

from pathlib import Path

import pytest

from dermis.errors import TrainingError
from training.experiments.experiment import TABLE1, experiment_names, read_experiment

GOOD = """
title = "A"
source = "nobody"
classes = ["benign", "malignant"]
conditional = true
base = "auto"
resolution = 64
[options]
total_kimg = 3
augment = "bg"
[reported]
fid = 7
"""


def test_the_five_experiments_are_those_of_the_paper() -> None:
    assert set(TABLE1) == set(experiment_names())
    experiments = [read_experiment(name) for name in TABLE1]
    configs = [experiment.config() for experiment in experiments]
    assert [e.title for e in experiments] == [
        "ben-GAN", "mal-GAN", "cGAN", "cGAN w/o color", "cGAN w/o augmentation",
    ]  # fmt: skip
    assert [e.classes for e in experiments[:2]] == [("benign",), ("malignant",)]
    assert all(e.classes == ("benign", "malignant") for e in experiments[2:])
    assert [config.c_dim for config in configs] == [0, 0, 2, 2, 2]
    assert [config.augment for config in configs] == ["bgc", "bgc", "bgc", "bg", "none"]
    assert all(config.resolution == 256 and config.augment_target == 0.6 for config in configs)
    columns = ("kid_percent", "fid", "precision", "recall", "ppl")
    assert [tuple(e.reported.get(column) for column in columns) for e in experiments] == [
        (0.42, 7.99, 0.77, 0.45, 60),
        (0.47, 15.46, 0.62, 0.40, 51),
        (0.32, 7.33, 0.75, 0.42, 193),
        (0.24, 7.02, 0.75, 0.44, 101),
        (None,) * 5,
    ]


def test_overrides_replace_values_of_experiment_file(tmp_path: Path) -> None:
    path = tmp_path / "mine.toml"
    path.write_text(GOOD)
    experiment = read_experiment(path)
    assert (experiment.name, experiment.reported) == ("mine", {"fid": 7.0})
    assert experiment.config().total_kimg == 3.0
    config = experiment.config(resolution=16, total_kimg=0.5, augment=None)
    assert (config.resolution, config.total_kimg, config.augment) == (16, 0.5, "bg")


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ('title = "A"', "", "title: is missing"),
        ('title = "A"', "title = 3", "title: must be text, not 3"),
        ('title = "A"', 'titel = "A"', "titel: unknown key"),
        ("conditional = true", "conditional = 1", "conditional: must be true or false, not 1"),
        ('["benign", "malignant"]', '["benign"]', "conditional: needs at least two classes"),
        ('["benign", "malignant"]', '["benign", "benign"]', "classes: must be different"),
        ('["benign", "malignant"]', "[]", "classes: must be different"),
        ('base = "auto"', 'base = "car"', "base: 'car' is none of auto, paper256, stylegan2"),
        ("resolution = 64", "resolution = 60", "img_resolution must be a power of two"),
        ("resolution = 64", 'resolution = "64"', "resolution: must be a whole number, not '64'"),
        ("total_kimg = 3", "total_kmg = 3", "options.total_kmg: unknown option"),
        ("total_kimg = 3", "total_kimg = true", "options.total_kimg: must be a number, not True"),
        ("total_kimg = 3", "total_kimg = nan", "options.total_kimg: must be a number, not nan"),
        ("total_kimg = 3", "batch = 8.5", "options.batch: must be a whole number, not 8.5"),
        ("total_kimg = 3", "resolution = 32", "options.resolution: unknown option"),
        ('augment = "bg"', 'augment = "bgx"', "augment: 'bgx' is none of"),
        ("fid = 7", "fd = 7", "reported.fd: unknown metric"),
        ("fid = 7", 'fid = "7"', "reported.fid: must be a number"),
        ("fid = 7", "fid = ", "not a TOML file"),
    ],
)
def test_wrong_experiment_file_is_refused_by_file_and_key(tmp_path: Path, old: str, new: str, message: str) -> None:
    path = tmp_path / "wrong.toml"
    path.write_text(GOOD.replace(old, new))
    with pytest.raises(TrainingError) as caught:
        read_experiment(path)
    assert str(caught.value).startswith(f"{path}: ") and message in str(caught.value)


def test_unknown_experiment_error_lists_known_names() -> None:
    with pytest.raises(TrainingError, match=r"cgam: no such file, and no experiment of that name \(ben-gan, .*mal-gan"):
        read_experiment("cgam")
