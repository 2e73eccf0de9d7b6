"""Tests of noise: random by default, determined by (seed, index), and unchanged when a sample is edited."""

from __future__ import annotations

import json
import sqlite3
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from pydantic import ValidationError
from typer.testing import CliRunner

from commands.main import app
from dermis.bundle import Bundle, amend_bundle, load_generator
from dermis.bundle.directions import Direction
from dermis.dataset.manifest import parse_manifest
from dermis.dataset.neighbours import write_neighbours
from dermis.dataset.request import DatasetRequest, stored_request
from dermis.directions.edit import Edit, bundle_offset
from dermis.imaging import Images, decode
from dermis.latent_neighbours import Anchor, neighbours_of
from dermis.latents import noise_vectors
from dermis.networks import Generator
from dermis.synthesizer import Synthesizer
from dermis.synthesizer.backend import Backend, Bytes, Float
from dermis.synthesizer.choice import LoadedBackend
from service_kit import make_directly, service
from services.gateway.schemas.edits import EditsRequest
from services.gateway.schemas.images import ImagesRequest
from services.inference.samples import Options, generate_rows, pack_rows
from tiny import make_bundle
from training.evaluation.pictures import STEPS, Drawing
from training.gan.snapshot import sample_grid

Invoke = Callable[..., str]


