"""Training: the loop resumes bit for bit, the augmentation is a true warp, regularisers match closed forms."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from dermis.bundle import load_generator, open_bundle
from dermis.errors import BundleError, DataError, TrainingError
from dermis.imaging import contact_sheet, decode
from training.data.isic import ImageDataset, load_isic
from training.gan.augment import AUGMENTATIONS, AdaptiveP, augment, warp
from training.gan.checkpoint import read_state
from training.gan.config import GanConfig, auto_config
from training.gan.loop import train
from training.gan.snapshot import Origin, sample_grid, write_snapshot

CPU = torch.device("cpu")


def _dataset(count: int = 24, resolution: int = 8) -> ImageDataset:
    images = np.random.default_rng(0).integers(0, 256, (count, resolution, resolution, 3), dtype=np.uint8)
    labels = np.arange(count, dtype=np.int64) % 2
    return ImageDataset(images, labels, ("benign", "malignant"), tuple(map(str, range(count))), "0" * 64)


def _config(kimg: float, **changes: object) -> GanConfig:
    small = {"z_dim": 8, "w_dim": 8, "channel_base": 64, "channel_max": 8, "batch": 4, "r1_interval": 2}
    return auto_config(8, 2, total_kimg=kimg, augment_kimg=0.1, **(small | changes))


def test_stopped_and_resumed_run_equals_an_uninterrupted_one(tmp_path: Path) -> None:
    """Bit for bit: weights, optimizer, augmentation strength, everything a checkpoint holds."""
    short, long = (_config(kimg, augment_target=-1.0) for kimg in (0.020, 0.048))  # a target that p rises towards
    whole, _ = train(_dataset(), long, tmp_path / "whole", device=CPU, progress_bar=False)
    train(_dataset(), short, tmp_path / "parts", device=CPU, progress_bar=False)
    parts, progress = train(_dataset(), long, tmp_path / "parts", device=CPU, resume=True, progress_bar=False)
    assert progress.nimg == 48
    assert progress.stats["p"] > 0, "the run must have augmented, or the resumed p is not tested"
    for (name, a), b in zip(whole.state_dict().items(), parts.state_dict().values(), strict=True):
        assert torch.equal(a, b), name
    states = [read_state(tmp_path / run / "checkpoint.safetensors") for run in ("whole", "parts")]
    assert states[0]["adaptive"] == states[1]["adaptive"]
    log = [json.loads(line) for line in (tmp_path / "parts" / "log.jsonl").read_text().splitlines()]
    assert [entry["nimg"] for entry in log] == list(range(4, 49, 4))


def test_resume_refuses_another_run(tmp_path: Path) -> None:
    train(_dataset(), _config(0.004), tmp_path, device=CPU, progress_bar=False)
    with pytest.raises(TrainingError, match="--resume"):
        train(_dataset(), _config(0.008), tmp_path, device=CPU, progress_bar=False)
    with pytest.raises(TrainingError, match="r1_gamma"):
        train(_dataset(), _config(0.008, r1_gamma=3.0), tmp_path, device=CPU, resume=True, progress_bar=False)
    with pytest.raises(TrainingError, match="channel_max"):
        other = _config(0.008, channel_max=4)
        train(_dataset(), other, tmp_path, device=CPU, resume=True, allow_changes=True, progress_bar=False)
    (tmp_path / "checkpoint.safetensors").write_bytes(b"not a checkpoint")
    with pytest.raises(TrainingError, match="not a readable checkpoint"):
        train(_dataset(), _config(0.008), tmp_path, device=CPU, resume=True, progress_bar=False)


def test_options_changed_on_the_way_are_told_in_the_card(tmp_path: Path) -> None:
    train(_dataset(), _config(0.004), tmp_path, device=CPU, progress_bar=False)
    changed = replace(_config(0.008, batch=2, mbstd_group_size=2, r1_gamma=0.5, augment_p=0.25), augment_target=None)
    origin = Origin("moles", "folder", "CC0-1.0", "nobody")
    _, progress = train(
        _dataset(),
        changed,
        tmp_path,
        device=CPU,
        resume=True,
        allow_changes=True,
        on_snapshot=write_snapshot(_dataset(), changed, origin, CPU),
        progress_bar=False,
    )
    assert progress.nimg == 8
    (change,) = progress.changes
    assert change["kimg"] == 0.004 and change["before"]["batch"] == 4 and change["after"]["batch"] == 2
    state = read_state(tmp_path / "checkpoint.safetensors")
    assert state["adaptive"]["p"] == 0.25 and state["adaptive"]["target"] is None
    assert "| 0.0 | `batch` | 4 | 2 |" in open_bundle(tmp_path / "bundle").model_card
    _, again = train(_dataset(), changed, tmp_path, device=CPU, resume=True, progress_bar=False)
    assert len(again.changes) == 1


def test_divergence_stops_and_keeps_the_last_state(tmp_path: Path) -> None:
    train(_dataset(), _config(0.004), tmp_path, device=CPU, progress_bar=False)
    before = (tmp_path / "checkpoint.safetensors").read_bytes()
    config = _config(0.4, learning_rate=1e18)
    with pytest.raises(TrainingError, match="finite"):
        train(_dataset(), config, tmp_path / "diverging", device=CPU, progress_bar=False)
    assert (tmp_path / "checkpoint.safetensors").read_bytes() == before


def test_generator_learns_the_colour_of_each_class(tmp_path: Path) -> None:
    """Two flat colours, one a class: a few hundred steps must tell them apart through the label alone."""
    images = np.zeros((32, 8, 8, 3), dtype=np.uint8)
    images[::2] = (230, 40, 40)
    images[1::2] = (40, 40, 230)
    labels = np.arange(32, dtype=np.int64) % 2
    dataset = ImageDataset(images, labels, ("red", "blue"), tuple(map(str, range(32))), "1" * 64)
    config = _config(3.0, batch=8, augment="none", pl_weight=0.0, ema_kimg=0.1, channel_base=256, channel_max=32)
    generator, _ = train(dataset, config, tmp_path, device=CPU, progress_bar=False)
    z = torch.randn(8, 8, generator=torch.Generator().manual_seed(0))
    red, blue = (generator(z, torch.eye(2)[[label] * 8], noise_mode="const").mean(dim=(0, 2, 3)) for label in (0, 1))
    assert red[0] - red[2] > blue[0] - blue[2] + 0.5


def test_run_leaves_a_bundle_that_generates_what_its_card_shows(tmp_path: Path) -> None:
    dataset, config = _dataset(), _config(0.008)
    origin = Origin("tiny", "folder", "CC0-1.0", "nobody")
    generator, _ = train(
        dataset,
        config,
        tmp_path,
        device=CPU,
        progress_bar=False,
        on_snapshot=write_snapshot(dataset, config, origin, CPU),
    )
    bundle = open_bundle(tmp_path / "bundle")
    assert (bundle.name, bundle.class_names, bundle.provenance["kimg"]) == ("tiny", ("benign", "malignant"), 0.008)
    assert "0.0 thousand images" in bundle.model_card
    assert "benign (12), malignant (12)" in bundle.model_card
    stored = load_generator(bundle)
    shown = contact_sheet(sample_grid(generator, CPU), columns=8)
    assert np.array_equal(decode((tmp_path / "bundle" / "samples.png").read_bytes()), shown)
    difference = sample_grid(stored, CPU).astype(int) - sample_grid(generator, CPU)
    assert np.abs(difference).max() <= 1, "fp16 storage changed the images"


def test_names_that_no_bundle_can_have_are_refused_before_training() -> None:
    with pytest.raises(BundleError, match="name"):
        write_snapshot(_dataset(), _config(1.0), Origin("My Demo", "folder", "", ""), CPU)


def _wave(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    return torch.sin(0.4 * x) + torch.cos(0.3 * y + 0.5)


@given(
    angle=st.floats(-math.pi, math.pi),
    dx=st.floats(-3, 3),
    dy=st.floats(-3, 3),
    scale=st.floats(0.8, 1.25),
)
@settings(max_examples=15, deadline=None, derandomize=True)
def test_warp_samples_the_image_at_the_given_positions(angle: float, dx: float, dy: float, scale: float) -> None:
    axis = torch.arange(48) - 23.5
    y, x = torch.meshgrid(axis, axis, indexing="ij")
    c, s = scale * math.cos(angle), scale * math.sin(angle)
    matrix = torch.tensor([[c, s, dx], [-s, c, dy], [0, 0, 1]])[None]
    out = warp(_wave(x, y)[None, None], matrix)[0, 0]
    expected = _wave(c * x + s * y + dx, -s * x + c * y + dy)
    inner = x**2 + y**2 < 12**2  # beyond it the reflected border shows
    assert (out - expected).abs()[inner].max() < 0.02


def test_augmentation_is_identity_at_zero_and_acts_at_one() -> None:
    images = torch.rand(8, 3, 16, 16) * 2 - 1
    assert augment(images, 0.0, AUGMENTATIONS["bg"]) is images
    still = warp(images, torch.eye(3).expand(8, 3, 3))
    assert (still - images).abs().max() < 1e-5
    for name in ("blit", "geom", "bg"):
        torch.manual_seed(0)
        assert (augment(images, 1.0, AUGMENTATIONS[name]) - images).abs().mean() > 0.05, name
    assert augment(images, 1.0, AUGMENTATIONS["none"]) is images


def test_warp_is_twice_differentiable() -> None:
    x = torch.randn(1, 1, 8, 8, dtype=torch.float64, requires_grad=True)
    c, s = math.cos(0.3), math.sin(0.3)
    matrix = torch.tensor([[[c, s, 0.7], [-s, c, -0.2], [0, 0, 1]]], dtype=torch.float64)

    def energy(images: torch.Tensor) -> torch.Tensor:
        return (warp(images, matrix) ** 3).sum()

    assert torch.autograd.gradcheck(energy, (x,))
    assert torch.autograd.gradgradcheck(energy, (x,))


def test_adaptive_p_follows_the_sign_of_real_logits() -> None:
    adaptive = AdaptiveP(p=0.5, target=0.6, interval=4, kimg=1.0)
    for step in range(1, 5):
        adaptive.observe(torch.ones(8))
        r_t = adaptive.update(step, 8)
    assert r_t == 1.0
    assert adaptive.p == pytest.approx(0.5 + 8 * 4 / 1000)
    adaptive.observe(-torch.ones(8))
    adaptive.update(8, 8)
    assert adaptive.p == pytest.approx(0.5)


def _write_isic(folder: Path, rows: list[tuple[str, str]], broken: tuple[str, ...] = ()) -> None:
    (folder / "images").mkdir(parents=True)
    lines = ["isic_id,target,age_approx", *(f"{name},{target}," for name, target in rows)]
    (folder / "metadata.csv").write_text("\n".join(lines) + "\n")
    for i, (name, _) in enumerate(rows):
        path = folder / "images" / f"{name}.jpg"
        if name in broken:
            path.write_bytes(b"\xff\xd8 not a picture")
        else:
            Image.new("RGB", (40, 30), (i * 20, 0, 255)).save(path)


def test_isic_folder_is_read_cropped_and_labelled(tmp_path: Path) -> None:
    _write_isic(tmp_path, [("ISIC_2", "malignant"), ("ISIC_1", "benign"), ("ISIC_3", "benign")])
    dataset = load_isic(tmp_path, 16, cache=tmp_path / "cache", progress=False)
    assert dataset.ids == ("ISIC_1", "ISIC_2", "ISIC_3")
    assert dataset.class_names == ("benign", "malignant")
    assert dataset.labels.tolist() == [0, 1, 0]
    assert dataset.images.shape == (3, 16, 16, 3)
    again = load_isic(tmp_path, 16, cache=tmp_path / "cache", progress=False)
    assert np.array_equal(again.images, dataset.images)
    Image.new("RGB", (40, 30), (9, 99, 9)).save(tmp_path / "images" / "ISIC_2.jpg")
    changed = load_isic(tmp_path, 16, cache=tmp_path / "cache", progress=False)
    assert changed.sha256 != dataset.sha256
    assert not np.array_equal(changed.images, dataset.images), "a stale cache was used"


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda folder: (folder / "metadata.csv").unlink(), "metadata.csv"),
        (lambda folder: (folder / "images" / "ISIC_1.jpg").unlink(), "ISIC_1"),
        (lambda folder: (folder / "metadata.csv").write_text("isic_id,target\nISIC_1,\n"), "ISIC_1"),
        (lambda folder: (folder / "metadata.csv").write_text("a,b\n1,2\n"), "isic_id"),
        (lambda folder: (folder / "images" / "ISIC_1.jpg").write_bytes(b"\xff\xd8 broken"), "ISIC_1.jpg"),
    ],
)
def test_unusable_folders_are_refused_by_name(tmp_path: Path, spoil: object, message: str) -> None:
    _write_isic(tmp_path, [("ISIC_1", "benign"), ("ISIC_2", "malignant")])
    spoil(tmp_path)  # type: ignore[operator]
    with pytest.raises(DataError, match=message):
        load_isic(tmp_path, 16, progress=False)
