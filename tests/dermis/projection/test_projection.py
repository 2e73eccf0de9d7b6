"""Tests of projection: it recovers known latents, and the result of an image does not depend on other images."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from dermis.bundle import Bundle
from dermis.errors import DermisError, RequestError
from dermis.projection.projector import ImageProjector, ProjectionState, Target, _autocorrelation
from dermis.projection.result import Projection
from dermis.projection.schedule import OFFICIAL, Schedule
from dermis.synthesizer import Synthesizer
from tiny import make_bundle

SHORT = Schedule(steps=12)


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    return make_bundle(tmp_path_factory.mktemp("bundles") / "tiny")


@pytest.fixture(scope="module")
def projector(bundle: Bundle) -> ImageProjector:
    return ImageProjector(bundle, distance="lite0", device="cpu", batch_size=3, dtype="float32")


@pytest.fixture(scope="module")
def drawn(bundle: Bundle) -> list[Target]:
    labels = [0, 1, 0, 1, 1]
    with Synthesizer(bundle, device="cpu") as synthesizer:
        images = synthesizer.images([5] * 5, range(5), labels)
    return [Target(image, label) for image, label in zip(images, labels, strict=True)]


def project(projector: ImageProjector, targets: list[Target], schedule: Schedule) -> list[Projection]:
    projections = dict(projector.project(targets, schedule))
    assert sorted(projections) == list(range(len(targets)))
    return [projections[number] for number in range(len(targets))]


def test_official_schedule_equals_that_of_paper() -> None:
    assert (OFFICIAL.steps, OFFICIAL.space, OFFICIAL.start, OFFICIAL.noise_regularisation) == (1000, "w", "mean", 1e5)
    rates = [OFFICIAL.rate_at(step) for step in range(1000)]
    assert rates[0] == 0 and rates[25] == pytest.approx(0.05)  # up linearly in 50 steps
    assert set(rates[50:751]) == {0.1}
    assert rates[875] == pytest.approx(0.05) and 0 < rates[999] < 1e-5  # down along a cosine in the last 250
    noise = [OFFICIAL.latent_noise_at(step) for step in range(1000)]
    assert noise[0] == 0.05 and noise[375] == pytest.approx(0.0125) and set(noise[750:]) == {0.0}


def test_projection_recovers_generated_image(projector: ImageProjector, drawn: list[Target]) -> None:
    projections = project(projector, drawn[:2], Schedule(steps=150, noise_maps=False))
    begin = project(projector, drawn[:2], Schedule(steps=1, noise_maps=False))  # the first rate is 0: the mean
    for target, start, end in zip(drawn, begin, projections, strict=False):
        assert end.distance < 0.7 * start.distance
        assert end.pixel_error < 0.8 * start.pixel_error
        assert np.abs(end.image.astype(int) - target.image).mean() == pytest.approx(
            end.pixel_error, abs=end.pixel_error
        )
        assert (end.ws == end.ws[0]).all() and end.noise is None and end.distance_name == "lite0"


@pytest.mark.full
def test_projection_in_larger_space_is_nearer_to_image(projector: ImageProjector, drawn: list[Target]) -> None:
    strange = [Target(np.roll(target.image, 5, axis=1)[::-1].copy(), target.label) for target in drawn[:3]]
    means = [
        np.mean([each.distance for each in project(projector, strange, schedule)])
        for schedule in (
            Schedule(steps=60, noise_maps=False),
            Schedule(steps=60, noise_maps=False, space="w+"),
            Schedule(steps=60, noise_maps=False, space="w+", prior=100.0),
        )
    ]
    assert means[1] < means[0] and means[1] < means[2]


@pytest.mark.full
def test_projection_does_not_depend_on_other_images(projector: ImageProjector, drawn: list[Target]) -> None:
    together = project(projector, drawn, SHORT)  # five images in three slots: the last two start later
    for number, target in enumerate(drawn):
        (alone,) = project(projector, [target], SHORT)
        assert np.array_equal(alone.ws, together[number].ws)
        assert np.array_equal(alone.image, together[number].image)
        assert alone.noise is not None and together[number].noise is not None
        assert all(np.array_equal(a, b) for a, b in zip(alone.noise, together[number].noise, strict=True))
    backwards = project(projector, drawn[::-1], SHORT)[::-1]
    assert all(np.array_equal(a.ws, b.ws) for a, b in zip(together, backwards, strict=True))


@pytest.mark.full
def test_states_show_the_images_and_distances_of_each_step_and_change_nothing(
    projector: ImageProjector, drawn: list[Target]
) -> None:
    states: list[tuple[int, int, float, np.ndarray]] = []

    def record(state: ProjectionState) -> None:
        rows = zip(state.numbers, state.steps, state.distances, state.images(), strict=True)
        states.extend((number, step, distance, image.copy()) for number, step, distance, image in rows)

    schedule = Schedule(steps=12, noise_maps=False, latent_noise=0.0, pixels=1.0)
    watched = dict(projector.project(drawn[:4], schedule, on_state=record, frame_every=1))
    with_pixels = list(states)
    states.clear()
    dict(projector.project(drawn[:4], replace(schedule, pixels=0.0), on_state=record))
    assert [row[2] for row in states[:3]] == [row[2] for row in with_pixels[:3]]  # without the error of pixels
    states[:] = with_pixels
    alone = dict(projector.project(drawn[:4], schedule))
    assert [(number, step) for number, step, *_ in states if number == 3] == [(3, step) for step in range(1, 13)]
    assert len(states) == 4 * 12
    for number, step, distance, image in states:
        frames = watched[number].frames
        assert frames is not None
        np.testing.assert_array_equal(image, frames[step - 1])  # what the film records at this step
        if step == 12:  # the last rate is small, so the result is nearly this image
            assert distance == pytest.approx(watched[number].distance, rel=0.15)
    for number, projection in alone.items():
        np.testing.assert_array_equal(projection.ws, watched[number].ws)


def test_projector_reads_images_on_demand(projector: ImageProjector, drawn: list[Target]) -> None:
    read = 0

    def targets() -> Iterator[Target]:
        nonlocal read
        for target in drawn:
            read += 1
            yield target

    steps: dict[int, int] = {}
    seen = []
    for number, _ in projector.project(targets(), SHORT, on_step=steps.update):
        seen.append((number, read))
    assert seen == [(0, 3), (1, 3), (2, 3), (3, 5), (4, 5)]
    assert steps == dict.fromkeys(range(5), SHORT.steps)


def test_projection_steps_equal_those_of_adam(bundle: Bundle, drawn: list[Target]) -> None:
    """The loop for one image, implemented again with torch's own optimiser."""
    schedule = Schedule(steps=6, ramp_up=0, ramp_down=0, latent_noise=0, noise_maps=False, learning_rate=0.02)
    projector = ImageProjector(bundle, distance="lite0", device="cpu", batch_size=1, dtype="float32")
    (projection,) = project(projector, drawn[:1], schedule)
    image = torch.tensor(drawn[0].image).permute(2, 0, 1)[None].float()
    target = projector._perceptual.embed(image)
    w = projector._means[:1, None].clone().requires_grad_()
    adam = torch.optim.Adam([w], lr=0.02)
    for _ in range(6):
        rendered = projector._draw(w.expand(-1, 6, -1), None)
        loss = (projector._perceptual.embed(rendered) - target).square().sum()
        adam.zero_grad()
        loss.backward()
        adam.step()
    assert np.allclose(projection.ws[0], w.detach().numpy()[0, 0], atol=1e-4)
    assert not np.allclose(projection.ws[0], projector._means[0].numpy(), atol=1e-2)