@pytest.fixture(scope="module")
def noisy(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    """A bundle with a direction, whose noise changes its images clearly."""
    bundle = make_bundle(tmp_path_factory.mktemp("noisy") / "noisy", noise_strength=0.5)
    unit = np.eye(bundle.generator.w_dim, dtype=np.float32)[0]
    return amend_bundle(bundle, directions=[Direction("axis", unit, (0, bundle.generator.num_ws), 1.0, "sefa")])


@pytest.fixture(scope="module")
def synthesizer(noisy: Bundle) -> Synthesizer:
    return Synthesizer(noisy, device="cpu", threads=1)


@pytest.fixture
def invoke(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Invoke:
    monkeypatch.chdir(tmp_path)

    def call(*arguments: object) -> str:
        result = CliRunner().invoke(app, [str(each) for each in arguments])
        assert result.exit_code == 0, (result.output, result.exception)
        return result.output

    return call


def images_in(archive: Path) -> dict[str, Images]:
    """The images of a dataset by their names."""
    with zipfile.ZipFile(archive) as opened:
        return {Path(name).stem: decode(opened.read(name)) for name in opened.namelist() if name.endswith(".png")}


def difference(a: Images, b: Images) -> int:
    return int(np.abs(a.astype(int) - b).max())


# -- the default


def test_requests_default_to_random_noise() -> None:
    assert DatasetRequest.model_validate({"classes": {"a": 1}}).noise_mode == "random"
    assert ImagesRequest.model_validate({"classes": {"a": 1}}).noise_mode == "random"
    samples = {"samples": [{"class": "a"}]}
    projections = {"projections": [{"id": "pr_" + "0" * 32}]}
    assert EditsRequest.model_validate(samples).noise == "random"
    assert EditsRequest.model_validate(samples | {"noise_mode": "none"}).noise == "none"
    assert EditsRequest.model_validate(projections).noise == "const"
    with pytest.raises(ValidationError, match="no noise of their own"):
        EditsRequest.model_validate(projections | {"noise_mode": "random"})


def test_api_document_and_help_state_default_noise_mode(tmp_path: Path, noisy: Bundle) -> None:
    with service(noisy.location, tmp_path / "data") as running:
        schemas = running.client.get("/openapi.json").json()["components"]["schemas"]
    assert [schemas[name]["properties"]["noise_mode"]["default"] for name in ("DatasetRequest", "ImagesRequest")] == [
        "random",
        "random",
    ]
    text = CliRunner().invoke(app, ["generate", "--help"], env={"COLUMNS": "200"}).output
    assert "random (default)" in text


def test_samples_have_own_noise_that_does_not_depend_on_shards(
    noisy: Bundle, synthesizer: Synthesizer, invoke: Invoke, tmp_path: Path
) -> None:
    for size in (3, 250):
        invoke(
            "generate", "--bundle", noisy.location, "--classes", "benign=8", "--shard-size", size, "--out", f"{size}"
        )
    small, large = (images_in(tmp_path / size / "images.zip") for size in ("3", "250"))
    assert len(small) == 8 and small.keys() == large.keys()
    assert all(np.array_equal(small[name], large[name]) for name in small)
    drawn = synthesizer.images([0] * 8, range(8), [0] * 8, noise_mode="random")
    assert np.array_equal(np.stack([small[name] for name in sorted(small)]), drawn)
    # The same style vector, so that what differs is the noise of the two samples.
    ws = np.repeat(synthesizer.ws([0], [0], [0]), 2, axis=0)
    first, second = synthesizer.images_from_ws(ws, "random", seeds=[0, 0], indices=[0, 1])
    assert np.array_equal(first, drawn[0]) and difference(first, second) > 20
    assert np.array_equal(*synthesizer.images_from_ws(ws, "const"))


def test_large_batch_contains_own_noise_of_each_sample(monkeypatch: pytest.MonkeyPatch, noisy: Bundle) -> None:
    """The batch of a GPU, whose noise several cores draw: padding, order and neighbours make no difference."""
    batch, resolutions = 4, (4, 8, 8, 16, 16)
    size = sum(resolution**2 for resolution in resolutions)
    received: list[Float] = []

    def images(ws: Float, noise: Float) -> Bytes:
        assert noise.shape == (batch, size)
        received.append(noise.copy())
        return np.zeros((batch, 16, 16, 3), np.uint8)

    def mapping(z: Float, c: Float) -> Float:
        return np.zeros((batch, noisy.generator.w_dim), np.float32)

    def ready(*_: object) -> LoadedBackend:
        backend = Backend("fake", "float32", batch, 1, mapping, images, {})
        w_avg, constant = np.zeros(noisy.generator.w_dim, np.float32), np.full((1, size), 7, np.float32)
        return LoadedBackend(backend, noisy.generator, w_avg, constant, resolutions)

    monkeypatch.setattr("dermis.synthesizer.load_backend", ready)
    for threads in (1, 3):
        with Synthesizer(noisy, threads=threads) as fake:
            received.clear()
            fake.images([5] * 6, range(6), [0] * 6)
            noise = np.concatenate(received)
            assert np.array_equal(noise[:6], noise_vectors([5] * 6, range(6), size)) and not noise[6:].any()
            received.clear()
            fake.images([5], [5], [0], noise_mode="const")
            assert (received[0] == 7).all()


# -- edits


def test_an_edited_sample_keeps_its_noise(noisy: Bundle, synthesizer: Synthesizer) -> None:
    """An edit of a sample is its style vectors moved, drawn with the noise of its seed and index."""
    edit = Edit("axis", 1.5)
    rows = pack_rows(Options(noisy.digest, edits=[edit], directions=["axis"]), 3, [4, 9], [0, 1])
    edited = np.stack(
        [image for image in generate_rows({noisy.digest: synthesizer}, rows) if not isinstance(image, str)]
    )
    ws = synthesizer.ws([3, 3], [4, 9], [0, 1])
    moved = ws + bundle_offset(noisy, [edit])
    assert np.array_equal(edited, synthesizer.images_from_ws(moved, "random", seeds=[3, 3], indices=[4, 9]))
    assert difference(edited, synthesizer.images_from_ws(moved, "random", seeds=[3, 3], indices=[9, 4])) > 20
    plain = pack_rows(Options(noisy.digest), 3, [4, 9], [0, 1])
    assert np.array_equal(
        np.stack(generate_rows({noisy.digest: synthesizer}, plain)), synthesizer.images([3, 3], [4, 9], [0, 1])
    )  # type: ignore[arg-type]


def test_strips_and_sweeps_contain_unedited_sample(
    noisy: Bundle, synthesizer: Synthesizer, invoke: Invoke, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    frames: list[Images] = []

    def encode_video(images: Images, *_: object, **__: object) -> bytes:
        frames.append(images)
        return b"video"

    monkeypatch.setattr("dermis.video.encode_video", encode_video)
    options = (
        "--direction",
        "axis",
        "--seed",
        2,
        "--index",
        5,
        "--steps",
        3,
        "--truncation-psi",
        0.9,
        "--device",
        "cpu",
    )
    invoke("directions", "strips", noisy.location, "--out", "strip.png", *options)
    invoke("directions", "sweep", noisy.location, "--out", "sweep.gif", "--samples", 2, "--class", "benign", *options)
    samples = synthesizer.images([2, 2], [5, 6], [0, 0], truncation_psi=0.9)
    assert np.array_equal(decode((tmp_path / "strip.png").read_bytes())[2:18, 20:36], samples[0])
    assert np.array_equal(frames[0][1], np.concatenate(samples, axis=1))  # frames: -3, 0, 3 and back


def test_neighbours_have_the_noise_of_their_anchor(noisy: Bundle, synthesizer: Synthesizer, tmp_path: Path) -> None:
    generator = load_generator(noisy)
    ws = np.full((noisy.generator.num_ws, noisy.generator.w_dim), 0.3, np.float32)
    anchors = [Anchor("sample", 0, 9, 1), Anchor("projection", 1, 0, 0, ws)]
    write_neighbours(tmp_path / "out", noisy, generator, synthesizer, anchors, count=2, distance=0.1)
    description = json.loads((tmp_path / "out" / "neighbours.json").read_text())
    assert [each["noise_mode"] for each in description["anchors"]] == ["random", "const"]
    for place, (anchor, noise_mode) in enumerate(zip(anchors, ("random", "const"), strict=True)):
        moved = neighbours_of(generator, anchor, [1], distance=0.1)
        expected = synthesizer.images_from_ws(moved, noise_mode, seeds=[anchor.seed], indices=[anchor.index])[0]  # type: ignore[arg-type]
        (file,) = (tmp_path / "out").glob(f"*/NBR_{place:05d}_001.png")
        assert difference(decode(file.read_bytes()), expected) <= 1


# -- pictures that show a model


def test_grids_and_interpolations_show_samples_with_their_noise(noisy: Bundle) -> None:
    generator: Generator = load_generator(noisy)
    synthesizer = Synthesizer(noisy, device="cpu", threads=1, dtype="float32")
    grid = sample_grid(generator, torch.device("cpu"))
    assert difference(grid[:3], synthesizer.images([0] * 3, range(3), [0] * 3)) <= 1
    assert difference(grid[:3], synthesizer.images([0] * 3, range(3), [0] * 3, noise_mode="const")) > 20
    draw = Drawing(generator, synthesizer, 0, 1.0)
    line = draw.interpolations(0, 2)
    assert difference(line[[0, STEPS]], draw.samples(0, 3)[[0, 2]]) <= 1
    between = draw.class_interpolations(0, 1, 2)
    assert difference(between[[0, STEPS]], draw.samples(0, 2)) <= 1
    assert difference(between[[STEPS - 1, 2 * STEPS - 1]], draw.samples(1, 2)) <= 1


# -- stored data of earlier versions


@pytest.mark.full
@pytest.mark.parametrize("states_noise", [True, False])
def test_a_manifest_of_constant_noise_gives_the_same_bytes(
    noisy: Bundle, synthesizer: Synthesizer, invoke: Invoke, tmp_path: Path, states_noise: bool
) -> None:
    """Earlier manifests state const, which was the default; one that states nothing means it."""
    asked = ("--bundle", noisy.location, "--classes", "benign=4,malignant=3", "--seed", 7, "--shard-size", 4)
    invoke("generate", *asked, "--noise-mode", "const", "--out", "old")
    manifest = tmp_path / "old" / "manifest.json"
    document: dict[str, Any] = json.loads(manifest.read_text())
    assert document["request"]["noise_mode"] == "const"
    if not states_noise:
        del document["request"]["noise_mode"]
        manifest.write_text(json.dumps(document))
    assert parse_manifest(manifest.read_bytes(), "m").request.noise_mode == "const"
    assert "checked, all hashes match" in invoke("verify", "old")
    output = invoke("generate", "--manifest", manifest, "--bundle", noisy.location, "--out", "new")
    assert "byte for byte" in output
    drawn = images_in(tmp_path / "new" / "images.zip")
    assert np.array_equal(drawn["SYN_00000000"], synthesizer.images([7], [0], [0], noise_mode="const")[0])


@pytest.mark.full
def test_stored_job_without_noise_mode_uses_constant_noise(noisy: Bundle, tmp_path: Path) -> None:
    request = {"classes": {"benign": 60, "malignant": 40}, "seed": 3, "shard_size": 9, "model": noisy.name}
    with service(noisy.location, tmp_path / "data") as running:
        asked = running.ask(request | {"noise_mode": "const"})
        running.wait_for_shards(asked, 2)
        running.generator.gate.clear()
    (database,) = (tmp_path / "data").glob("*.sqlite*")
    with sqlite3.connect(database) as connection:
        connection.execute("UPDATE dermis_jobs SET request = json_remove(request, '$.noise_mode')")
    with service(noisy.location, tmp_path / "data") as running:
        dataset = running.wait(asked)
        assert dataset["request"]["noise_mode"] == "const"
        folder = Path(running.settings.storage) / dataset["id"]
        made = {path.name: path.read_bytes() for path in folder.iterdir()}
    assert made == make_directly(noisy, request | {"noise_mode": "const"}, tmp_path / "direct")


def test_stored_requests_are_validated() -> None:
    assert stored_request({"classes": {"a": 1}, "noise_mode": "random"}).noise_mode == "random"
    with pytest.raises(ValidationError, match="classes"):
        stored_request({"noise_mode": "const"})
    with pytest.raises(ValidationError):
        stored_request([])
