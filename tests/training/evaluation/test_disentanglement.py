"""Tests of disentanglement on a generator whose attributes are known functions of w, so all results are known."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

from commands.main import app
from dermis.artefacts import THRESHOLDS, detect_artefacts, frame_share
from dermis.bundle import amend_bundle
from dermis.bundle.directions import Direction
from dermis.errors import RequestError
from tiny import make_bundle
from tiny_classifier import make_classifier
from training.evaluation.disentanglement import (
    Measurements,
    Ws,
    best_removal,
    measure_effects,
    measure_removals,
    random_directions,
    units_of,
)

NUM_WS, W_DIM = 3, 8


def axis(k: int, scale: float = 1.0) -> Direction:
    return Direction(f"axis-{k}", np.eye(W_DIM, dtype=np.float32)[k], (0, NUM_WS), scale, "sefa")


def measure(ws: Ws) -> Measurements:
    """`linear` follows axis 0 at a slope of 2, `mixed` both axes, `even` the square of axis 1; identity turns with axis 2."""
    w = ws.mean(axis=1).astype(np.float64)
    angle = w[:, 2]
    features = np.stack([np.cos(angle), np.sin(angle)], axis=1).astype(np.float32)
    attributes = {"linear": 2 * w[:, 0], "mixed": w[:, 0] + w[:, 1], "even": w[:, 1] ** 2, "never": np.zeros(len(w))}
    return Measurements(attributes, features)


@pytest.fixture(scope="module")
def ws() -> Ws:
    rng = np.random.default_rng(0)
    return np.repeat(rng.normal(size=(400, 1, W_DIM)), NUM_WS, axis=1).astype(np.float32)


def test_effects_equal_planted_slopes_in_standard_deviations(ws: Ws) -> None:
    before = measure(ws)
    units = units_of(before)
    first, second, third, idle = measure_effects(
        ws, [axis(0, 1.5), axis(1), axis(2, 0.25), axis(5)], 2.0, before, units, measure
    )
    # A slope of 2, over a standard deviation of about 2, along 2 x 1.5: exactly this number, the same in every sample.
    assert first.shifts["linear"].value == pytest.approx(2 * 3 / before.attributes["linear"].std(ddof=1), rel=1e-4)
    assert first.shifts["linear"].minus == pytest.approx(-first.shifts["linear"].plus, rel=1e-4)
    assert first.most_moved == "linear"
    moved = {name: abs(shift.value) for name, shift in first.shifts.items()}
    assert first.share("linear") == pytest.approx(moved["linear"] / sum(moved.values()))
    assert "never" not in first.shifts  # it has no unit
    # Both ways of an even function rise alike: no shift in the one direction, though each way is far from nothing.
    assert not second.shifts["even"].significant
    assert second.shifts["even"].plus > 1 and second.shifts["even"].minus > 1
    assert second.most_moved == "mixed"
    assert third.most_moved is None and third.identity is not None
    assert third.identity == pytest.approx((1 - np.cos(0.5)) / units.identity, rel=1e-3)
    assert idle.identity == pytest.approx(0, abs=1e-5) and not any(shift.value for shift in idle.shifts.values())


def test_the_unit_of_identity_is_the_mean_over_all_pairs(ws: Ws) -> None:
    few = measure(ws[:7])
    unit = few.features / np.linalg.norm(few.features, axis=1, keepdims=True)
    pairs = [1 - float(unit[i] @ unit[j]) for i in range(7) for j in range(7) if i != j]
    assert units_of(few).identity == pytest.approx(np.mean(pairs), rel=1e-4)
    assert units_of(Measurements(few.attributes, np.empty((7, 0), np.float32))).identity == 0


def test_best_removal_has_sign_and_side_effects_of_its_direction(ws: Ws) -> None:
    units = units_of(measure(ws))
    having = ws[measure(ws).attributes["linear"] >= 2]
    before = measure(having)
    crooked = Direction("crooked", np.array([0.6, 0, 0.8, 0, 0, 0, 0, 0], np.float32), (0, NUM_WS), 1.0, "sefa")
    removals = list(
        measure_removals(having, "linear", 2, [axis(1), axis(0), crooked], [4, -4, -8], before, units, measure)
    )
    by = {(each.direction, each.strength): each for each in removals}
    gone = (before.attributes["linear"] - 2 * 4) < 2
    assert by["axis-0", -4].removed == gone.sum() and by["axis-0", -4].images == len(having)
    assert by["axis-0", 4].removed == by["axis-1", -8].removed == 0
    assert by["axis-0", -4].low <= by["axis-0", -4].share <= by["axis-0", -4].high
    assert by["crooked", -4].share >= 0.9  # it also removes, and changes the identity
    best = best_removal(removals)
    assert (best.direction, best.strength) == ("axis-0", -4)
    assert "linear" not in best.others and best.confirmed >= 0.9
    useless = [each for each in removals if each.direction == "axis-1"]
    assert best_removal(useless).removed == 0  # none removes it, and the result says so
    with pytest.raises(ValueError, match="all with"):
        list(measure_removals(ws, "linear", 2, [axis(0)], [1], measure(ws), units, measure))


def test_random_directions_lie_in_span_of_w_within_classes() -> None:
    rng = np.random.default_rng(1)
    labels = np.arange(600) % 2
    w = np.zeros((600, W_DIM), np.float32)
    w[:, :2] = rng.normal(size=(600, 2)) * 0.5
    w[:, 7] = 100 * labels
    directions = random_directions(w, labels, 4, num_ws=NUM_WS, seed=0)
    assert [d.name for d in directions] == [f"random-{k}" for k in (1, 2, 3, 4)]
    for each in directions:
        assert each.method == "random"
        assert np.linalg.norm(each.vector[:2]) == pytest.approx(1, abs=1e-5) and abs(each.vector[7]) < 1e-5
        assert each.scale == pytest.approx(0.5, rel=0.1)
    assert not np.allclose(directions[0].vector, directions[1].vector)


def test_frame_share_equals_artefact_detector_frame() -> None:
    image = np.random.default_rng(0).integers(120, 200, (64, 64, 3)).astype(np.uint8)
    image[:20, :20] = 0
    assert frame_share(image) == detect_artefacts(image).frame > 0.05


@pytest.mark.full
def test_directions_command_measures_and_sweeps(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_classifier(tmp_path / "classifier")
    bundle = make_bundle(tmp_path / "tiny")
    directions = [Direction("north", np.eye(16, dtype=np.float32)[0], (0, 6), 1.0, "sefa")]
    location = amend_bundle(bundle, parts={"classifier": tmp_path / "classifier"}, directions=directions).location

    def run(*arguments: object) -> str:
        result = CliRunner().invoke(
            app, ["directions", *map(str, arguments), "--device", "cpu"], env={"COLUMNS": "200"}
        )
        if result.exception is not None:
            raise result.exception
        return result.output

    out = tmp_path / "m.json"
    output = run("measure", location, "--samples", 2, "--baseline", 4, "--controls", 1, "--out", out)
    assert "north" in output and "random-1" in output and "malignant" in output
    facts = json.loads(out.read_text())
    (north, _) = facts["effects"]
    assert north["direction"] == "north" and north["strength"] == 3 and north["identity"] > 0
    assert facts["samples"] == 2 and facts["baseline"] == 4 and facts["units"]["identity"] > 0
    for wrong in (("--strength", 0), ("--strength", 1, "--strength", 2), ("--baseline", 3), ("--direction", "south")):
        with pytest.raises(RequestError):
            run("measure", location, "--samples", 4, *wrong)
    monkeypatch.setitem(THRESHOLDS, "frame", 0.0)  # every image has it, and no move can remove it
    options = ("--samples", 2, "--baseline", 2, "--strength", 1, "--controls", 0, "--out", out)
    output = run("measure", location, "--framed", *options)
    facts = json.loads(out.read_text())
    assert facts["framed"] == 2 and [each["strength"] for each in facts["removals"]] == [1, -1]
    assert facts["best"]["removed"] == 0 and "removes the frame in 0 of 2 images" in output
    video = tmp_path / "north.gif"
    run("sweep", location, "--out", video, "--direction", "north", "--samples", 2, "--steps", 3)
    from PIL import Image

    with Image.open(video) as moving:
        # Forwards and back, without repeating the ends.
        assert moving.size == (32, 16) and getattr(moving, "n_frames", 1) == 4
    with pytest.raises(RequestError, match=r"\.gif or \.mp4"):
        run("sweep", location, "--out", tmp_path / "north.png", "--direction", "north")
