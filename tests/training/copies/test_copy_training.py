"""Tests of the training of copy detectors."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path

import numpy as np
import pytest

from dermis.authenticity.copy_network import REGIONS
from dermis.authenticity.transformations import JOINS
from dermis.errors import TrainingError
from dermis.files import try_lock
from kept_logger import keep_curves
from tiny_copies import KNOWN, SIDE, colour_fields, dataset, make_detector
from training.copies.config import CopiesConfig
from training.copies.measure import changed_copies
from training.copies.run import train_copy_detector
from training.copies.views import views_of

pytest.importorskip("faiss", reason="FAISS is not installed")


@pytest.mark.full
def test_stopped_and_resumed_training_gives_same_bytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    known = colour_fields(0, KNOWN)
    whole = make_detector(tmp_path / "whole", known, steps=4)
    others = dataset(colour_fields(10_000, 200), "other")
    config = CopiesConfig(steps=4, batch=8, size=SIDE)
    run = partial(train_copy_detector, config=config, out=tmp_path / "parts", measured=20, device="cpu")
    calls = 0

    def interrupted(*arguments: object) -> object:
        nonlocal calls
        calls += 1
        if calls == 3:
            raise KeyboardInterrupt
        return views_of(*arguments)  # type: ignore[arg-type]

    monkeypatch.setattr("training.copies.loop._SAVE_SECONDS", -1.0)
    monkeypatch.setattr("training.copies.loop.views_of", interrupted)
    with pytest.raises(KeyboardInterrupt):
        run(dataset(known, "known"), others)
    monkeypatch.undo()
    with pytest.raises(TrainingError, match="--resume"):
        run(dataset(known, "known"), others)
    with pytest.raises(TrainingError, match="other images"):
        run(dataset(known, "else"), others, resume=True)
    parts = run(dataset(known, "known"), others, resume=True)
    assert parts is not None
    for name in ("network.safetensors", "references.npy"):
        assert (parts.folder / name).read_bytes() == (whole.folder / name).read_bytes()


@pytest.mark.full
def test_finished_run_can_be_made_longer(tmp_path: Path) -> None:
    known = colour_fields(0, KNOWN)
    short = make_detector(tmp_path, known, steps=2).description
    longer = make_detector(tmp_path, known, resume=True, steps=3).description
    assert longer.provenance["schedules"] == [[0, 2], [2, 3]]
    assert longer.files["network.safetensors"] != short.files["network.safetensors"]
    with pytest.raises(TrainingError, match="batch"):
        make_detector(tmp_path, known, resume=True, steps=3, batch=4)


@pytest.mark.full
def test_training_lowers_the_loss_and_logs_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    kept = keep_curves(monkeypatch, "training.copies.loop")
    trained = make_detector(tmp_path, colour_fields(0, KNOWN), loggers=["tensorboard"], steps=20, batch=16)
    rows = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert rows[-1]["whole"] < rows[0]["whole"]
    assert [(values["loss/whole"], step) for values, step in kept.points] == [
        (row["whole"], row["step"]) for row in rows
    ]
    assert kept.options["steps"] == 20 and kept.closed and kept.points[0][0]["learning_rate"] > 0
    measured = trained.description.metrics
    assert measured["measured_on"] == "calibration"
    assert measured["training"]["false_alarms"] <= 0.02
    assert measured["training"]["found"]["unchanged"] >= 0.4


def test_views_name_the_image_that_each_region_shows() -> None:
    images = np.stack([np.full((32, 32, 3), value, np.uint8) for value in (0, 80, 160, 240)])
    views = views_of(images, np.array([0, 3, 2, 1]), np.random.default_rng(0))
    assert views.pixels.shape == (4, 32, 32, 3)
    joined = np.flatnonzero(views.second >= 0)
    assert len(joined) == 2
    for row in joined:
        halves = np.flatnonzero(views.weights[row, 1:]) + 1
        assert {REGIONS[k] for k in halves} in ({"upper", "lower"}, {"left", "right"})
        assert set(views.targets[row, halves]) == {views.targets[row, 0], views.second[row]}
    for row in set(range(4)) - set(joined):
        assert (views.targets[row] == [0, 3, 2, 1][row]).all()


def test_training_images_are_joined_with_new_ones() -> None:
    known, others = (np.full((30, 16, 16, 3), value, np.uint8) for value in (0, 200))
    copies = dict(changed_copies(known, others, 20, seed=0))
    for join in JOINS:
        joined = copies[f"{join} with a new image"]
        assert len(joined) == 20 and all({0, 200} <= set(np.unique(image)) for image in joined)
        assert copies[f"{join}, of two training images"].max() == 0


@pytest.mark.parametrize(
    ("known", "others", "message"),
    [(99, 200, "data: 99 images"), (KNOWN, 199, "calibration: 199 images"), (KNOWN, 200, "also in --data")],
)
def test_unusable_images_are_refused_by_name(tmp_path: Path, known: int, others: int, message: str) -> None:
    name = "other" if others == 199 or known == 99 else "known"
    with pytest.raises(TrainingError, match=message):
        train_copy_detector(
            dataset(colour_fields(0, known), "known"),
            dataset(colour_fields(10_000, others), name),
            CopiesConfig(steps=1),
            tmp_path,
            device="cpu",
        )
    assert not list(tmp_path.iterdir())


def test_second_training_in_a_folder_is_refused(tmp_path: Path) -> None:
    lock = try_lock(tmp_path / "lock")
    assert lock is not None
    with pytest.raises(TrainingError, match="another training"):
        make_detector(tmp_path, colour_fields(0, KNOWN))
    lock.release()