@pytest.mark.full
def test_projection_without_improvement_ends_early(projector: ImageProjector, drawn: list[Target]) -> None:
    schedule = Schedule(steps=400, noise_maps=False, latent_noise=0, patience=5)
    projections = project(projector, drawn, schedule)
    assert all(100 < each.steps <= 400 for each in projections)  # the ramp down of 100 steps is always executed
    assert min(each.steps for each in projections) < 400
    (alone,) = project(projector, drawn[3:4], schedule)
    assert alone.steps == projections[3].steps and np.array_equal(alone.ws, projections[3].ws)


def test_projected_noise_maps_stay_normalised(projector: ImageProjector, drawn: list[Target]) -> None:
    (projection,) = project(projector, drawn[:1], SHORT)
    assert projection.noise is not None
    assert [noise.shape for noise in projection.noise] == [(4, 4), (8, 8), (8, 8), (16, 16), (16, 16)]
    for noise in projection.noise:
        assert abs(float(noise.mean())) < 1e-5 and float(np.square(noise).mean()) == pytest.approx(1, abs=1e-3)


def test_autocorrelation_equals_values_computed_by_hand() -> None:
    board = torch.tensor([[1.0, -1.0] * 4, [-1.0, 1.0] * 4] * 4)  # every neighbour is the opposite: -1 either way
    stripes = torch.tensor([[1.0, -1.0] * 4] * 8)  # -1 along the row, 1 down the column
    autocorrelation = _autocorrelation(torch.stack([board, stripes, torch.zeros(8, 8)])[:, None])
    assert autocorrelation.tolist() == [2.0, 2.0, 0.0]
    coarse = torch.ones(1, 1, 16, 16)  # 1 + 1 at 16 px; averaged times 2, so 4 + 4, squared 16 + 16, at 8 px
    assert _autocorrelation(coarse).tolist() == [34.0]


