"""Tests of the records of a run: the log, curves, measurements and the best snapshot."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from dermis import features
from dermis.bundle import load_discriminator, load_generator, open_bundle
from dermis.errors import TrainingError
from dermis.features import FeatureExtractor
from training.data.images import ImageDataset
from training.gan.batches import batches
from training.gan.best import Measurements
from training.gan.config import GanConfig, auto_config
from training.gan.loop import train
from training.gan.snapshot import GeneratorOrigin, write_snapshot
from training.gan.state import GanProgress, new_state, set_learning_rates
from training.gan.training_log import TrainingLog

CPU = torch.device("cpu")
ORIGIN = GeneratorOrigin("moles", "folder", "CC0-1.0", "nobody")


@pytest.fixture
def colours(monkeypatch: pytest.MonkeyPatch) -> None:
    """A feature space that needs no network: an image's mean colour and its spread."""

    def extract(images: np.ndarray) -> np.ndarray:
        x = images.astype(np.float32).reshape(len(images), -1, 3) / 255
        return np.concatenate([x.mean(1), x.std(1)], axis=1)

    space = FeatureExtractor("colours", "colours/1", 6, extract)
    monkeypatch.setitem(features.EXTRACTORS, "colours", lambda device: space)


def _dataset(count: int = 16) -> ImageDataset:
    images = np.random.default_rng(0).integers(100, 256, (count, 8, 8, 3), dtype=np.uint8)
    return ImageDataset(images, np.arange(count) % 2, ("a", "b"), tuple(map(str, range(count))), "0" * 64)


def _config(kimg: float) -> GanConfig:
    return auto_config(8, 2, total_kimg=kimg, z_dim=8, w_dim=8, channel_base=64, channel_max=8, batch=4)


def _lines(file: Path) -> Iterator[dict[str, float]]:
    return map(json.loads, file.read_text().splitlines())


def test_batches_reshuffle_each_epoch_and_start_at_any_position() -> None:
    dataset = _dataset()
    dataset.images[:, 0, 0, 0] = np.arange(16)  # every image carries its number

    def stream(start: int, count: int) -> list[int]:
        source = batches(dataset, replace(_config(1.0), seed=3), start)
        first_batches = [next(source) for _ in range(count)]
        source.close()
        numbers = [int(image[0, 0, 0]) for batch in first_batches for image in batch.images]
        assert [number % 2 for number in numbers] == [label for batch in first_batches for label in batch.labels]
        return numbers

    whole = stream(0, 8)
    assert sorted(whole[:16]) == sorted(whole[16:]) == list(range(16)) and whole[:16] != whole[16:]
    assert stream(12, 5) == whole[12:]  # across the border of two epochs


def test_balanced_batches_show_a_rare_class_as_often_as_the_others() -> None:
    rare = replace(_dataset(), labels=np.array([1] * 2 + [0] * 14))
    for balance, share in ((0.0, 1 / 8), (0.5, 2**0.5 / (2**0.5 + 14**0.5)), (1.0, 1 / 2)):
        source = batches(rare, replace(_config(1.0), class_balance=balance), 0)
        shown = np.concatenate([next(source).labels for _ in range(1000)])
        source.close()
        assert shown.mean() == pytest.approx(share, abs=0.03)


def test_learning_rate_falls_to_its_final_value_and_survives_a_stop(tmp_path: Path) -> None:
    schedule = {"learning_rate": 0.004, "final_learning_rate": 0.001, "learning_rate_kimg": 0.016, "pl_weight": 2.0}
    config = replace(_config(0.012), **schedule)
    state = new_state(config, CPU)
    rates = []
    for nimg in (0, 4, 8, 12, 16, 400):
        state.progress.nimg = nimg
        set_learning_rates(state, config)
        rates.append(state.G_opt.param_groups[0]["lr"] * (config.pl_interval + 1) / config.pl_interval)
    assert rates == pytest.approx([0.004 * 0.25 ** min(nimg / 16, 1) for nimg in (0, 4, 8, 12, 16, 400)])
    train(_dataset(), replace(config, total_kimg=0.024), tmp_path / "whole", device=CPU, progress_bar=False)
    for total_kimg in (0.012, 0.024):
        longer = replace(config, total_kimg=total_kimg)
        train(_dataset(), longer, tmp_path / "parts", device=CPU, resume=True, progress_bar=False)
    whole, parts = (load_file(tmp_path / name / "checkpoint.safetensors") for name in ("whole", "parts"))
    assert all(torch.equal(parts[name], value) for name, value in whole.items())
    with pytest.raises(TrainingError, match="learning_rate_kimg: give both"):
        replace(config, learning_rate_kimg=0.0)


def test_log_of_a_crashed_run_is_cut_back_to_its_checkpoint(tmp_path: Path) -> None:
    train(_dataset(), _config(0.012), tmp_path, device=CPU, progress_bar=False)
    before = (tmp_path / "log.jsonl").read_text()
    with (tmp_path / "log.jsonl").open("a") as log:
        log.write('{"nimg": 16, "G": 1.0}\n{"nimg": 20, "G')
    train(_dataset(), _config(0.020), tmp_path, device=CPU, resume=True, progress_bar=False)
    assert (tmp_path / "log.jsonl").read_text().startswith(before)
    assert [line["nimg"] for line in _lines(tmp_path / "log.jsonl")] == [4, 8, 12, 16, 20]


