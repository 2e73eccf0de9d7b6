"""Tests of configurations: the official values by name, and compatibility with runs of earlier versions."""

from __future__ import annotations

from dataclasses import MISSING, fields, replace

import pytest

from dermis.errors import TrainingError
from training.gan.config import BASES, GanConfig, auto_config, base_config

# config.json of a run that began before there were other discriminators, transforms and base configurations.
EARLY_RUN = {
    "resolution": 64, "c_dim": 2, "seed": 0, "batch": 8, "total_kimg": 1000.0, "z_dim": 256, "w_dim": 256,
    "mapping_layers": 2, "channel_base": 4096, "channel_max": 256, "conv_clamp": 256.0, "mbstd_group_size": 4,
    "learning_rate": 0.001, "r1_gamma": 0.1024, "r1_interval": 16, "pl_weight": 0.0, "pl_interval": 4,
    "pl_batch_shrink": 2, "pl_decay": 0.01, "style_mixing_prob": 0.9, "ema_kimg": 2.5, "ema_rampup": 0.05,
    "mirror": True, "augment": "bg", "augment_target": 0.6, "augment_p": 0.0, "augment_kimg": 100.0, "precision": "bf16",
}  # fmt: skip
EARLY_IDENTITY = {name: value for name, value in EARLY_RUN.items() if name != "total_kimg"}


def test_an_early_run_keeps_its_identity() -> None:
    config = GanConfig(**EARLY_RUN)  # type: ignore[arg-type]
    assert config.identity == EARLY_IDENTITY
    assert config.changed_from(EARLY_IDENTITY) == {}
    assert replace(config, total_kimg=5.0).changed_from(EARLY_IDENTITY) == {}
    assert GanConfig(**config.to_dict()) == config


def test_newer_options_join_run_identity_only_when_changed() -> None:
    younger = [field for field in fields(GanConfig) if field.name not in EARLY_RUN]
    assert younger and all(field.default is not MISSING for field in younger)
    plain = GanConfig(**EARLY_RUN)  # type: ignore[arg-type]
    projected = replace(plain, projected=True)
    assert projected.identity == EARLY_IDENTITY | {"projected": True}
    assert projected.changed_from(plain.identity) == {"projected": True}
    assert plain.changed_from(projected.identity) == {"projected": False}
    assert replace(plain, r1_gamma=1.0).changed_from(EARLY_IDENTITY) == {"r1_gamma": 1.0}


@pytest.mark.parametrize(
    ("name", "resolution", "values"),
    [
        # arXiv 2006.06676, appendix: the baseline for FFHQ and LSUN Cat at 256 px; feature maps 1/2 of 32768.
        ("paper256", 256, (64, 8, 16384, 0.0025, 1.0, 20.0, None, 8)),
        # arXiv 1912.04958, configuration F; full feature maps.
        ("stylegan2", 1024, (32, 4, 32768, 0.002, 10.0, 10.0, None, 8)),
        ("auto", 64, (32, 4, 16384, 0.0025, 0.0002 * 64**2 / 32, 10.0, 0.05, 2)),
        ("auto", 256, (16, 4, 16384, 0.0025, 0.8192, 5.0, 0.05, 2)),
        ("auto", 1024, (4, 4, 32768, 0.002, 0.0002 * 1024**2 / 4, 1.25, 0.05, 2)),
    ],
)
def test_named_configurations_have_the_official_values(
    name: str, resolution: int, values: tuple[float | None, ...]
) -> None:
    config = base_config(name, resolution, 2)
    assert (
        config.batch,
        config.mbstd_group_size,
        config.channel_base,
        config.learning_rate,
        pytest.approx(config.r1_gamma),
        config.ema_kimg,
        config.ema_rampup,
        config.mapping_layers,
    ) == values
    assert config.channel_max == config.z_dim == config.w_dim == 512
    assert (config.pl_weight, config.style_mixing_prob, config.r1_interval, config.pl_interval) == (2.0, 0.9, 16, 4)


@pytest.mark.parametrize("name", BASES)
def test_overrides_apply_and_none_keeps_configuration_value(name: str) -> None:
    usual = base_config(name, 256, 0)
    changed = base_config(name, 256, 0, r1_gamma=7.0, learning_rate=None, augment="bgc")
    assert changed == replace(usual, r1_gamma=7.0, augment="bgc")


def test_automatic_options_follow_given_batch() -> None:
    config = auto_config(256, 2, batch=2)
    assert (config.batch, config.mbstd_group_size, config.ema_kimg) == (2, 2, 0.625)
    assert config.r1_gamma == pytest.approx(6.5536)
    assert auto_config(64, 2) == base_config("auto", 64, 2)


@pytest.mark.parametrize("name", BASES)
def test_projected_run_has_no_gradient_penalties_by_default(name: str) -> None:
    config = base_config(name, 256, 2, projected=True)
    assert (config.r1_gamma, config.pl_weight, config.augment_target) == (0.0, 0.0, None)
    assert base_config(name, 256, 2, projected=True, pl_weight=2.0, r1_gamma=None).pl_weight == 2.0  # overrides stay


def test_invalid_configuration_value_is_refused_by_name() -> None:
    with pytest.raises(TrainingError, match="base: 'paper257' is none of auto, paper256, stylegan2"):
        base_config("paper257", 256, 0)
    with pytest.raises(TrainingError, match="augment: 'bgx'"):
        base_config("auto", 256, 0, augment="bgx")
    with pytest.raises(TrainingError, match="precision: 'fp8'"):
        base_config("auto", 256, 0, precision="fp8")
    with pytest.raises(TrainingError, match="batch: 12"):
        base_config("paper256", 256, 0, batch=12)
    assert base_config("paper256", 256, 0, batch=4).batch == 4