def test_projection_without_class_starts_at_nearest_class_mean(projector: ImageProjector, bundle: Bundle) -> None:
    with torch.no_grad():
        ws = projector._means[:, None].expand(-1, projector._generator.num_ws, -1)
        images = projector._draw(ws, None)
    targets = [Target(image.permute(1, 2, 0).clamp(0, 255).round().byte().numpy()) for image in images]
    projections = project(projector, targets, Schedule(steps=1, noise_maps=False))
    for number, each in enumerate(projections):
        assert np.allclose(each.ws[0], projector._means[number].numpy(), atol=1e-6)


def test_invalid_projection_option_is_refused_by_name(
    projector: ImageProjector, bundle: Bundle, drawn: list[Target]
) -> None:
    for bad, message in (
        ({"steps": 0}, "steps: must be from 1"),
        ({"space": "z"}, "space: 'z' is none of"),
        ({"ramp_up": 0.8, "ramp_down": 0.4}, "ramp_up: the two ramps"),
        ({"prior": math.nan}, "prior: must be at least 0"),
    ):
        with pytest.raises(RequestError, match=message):
            Schedule(**bad)
    with pytest.raises(RequestError, match="label: class number 2 is outside 0 to 1"):
        list(projector.project([Target(drawn[0].image, 2)], SHORT))
    with pytest.raises(RequestError, match="there is no encoder for this bundle"):
        list(projector.project(drawn, Schedule(start="encoder")))
    with pytest.raises(DermisError, match="distance: 'l1' is none of vgg16, lite0"):
        ImageProjector(bundle, distance="l1", device="cpu")


def test_projection_starts_from_latents_of_encoder(bundle: Bundle, drawn: list[Target], tmp_path: Path) -> None:
    encoded = np.random.default_rng(0).normal(size=(3, 6, 16)).astype(np.float32)
    projector = ImageProjector(
        bundle, distance="lite0", device="cpu", batch_size=3, dtype="float32", encode=lambda images, labels: encoded
    )
    projections = project(projector, drawn[:2], Schedule(steps=1, start="encoder", space="w+", noise_maps=False))
    assert np.allclose(projections[1].ws, encoded[1], atol=1e-6) and projections[1].start == "encoder"
    projections = project(projector, drawn[:2], Schedule(steps=1, start="encoder", noise_maps=False))
    assert np.allclose(projections[1].ws, encoded[1].mean(axis=0), atol=1e-6)