def test_non_finite_numbers_are_left_out_of_log(tmp_path: Path) -> None:
    with TrainingLog(tmp_path, 0) as journal:
        journal.write(GanProgress(nimg=4), {"G": 1.0, "G_gradient": float("inf")})
    assert list(_lines(tmp_path / "log.jsonl")) == [{"nimg": 4, "seconds": 0.0, "G": 1.0}]


@pytest.mark.usefixtures("colours")
def test_best_snapshot_is_kept_with_its_numbers(tmp_path: Path) -> None:
    """A generator of the data's mean colour, then one of black: the first stays the best, also after a restart."""
    dataset, config = _dataset(), _config(0.016)

    def callback() -> object:
        measurements = Measurements(dataset, "fid", 0.008, 6, CPU, "colours")
        return write_snapshot(dataset, config, ORIGIN, CPU, measurements=measurements)

    state, write = new_state(config, CPU), callback()
    for nimg, level in ((4, 0.4), (8, 0.4), (12, -5.0), (16, -5.0)):
        if nimg == 12:
            write = callback()
        state.progress.nimg = nimg
        for name, parameter in state.G_ema.named_parameters():
            if name.endswith("torgb.bias"):
                parameter.fill_(level / 2)
        write(tmp_path, state)  # type: ignore[operator]
    measured = list(_lines(tmp_path / "metrics.jsonl"))
    assert [line["nimg"] for line in measured] == [8, 16]  # not at 4: too early; nor at 12
    assert measured[0]["fid"] < measured[1]["fid"]
    best, last = open_bundle(tmp_path / "best"), open_bundle(tmp_path / "bundle")
    assert best.provenance["kimg"] == 0.008 and last.provenance["kimg"] == 0.016
    assert best.metrics["fid"] == measured[0]["fid"] and last.metrics["fid"] == measured[1]["fid"]
    assert "FD@colours" in best.model_card
    assert load_generator(best).get_parameter("synthesis.b8.torgb.bias")[0] == pytest.approx(0.2, abs=1e-3)


@pytest.mark.full
@pytest.mark.usefixtures("colours")
@pytest.mark.parametrize(
    ("noise", "better"), [({}, True), ({"noise_mode": "const"}, True), ({"noise_mode": "random"}, False)]
)
def test_measurements_with_other_noise_are_not_compared(tmp_path: Path, noise: dict[str, str], better: bool) -> None:
    """A line with an unbeatable distance keeps later snapshots from being the best only if it had the same noise."""
    state = new_state(_config(0.008), CPU)
    state.progress.nimg = 8
    write_snapshot(_dataset(), _config(0.008), ORIGIN, CPU)(tmp_path, state)
    (tmp_path / "metrics.jsonl").write_text(json.dumps({"nimg": 4, "fid": -1.0} | noise) + "\n")
    measurements = Measurements(_dataset(), "fid", 0.004, 6, CPU, "colours")
    _, best = measurements.record(tmp_path, GanProgress(nimg=8), tmp_path / "bundle")
    assert best is better
    assert list(_lines(tmp_path / "metrics.jsonl"))[1]["noise_mode"] == "random"


def test_stopped_run_is_not_measured_and_stale_lines_are_dropped(tmp_path: Path) -> None:
    measurements = Measurements(_dataset(), "fid", 0.008, 6, CPU)
    (tmp_path / "metrics.jsonl").write_text('{"nimg": 8, "fid": 2.0}\n{"nimg": 20, "fid": 1.0}\n')
    assert not measurements.due(tmp_path, GanProgress(nimg=16, stopped=True), 1.0)
    assert measurements.due(tmp_path, GanProgress(nimg=16), 1.0)
    assert [line["nimg"] for line in _lines(tmp_path / "metrics.jsonl")] == [8]
    with pytest.raises(TrainingError, match="--metric"):
        Measurements(_dataset(), "beauty", 50.0, 2000, CPU)


def test_bundle_may_hold_the_discriminator(tmp_path: Path) -> None:
    config, state = _config(0.004), new_state(_config(0.004), CPU)
    state.progress.nimg = 4
    write_snapshot(_dataset(), config, ORIGIN, CPU, with_discriminator=True)(tmp_path, state)
    stored = load_discriminator(open_bundle(tmp_path / "bundle")).state_dict()
    for name, value in state.D.state_dict().items():
        assert torch.allclose(stored[name], value, rtol=1e-3, atol=1e-6), name
    with pytest.raises(TrainingError, match="--with-discriminator"):
        write_snapshot(_dataset(), replace(config, projected=True), ORIGIN, CPU, with_discriminator=True)


def test_training_writes_curves_and_grids_for_tensorboard(tmp_path: Path) -> None:
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    dataset, config = _dataset(), _config(0.164)
    write = write_snapshot(dataset, config, ORIGIN, CPU)
    train(dataset, config, tmp_path, device=CPU, on_snapshot=write, loggers=["tensorboard"], progress_bar=False)
    events = accumulator.EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    tags = events.Tags()
    assert {"loss/G", "loss/D", "loss/r1", "gradient/D", "augmentation/p"} <= set(tags["scalars"])
    assert [point.step for point in events.Scalars("loss/G")] == [80, 160]
    assert events.Scalars("speed/images per second")[0].value > 0
    pictures = {picture.step: picture.encoded_image_string for picture in events.Images("samples")}
    assert pictures.keys() == {0, 164} and pictures[164] == (tmp_path / "samples-000000.png").read_bytes()
    assert all(b"digitalsourcetype/trainedAlgorithmicMedia" in png for png in pictures.values())
