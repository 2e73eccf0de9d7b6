"""Tests of the encoder: it learns latents, resumes bit for bit, and is bound to one generator."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from dermis.bundle import Bundle, amend_bundle, load_generator
from dermis.errors import BundleError, DataError, TrainingError
from dermis.projection.encoder import load_encoder
from dermis.projection.projector import ImageProjector, Target
from dermis.projection.schedule import Schedule
from dermis.synthesizer import Synthesizer
from kept_logger import keep_curves
from tiny import make_bundle
from tiny_skin import make_skin
from training.data.isic import load_isic
from training.encoder.config import EncoderConfig
from training.encoder.run import train_encoder

SHORT = EncoderConfig(size=16, components=6, steps=40, warm_up=40, batch=8, distance="lite0", real_share=0)


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    return make_bundle(tmp_path_factory.mktemp("bundles") / "tiny")


@pytest.fixture(scope="module")
def folder(bundle: Bundle, tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("run")
    with pytest.MonkeyPatch.context() as patch:
        kept = keep_curves(patch, "training.encoder.loop")
        made = train_encoder(bundle, SHORT, run, device="cpu", loggers=["tensorboard"], progress_bar=False)
    rows = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    assert [step for _, step in kept.points] == [row["step"] for row in rows] == [10, 20, 30, 40]
    name = next(key for key in rows[0] if key != "step")
    assert kept.points[0][0][f"loss/{name}"] == rows[0][name] and kept.options["batch"] == 8 and kept.closed
    assert made is not None
    return made.folder


def weights(folder: Path) -> bytes:
    return (folder / "encoder.safetensors").read_bytes()


def test_encoder_learns_latents_of_generated_images(bundle: Bundle, folder: Path) -> None:
    encoder = load_encoder(bundle, folder, device="cpu")
    assert encoder is not None
    with Synthesizer(bundle, device="cpu", threads=1) as synthesizer:
        images = synthesizer.images([9] * 64, range(64), [0, 1] * 32)
        true = synthesizer.ws([9] * 64, range(64), [0, 1] * 32)
    latents = encoder(images)
    assert latents.shape == true.shape and latents.dtype == np.float32
    mean = true.mean(axis=0, keepdims=True)
    assert np.square(latents - true).mean() < 0.95 * np.square(mean - true).mean()
    generated = encoder.description.metrics["generated"]
    assert generated["encoded"] < generated["mean_start"]


def test_encoded_latent_does_not_depend_on_batch(bundle: Bundle, folder: Path) -> None:
    encoder = load_encoder(bundle, folder, device="cpu")
    assert encoder is not None
    images = np.random.default_rng(0).integers(0, 256, (5, 16, 16, 3), dtype=np.uint8)
    alone = np.concatenate([encoder(image[None]) for image in images])
    assert np.allclose(encoder(images), alone, atol=1e-5)


@pytest.mark.full
def test_stopped_encoder_training_resumes_to_same_weights(bundle: Bundle, folder: Path, tmp_path: Path) -> None:
    half = replace(SHORT, steps=20)
    train_encoder(bundle, half, tmp_path, device="cpu", progress_bar=False)
    with pytest.raises(TrainingError, match="resume"):
        train_encoder(bundle, SHORT, tmp_path, device="cpu", progress_bar=False)
    with pytest.raises(TrainingError, match="seed"):
        train_encoder(bundle, replace(SHORT, seed=4), tmp_path, device="cpu", resume=True, progress_bar=False)
    again = train_encoder(bundle, SHORT, tmp_path, device="cpu", resume=True, progress_bar=False)
    straight = train_encoder(bundle, SHORT, tmp_path / "straight", device="cpu", progress_bar=False)
    assert again is not None and straight is not None
    assert weights(straight.folder) == weights(folder)


def test_held_out_images_of_training_patients_are_refused(bundle: Bundle, tmp_path: Path) -> None:
    """The encoder would be measured on images like those that it has seen."""
    data = make_skin(tmp_path / "skin", count=8, size=16)
    rows = (data / "metadata.csv").read_text().splitlines()
    tables = {"even": rows[1::2], "odd": rows[2::2], "first": rows[1:5], "last": rows[5:]}  # two images a patient
    for name, chosen in tables.items():
        (tmp_path / f"{name}.csv").write_text("\n".join([rows[0], *chosen]))
    parts = {name: load_isic(data, 16, metadata=tmp_path / f"{name}.csv") for name in tables}
    out = tmp_path / "run"
    with pytest.raises(DataError, match="--held-out: 4 patients or lesions also have images in --images"):
        train_encoder(bundle, SHORT, out, real=parts["even"], held_out=parts["odd"], device="cpu", progress_bar=False)
    seen = replace(bundle, provenance={"dataset": {"sha256": parts["last"].sha256}})
    with pytest.raises(DataError, match="the bundle was trained on --held-out"):
        train_encoder(seen, SHORT, out, real=parts["first"], held_out=parts["last"], device="cpu", progress_bar=False)
    assert not out.exists()


def test_encoder_of_other_generator_is_refused(bundle: Bundle, folder: Path, tmp_path: Path) -> None:
    other = make_bundle(tmp_path / "other", seed=5)
    with pytest.raises(BundleError, match="another generator"):
        load_encoder(other, folder)
    with pytest.raises(BundleError, match="another generator"):
        load_encoder(amend_bundle(other, parts={"encoder": folder}))
    assert load_encoder(bundle) is None  # it has none of its own


def test_projection_starts_from_encoder_latents(bundle: Bundle, folder: Path, tmp_path: Path) -> None:
    whole = amend_bundle(make_bundle(tmp_path / "tiny"), parts={"encoder": folder})
    encoder = load_encoder(whole, device="cpu")
    assert encoder is not None and whole.encoder is not None
    projector = ImageProjector(
        whole, distance="lite0", device="cpu", dtype="float32", encode=encoder, generator=load_generator(whole)
    )
    image = np.random.default_rng(1).integers(0, 256, (16, 16, 3), dtype=np.uint8)
    # The first rate is 0: one step is the start itself.
    ((_, projection),) = projector.project([Target(image, 0)], Schedule(steps=1, space="w+", start="encoder"))
    assert np.allclose(projection.ws, encoder(image[None])[0], atol=1e-5)
    assert projection.start == "encoder"
    torch.manual_seed(0)
