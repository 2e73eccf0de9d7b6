"""Tests of the experiment with black frames: arms differ only in the frame, a planted effect is measured, the run resumes."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from dermis.artefacts import Artefacts
from dermis.bundle import amend_bundle
from dermis.bundle.directions import Direction
from dermis.directions.edit import Edit, offset_of
from dermis.directions.fit import oriented
from dermis.errors import RequestError, TrainingError
from dermis.synthesizer import Synthesizer
from tiny import make_bundle
from tiny_skin import make_skin
from training.classifier.config import ClassifierConfig
from training.classifier.data import RealPart, load_real
from training.experiments import frame_removal
from training.experiments.edge_case_runs import TrainedRun
from training.experiments.frame_removal import (
    ARMS,
    FramePlan,
    FrameRemovalResults,
    compare,
    run_frame_removal,
    write_results,
)

N = 400


def planted() -> tuple[RealPart, FrameRemovalResults]:
    """Where there is a frame, `removed` is right more often; elsewhere all arms have the same predictions."""
    labels = (np.arange(N) % 5 == 0).astype(np.int64)
    framed = np.arange(N) % 4 == 0
    images = np.zeros((N, 1, 1, 3), np.uint8)
    names = tuple(map(str, range(N)))
    part = RealPart(images, labels, names, tuple(str(i // 2) for i in range(N)), {}, "0")

    def run(seed: int, gain: float) -> TrainedRun:
        logits = np.random.default_rng(seed).normal(size=N) + np.where(framed, gain, 1.0) * (2 * labels - 1)
        return TrainedRun(None, 0.0, 1.0, 0.5, 1 / (1 + np.exp(-logits)))  # type: ignore[arg-type]

    runs = {arm: [run(seed, 1.0 if arm == "removed" else 0.0) for seed in range(3)] for arm in ARMS}
    return part, FrameRemovalResults(runs, framed, 1000)


def test_gain_is_measured_only_on_planted_framed_images(tmp_path: Path) -> None:
    part, measured = planted()
    comparison = compare(part, measured, replicates=200)
    assert {name: row["images"] for name, row in comparison.items()} == {
        "all": 400,
        "with a frame": 100,
        "without": 300,
    }
    for metric in ("auc", "balanced_accuracy"):
        assert comparison["with a frame"][f"{metric} removed - framed"]["low"] > 0
        assert comparison["without"][f"{metric} removed - framed"] == {"value": 0.0, "low": 0.0, "high": 0.0}
    plan = FramePlan("x", -1.0, 1.0, per_class=10)
    text = write_results(tmp_path, part, measured, plan)
    assert "20 of 1,000 latents" in text and "| with a frame: 100, 20 malignant | AUC |" in text
    assert json.loads((tmp_path / "results.json").read_text())["paper_accuracy"] == 0.87


@pytest.fixture
def bundle_and_skin(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[str, Path, float]:
    """A tiny bundle, real images, and the strength that makes its images "framed": brighter than the middle."""
    direction = Direction("light", oriented(np.eye(16)[0]), (0, 6), 1.0, "sefa")
    bundle = amend_bundle(make_bundle(tmp_path / "tiny"), directions=[direction])
    ends = []
    with Synthesizer(bundle, device="cpu", threads=1) as synthesizer:
        for by in (-15.0, 15.0):
            offset = offset_of([Edit("light", by)], {"light": direction}, num_ws=6, w_dim=16)
            ends.append(synthesizer.images([0] * 64, range(64), [0] * 64, offset=offset).mean(axis=(1, 2, 3)))
    middle = float(np.median(np.concatenate(ends)))

    def bright(image: NDArray[np.uint8]) -> Artefacts:
        return Artefacts(float(image.mean() >= middle), 0.0, 0.0, 0.0)

    monkeypatch.setattr(frame_removal, "detect_artefacts", bright)
    make_skin(tmp_path / "skin")
    return bundle.location, tmp_path / "skin", 15.0 if ends[1].mean() > ends[0].mean() else -15.0


@pytest.mark.full
def test_arms_share_latents_and_differ_in_frame(bundle_and_skin: tuple[str, Path, float], tmp_path: Path) -> None:
    from dermis.bundle import open_bundle

    location, skin, framing = bundle_and_skin
    bundle = open_bundle(location)
    config = ClassifierConfig(
        architecture="mobilenetv3_small_050", size=32, epochs=1, batch=8, rotation=0, flips=False, head_only=True
    )
    real = load_real(skin, 32, cache=tmp_path / "cache", progress=False)
    plan = FramePlan("light", framing, -framing, per_class=12, seeds=1)

    def run(plan: FramePlan) -> FrameRemovalResults | None:
        return run_frame_removal(
            real,
            bundle,
            config,
            plan,
            tmp_path / "out",
            weights="none",
            device="cpu",
            target=torch.device("cpu"),
            cache=tmp_path / "cache",
            progress_bar=False,
        )

    first = run(plan)
    assert first is not None and first.tried >= 24
    arrays = {arm: np.load(tmp_path / "out" / "drawn" / f"{arm}-malignant.npy") for arm in ARMS}
    assert {array.shape for array in arrays.values()} == {(12, 32, 32, 3)}
    brightness = {arm: array.mean(axis=(1, 2, 3)) for arm, array in arrays.items()}
    assert (brightness["framed"] > brightness["removed"]).all()  # latent by latent
    times = {path: path.stat().st_mtime_ns for path in (tmp_path / "out").rglob("*.npy")}
    second = run(replace(plan, seeds=2))
    assert second is not None and len(second.runs["plain"]) == 2
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "out").rglob("*.npy")} == times
    assert np.array_equal(second.runs["framed"][0].calibrated, first.runs["framed"][0].calibrated)
    with pytest.raises(TrainingError, match="other settings"):
        run(replace(plan, removing=0.5))


def test_unknown_or_ineffective_frame_direction_is_refused(
    bundle_and_skin: tuple[str, Path, float], tmp_path: Path
) -> None:
    from dermis.bundle import open_bundle

    location, skin, framing = bundle_and_skin
    real = load_real(skin, 32, cache=tmp_path / "cache", progress=False)
    config = ClassifierConfig(architecture="mobilenetv3_small_050", size=32, epochs=1)

    def run(plan: FramePlan) -> None:
        run_frame_removal(
            real,
            open_bundle(location),
            config,
            plan,
            tmp_path / plan.direction,
            weights="none",
            device="cpu",
            target=torch.device("cpu"),
            cache=tmp_path / "cache",
            progress_bar=False,
        )

    with pytest.raises(RequestError, match="unknown"):
        run(FramePlan("north", 1.0, -1.0, per_class=10))
    with pytest.raises(TrainingError, match="--framed"):
        run(FramePlan("light", framing, framing, per_class=10))  # it adds frames, but does not remove them
